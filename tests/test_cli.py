"""The command line: speed, help, aliases, configurations, errors in one sentence, interruption, every example."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from encoder_cases import write_clip
from pcs_trainer.cli import entry as cli
from pcs_trainer.cli.commands import COMMANDS, command
from pcs_trainer.cli.commands.common import HUB_EXAMPLE, UPSCALER_EXAMPLE
from pcs_trainer.cli.config import effective, toml, write_config
from pcs_trainer.cli.options import help_text, known_names, parse
from pcs_trainer.errors import UsageError
from pcs_trainer.sampling import drawing
from upscaler_cases import write_upscaler

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "examples" / "photos"
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}


def pcs(*words: str, cwd: Path | None = None, **options) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "pcs_trainer", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300, **options)


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["train", "--help"], ["completion", "bash"]])
def test_answers_without_torch_and_at_once(words):
    """Processor time, which other load does not change; the least of three."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = pcs(*words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and done.stdout and not done.stderr
    assert min(spent) < 0.3
    check = f"import sys; from pcs_trainer.cli.entry import main; main({words!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], env=ENVIRONMENT, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_flag_examples_first(name):
    shown = help_text(command(name))
    assert command(name).about == COMMANDS[name]
    assert shown.index("Examples") < shown.index("--debug")
    for option in command(name).options:
        assert (option.metavar if option.positional else option.name) in shown
    for line, _ in command(name).examples:
        assert line in shown
    assert max(len(line) for line in shown.splitlines() if not line.startswith("  pcs ")) <= 108


WRONG = [
    ("trian", "did you mean train"),
    ("--verson", "did you mean --version"),
    ("help trian", "did you mean train"),
    ("train", "needs photos"),
    ("train PHOTOS", "--class mug"),
    ("train nowhere --class mug", "nowhere does not exist"),
    ("train PHOTOS --class mug --stpes 5", "did you mean --steps"),
    ("train PHOTOS --class mug --steps ten", "expected an integer such as 150, got 'ten'"),
    ("train PHOTOS --class mug --steps", "--steps needs a value"),
    ("train PHOTOS --class mug --steps 2147483648", "--steps: expected an integer of at most 10,000,000, got 2,147"),
    (
        "train PHOTOS --class mug --method dreambooth --prior-images 2147483648",
        "--prior-images: expected an integer of at most",
    ),
    ("train PHOTOS --class mug --steps -3", "expected an integer of at least 1, got -3"),
    ("train PHOTOS --class mug --lr nan", "expected a number of at least 0 and at most 1 such as 1e-3, got nan"),
    ("train PHOTOS --class mug --method dreamboth", "did you mean dreambooth"),
    ("train PHOTOS --class mug --budget lots", "write 6GB"),
    ("train PHOTOS --class mug --budget 6GB --plan A", "not both"),
    ("train PHOTOS --class mug --resume --overwrite", "give one of them"),
    ("train PHOTOS --class mug --resume=yes", "takes no value"),
    ("train PHOTOS --class mug --resume --out nowhere", "so there is nothing to resume"),
    ("train PHOTOS --class mug --set stps=3", "did you mean 'steps'"),
    ("train PHOTOS --class mug --set check_backend=maybe", "expected true or false, got 'maybe'"),
    ("train PHOTOS --class mug --set rank=some", "expected an integer or none, got 'some'"),
    ("train PHOTOS --class mug --set init=zero_down", "expected one of zero_up, both_random, got 'zero_down'"),
    ("train PHOTOS --class mug --set preservation_weight=1", "personalized_residuals has no setting"),
    ("train PHOTOS --class mug --set method=textboost", "chosen by --method"),
    ("train PHOTOS --class mug --method dreambooth --rank 4", "--rank: dreambooth has no setting 'rank'"),
    ("train PHOTOS --class mug --set augment", "has no '='"),
    ("train PHOTOS --class mug --prompt photo", "must contain {subject}"),
    ("train PHOTOS --class mug --prior-folder nowhere", "--prior-folder: nowhere does not exist"),
    ("train PHOTOS --class mug --mixed_precision fp12", "no, fp16, bf16"),
    ("train PHOTOS --class mug --report_to wandb", "choose from tensorboard, none"),
    ("train PHOTOS --class mug --resume_from_checkpoint x", "neither 'latest'"),
    ("train PHOTOS --class mug --config nowhere.toml", "cannot be read"),
    ("train PHOTOS --class mug --out FILE", "is a file"),
    ("train PHOTOS --class mug --device gpu", "unknown device 'gpu'"),
    ("train PHOTOS --class mug --model nowhere", "--model: nowhere does not exist"),
    ("train PHOTOS --class mug --dtype float16 --device cpu", "not supported on a CPU"),
    ("train --instance_prompt dog --instance_data_dir PHOTOS", "cannot tell which words"),
    ("train --concepts_list FILE", "invalid JSON"),
    ("sample", "needs a prompt"),
    ("sample 'a {}'", "name one with --concept"),
    ("sample a --concept nowhere", "nowhere does not exist"),
    ("sample a b --count 2147483648", "are 4,294,967,296 images, and one call draws at most 10,000"),
    ("sample a --size 2147483648", "expected an integer of at most 16,384, got 2,147,483,648"),
    ("evaluate broken --count 100000", "expected an integer of at most 10,000, got 100,000"),
    ("sample a --concept broken", "has no concept.safetensors"),
    ("sample ' '", "the prompt is empty"),
    ("sample a --lag", "name one with --concept"),
    ("sample a --guidance x", "expected a number of at least 0 such as 7.5, got 'x'"),
    ("sample a --sampler eula", "did you mean euler"),
    ("sample a --sampler euler --eta 1", "--eta is only for ddim"),
    ("sample a --concept FILE", "FILE"),
    ("upscale", "needs a picture"),
    ("upscale nowhere.png --model x", "nowhere.png does not exist"),
    ("upscale .", "the embedded model enlarges nothing. Fix: give an up-scaler, --model stabilityai/"),
    ("upscale . --model tiny --prompt 'a {}'", "name one with --concept"),
    ("upscale . --model tiny --noise-level 20", "expected a number"),
    ("upscale . --model tiny --strength 1", "1 strengths and 0 concepts"),
    ("merge a", "at least two"),
    ("merge a b", "a does not exist"),
    ("export", "needs one concept"),
    ("export a b", "needs one concept"),
    ("export a --format kohja", "did you mean kohya"),
    ("plan --method x --budget 6GB", "unknown method 'x'"),
    ("plan --method dreambooth --rank 4", "--rank: dreambooth has no setting 'rank'"),
    ("plan --device tpu", "unknown device 'tpu'"),
    ("plan --resolution 65", "multiple of"),
    ("retrieve", "needs a folder of pictures"),
    ("retrieve nowhere --prompt x --judge", "nowhere does not exist"),
    ("retrieve PHOTOS --judge", "the class prompt (--prompt) is blank"),
    ("retrieve PHOTOS --prompt x", "clip=FOLDER (--clip FOLDER), or the judge"),
    ("retrieve PHOTOS --prompt x --clip a --judge", "one of the two"),
    ("retrieve PHOTOS --prompt x --clip nowhere", "clip='nowhere' (--clip) does not exist"),
    ("retrieve PHOTOS --prompt x --judge --out FILE", "FILE (--out) is there already"),
    ("evaluate", "needs one concept"),
    ("evaluate a", "--photos is missing"),
    ("evaluate a --photos PHOTOS --clip nowhere", "--clip: nowhere does not exist"),
    ("demo --effort 2", "at most 1"),
    ("demo --photos nowhere", "does not exist"),
    ("bench --steps 1", "at least 2"),
    ("completion tcsh", "unknown shell 'tcsh'"),
    ("doctor now", "unexpected word 'now'"),
]


@pytest.mark.parametrize(("line", "says"), WRONG, ids=[line for line, _ in WRONG])
def test_what_is_wrong_is_one_sentence_and_the_mend(line, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("no json")
    Path("broken").mkdir()
    words = [str(PHOTOS) if word == "PHOTOS" else word for word in shlex.split(line)]
    code = cli.main(words)
    error = capsys.readouterr().err
    told = [text for text in error.splitlines() if text.startswith("pcs: ") and "no --model given" not in text]
    told = [text for text in told if not text.startswith("pcs: bfloat16: ")]  # what it plans for, before it fails
    assert code == (1 if says in ("nothing to resume", "multiple of", "FILE") else 2)
    assert len(told) == 1 and says in told[0] and "Traceback" not in error


def test_debug_shows_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        cli.main(["--debug", "train"])
    with pytest.raises(UsageError):
        cli.main(["train", "--debug"])


@pytest.mark.slow
def test_what_does_not_fit_has_an_exit_code_of_its_own(capsys):
    assert cli.main(["plan", "--budget", "505MB", "--batch", "4"]) == 3
    assert "missing" in capsys.readouterr().out


def test_no_name_means_two_flags():
    for name in COMMANDS:
        options = [o for o in command(name).options if not o.positional]
        names = [n.replace("_", "-") for o in options for n in {o.name, *(a.replace("_", "-") for a in o.also)}]
        assert len(names) == len(set(names)), name
        assert set(known_names(command(name))) >= set(names)


def test_a_configuration_fills_what_the_command_line_leaves_open(tmp_path):
    file = tmp_path / "run.toml"
    lines = ["[train]", "max_train_steps = 9", "lr = 1e-3", 'budget = "6GB"', 'photos = ["a", "b"]']
    file.write_text("\n".join(['class = "mug"', f'with = ["{tmp_path}=cat"]', *lines]))
    found = effective(command("train"), parse(command("train"), ["--config", str(file), "--steps", "4"]))
    assert (found.class_word, found.steps, found.lr, found.photos) == ("mug", 4, 1e-3, ["a", "b"])
    assert found.with_subjects == [f"{tmp_path}=cat"]
    file.write_text("resolution = 512\n[sample]\nsize = 768")  # the first is for all commands
    assert effective(command("sample"), parse(command("sample"), ["a", "--config", str(file)])).size == 768
    assert found.budget == 6_000_000_000 and found.method == "personalized_residuals" and found.resume is False


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stpes = 4", "did you mean steps"),
        ('steps = "many"', "expected an integer such as 150, got 'many'"),
        ("resume = 1", "must be true or false"),
        ("steps = ", "is invalid TOML"),
        ("steps = 4\nmax_train_steps = 5", "steps = 4 and max_train_steps = 5 are both --steps, which has one value"),
    ],
)
def test_a_wrong_configuration_is_named(text, says, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=says):
        effective(command("train"), parse(command("train"), ["--config", str(file)]))


def test_the_configuration_beside_a_result_gives_the_same_flags(tmp_path):
    words = ["a b", "it's", "--class", 'a "b" \\ c', "--steps", "3", "--lr", "1e-3", "--preview", "ä {}"]
    words += ["--set", "keep=3"]
    first = effective(command("train"), parse(command("train"), words))
    file = write_config(tmp_path / "run.toml", command("train"), first)
    again = effective(command("train"), parse(command("train"), ["--config", str(file)]))
    written = {line.partition(" = ")[0] for line in file.read_text().splitlines()}
    assert again.from_config == {option.attribute for option in command("train").options if option.key in written}
    assert vars(first) | {"config": str(file), "from_config": again.from_config} == vars(again)
    assert toml(True) == "true" and toml(["x", 1.5]) == '["x", 1.5]'


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("pcs tr", ["train"]),
        ("pcs train --meth", ["--method"]),
        ("pcs train --method text", ["textboost", "textual_inversion"]),
    ],
)
def test_bash_completes(typed, found, tmp_path):
    words = typed.split()
    script = pcs("completion", "bash").stdout
    script += f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; _pcs; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == found, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_scripts_name_every_flag(shell):
    shown = pcs("completion", shell).stdout
    for name in COMMANDS:
        for option in command(name).options:
            if not option.positional:
                assert option.name.lstrip("-") in shown
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=shown, text=True).returncode == 0


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on_and_twice_leaves_at_once(tmp_path, monkeypatch, capsys):
    line = [sys.executable, "-m", "pcs_trainer", "train", str(PHOTOS), "--class", "mug", "--steps", "100000"]
    line += ["--out", "run", "--no-report"]

    def started():
        process = subprocess.Popen(
            [*line, "--overwrite"], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        for shown in process.stderr:
            if re.search(r"\d/100000", shown) and "it/s" in shown:
                return process
        raise AssertionError("the training never began")

    process = started()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert "stopping after this step" in said and "pcs train --config run/run.toml --resume" in said
    assert (tmp_path / "run" / "concept.safetensors").is_file()
    step = max(int(f.name[11:]) for f in (tmp_path / "run").glob("checkpoint-*"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", "run/run.toml", "--resume", "--steps", str(step + 2), "--no-report"]) == 0
    assert f"goes on from checkpoint-{step}" in capsys.readouterr().err
    process = started()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    at = time.monotonic()
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - at < 30
    process.stderr.close()


def examples() -> list[str]:
    """Every example of the help and of the docs, each once, those that others stand on first."""
    lines = [line for name in COMMANDS for line, _ in command(name).examples]
    text = (ROOT / "docs" / "command-line.md").read_text() + (ROOT / "docs" / "quickstart-gpu.md").read_text()
    lines += [
        line for line in re.findall(r"^(pcs .+)$", text, re.MULTILINE) if "COMMAND" not in line and "--help" not in line
    ]
    lines = [line for line in dict.fromkeys(lines) if line != "pcs --version"]
    order = ["train examples/photos --class mug", "retrieve", "train", "export", ""]
    return sorted(lines, key=lambda line: next(i for i, start in enumerate(order) if line.startswith(f"pcs {start}")))


def test_the_hub_name_that_was_removed_stands_nowhere():
    """The hub dropped that repository in August 2024: whoever copies its name gets a 404."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    removed = "runway" + "ml/"
    line = ["git", "grep", "--line-number", "--ignore-case", removed, "--", ".", ":!CHANGELOG.md"]
    found = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 1, f"write {HUB_EXAMPLE} instead:\n{found.stdout}{found.stderr}"


# A run of each that ends in a second or two: flags that come last win.
SHORT = {
    "train": ["--steps", "2", "--prior-images", "2", "--no-report", "--set", "check_backend=false"],
    "sample": ["--steps", "2", "--count", "1"],
    "upscale": ["--steps", "2"],
    "evaluate": ["--steps", "2", "--count", "2"],
    "demo": ["--effort", "0.002"],
    "bench": ["--steps", "2"],
}


def two_steps(*given, sample=drawing.sample, **named):
    """`sample`, for what draws with a number of steps of its own."""
    return sample(*given, **named | {"steps": 2})


OURS = {"--max_train_steps": "--steps", "--output_dir": "--out"}  # two names of a flag must not say two things


@pytest.mark.slow
def test_every_example_of_the_help_and_the_docs_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pcs_trainer.cli.demo.report.memory_of", lambda _: [])  # slow, and the demo's own tests have it
    monkeypatch.setattr(drawing, "sample", two_steps)
    for name in ("examples", "my-photos", "my-dog", "my-cat"):
        os.symlink(ROOT / "examples" if name == "examples" else PHOTOS, name)
    up_scaler = str(write_upscaler(tmp_path / "up-scaler"))
    (tmp_path / "path" / "to").mkdir(parents=True)
    write_clip(tmp_path / "path" / "to" / "clip")
    Path("captions.txt").write_text("a blue boat by the sea\na red house in the snow\n" * 40)
    for word in ("cat", "dog"):
        made = f"train my-photos --class {word} --method custom_diffusion --out out/{word}"
        assert cli.main([*made.split(), *SHORT["train"]]) == 0
    for number, line in enumerate(examples()):
        words = shlex.split(line)[1:]
        words = [OURS.get(word, word) for word in words] + SHORT.get(words[0], [])
        if words[0] in ("demo", "bench") and not {"--method", "--methods"} & set(words):  # one for all of them
            words += [{"demo": "--methods", "bench": "--method"}[words[0]], "personalized_residuals"]
        if words[0] == "train":
            named = words[words.index("--out") + 1] if "--out" in words else "out/mug"
            if "--resume" in words:
                words += ["--steps", "4"]
            elif (Path(named) / "concept.safetensors").exists():
                words += ["--out", f"out/more-{number}"]
        if "--model" in words:  # the real weights are not here: the same flags on the embedded model, a small up-scaler
            at = words.index("--model") + 1
            words[at] = up_scaler if words[at] == UPSCALER_EXAMPLE else "tiny"
            words += ["--size", "64"] * (words[0] == "upscale") + ["--dtype", "float32"] * (words[at] == up_scaler)
        code = cli.main(words)
        shown = capsys.readouterr()
        assert code == 0, f"{line}\n{shown.err}"
        assert shown.out, line
    config = (tmp_path / "out" / "mug" / "run.toml").read_text()
    assert config.startswith("# pcs train --config run.toml") and 'class = "mug"' in config
    assert json.loads(Path("out/bench.json").read_text())[0]["seconds"] > 0
    assert Path("out/mug/concept.safetensors").is_file() and list(Path("out/pictures").glob("*.png"))
