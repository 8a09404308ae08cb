"""The flags of diffusers' scripts and of sd-scripts: they mean the same here."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from pcs_trainer.cli import entry as cli
from pcs_trainer.cli.commands import command
from pcs_trainer.cli.commands.common import filled
from pcs_trainer.cli.commands.train_flags import overrides
from pcs_trainer.cli.config import effective, read_config
from pcs_trainer.cli.options import parse
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.errors import UsageError
from pcs_trainer.training.optimizer import Stepper
from trainer_cases import cache, trainer

__all__ = ["cache"]

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


def test_the_flags_of_other_trainers_mean_the_same():
    ours = (
        "PHOTOS --token sks --class dog --identifier rare --prompt {p} --model m --out o --steps 7 --batch 2 --lr 1e-4"
    )
    ours = [w.replace("{p}", "a photo of {subject}") for w in (ours + " --rank 8 --resume --dtype bfloat16").split()]
    theirs = shlex.split(
        "--instance_data_dir PHOTOS --instance_prompt='a photo of sks dog' --pretrained_model_name_or_path m "
        "--output_dir o --max_train_steps 7 --train_batch_size=2 --learning_rate 1e-4 --network_dim 8 "
        "--resume_from_checkpoint latest --mixed_precision bf16 --use_8bit_adam --gradient_checkpointing"
    )
    a, b = vars(parse(command("train"), ours)), vars(parse(command("train"), theirs))
    notes = b.pop("notes")
    assert a.pop("notes") == [] and a == b
    assert len(notes) == 2 and "not needed" in notes[0]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a photo of sks dog", {"token": "sks", "class_word": "dog", "prompt": "a photo of {subject}"}),
        ("photo of a <new1> cat", {"token": "<new1>", "class_word": "cat", "prompt": "photo of a {subject}"}),
        ("a zxq mug", {"token": "zxq", "class_word": "mug", "prompt": "a {subject}"}),
        ("a photo of a dog", {"class_word": "dog", "prompt": "a photo of a {subject}"}),
        ("my {subject}", {"prompt": "my {subject}"}),
    ],
)
def test_an_instance_prompt_is_taken_apart(prompt, words):
    found = vars(parse(command("train"), ["--instance_prompt", prompt]))
    assert {k: v for k, v in found.items() if k not in ("notes", "identifier")} == words


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "sample x --height 512 --width 768",
            "--height 512 and --width 768 are both --size, which has one value: pictures are square here",
        ),
        ("sample x --size=512 --resolution 768", "--size 512 and --resolution 768 are both --size"),
        (
            "train p --learning_rate 1e-4 --lr 2e-4",
            "--learning_rate 1e-4 and --lr 2e-4 are both --lr, which has one value. Fix: give one of them",
        ),
        ("train p --dtype float32 --mixed_precision fp16", "--dtype float32 and --mixed_precision fp16 are both"),
    ],
)
def test_two_names_of_one_flag_say_one_thing(line, says):
    name, *words = line.split()
    with pytest.raises(UsageError) as error:
        parse(command(name), words)
    assert says in str(error.value)


def test_names_that_say_the_same_and_repeats_of_one_are_taken():
    assert parse(command("sample"), ["x", "--height", "512", "--width", "512"]).size == 512
    assert parse(command("train"), ["p", "--lr", "1e-4", "--learning-rate", "0.0001"]).lr == 1e-4
    assert parse(command("sample"), ["x", "--height", "512", "--width", "768", "--height=768"]).size == 768
    assert parse(command("train"), ["p", "--lr-warmup-steps", "4", "--lr_warmup_steps", "5"]).warmup == 5
    found = parse(command("train"), ["p", "--validation_prompt", "a", "--preview", "b"])
    assert found.preview == ["a", "b"]  # one that may be repeated takes both


def test_a_constant_schedule_warms_up_where_steps_are_given(model):
    """diffusers' "constant" leaves --lr_warmup_steps out; its "constant_with_warmup" takes its first step at 0."""
    from diffusers.optimization import get_scheduler

    flags = ["p", "--lr_scheduler", "constant", "--lr_warmup_steps", "4", "--max_train_steps", "6"]
    chosen = overrides(effective(command("train"), parse(command("train"), flags)))
    t = trainer(model, "personalized_residuals", **chosen)
    stepper = Stepper(t.learner, t.settings)
    found = [stepper.factor(step) for step in range(6)]
    t.learner.restore()
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]

    def theirs(name):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        return get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=6).lr_lambdas[0]

    assert [theirs("constant")(step) for step in range(6)] == [1.0] * 6
    assert [theirs("constant_with_warmup")(step) for step in range(1, 7)] == found


def test_what_is_not_needed_says_what_is_so():
    notes = parse(command("train"), ["p", "--center_crop"]).notes
    assert notes == ["--center_crop is not needed: photos are cropped from the center by default (--crop)"]


@pytest.mark.slow
def test_a_list_of_concepts_is_learned_together(tmp_path, capsys):
    file = tmp_path / "concepts.json"
    folders = [tmp_path / name for name in ("dog", "cat")]
    for folder in folders:
        shutil.copytree(PHOTOS, folder)
    dog = {"instance_data_dir": str(folders[0]), "instance_prompt": "a photo of sks dog", "class_data_dir": "y"}
    cat = {"instance_data_dir": str(folders[1]), "instance_prompt": "a photo of <tom> cat"}
    file.write_text(json.dumps([dog]))
    found = parse(command("train"), ["--concepts_list", str(file)])
    assert found.photos == [str(folders[0])] and found.prior_folder == ["y"] and found.token == "sks"
    file.write_text(json.dumps([dog, cat]))
    with pytest.raises(UsageError, match="some have none"):
        parse(command("train"), ["--concepts_list", str(file)])
    del dog["class_data_dir"]
    file.write_text(json.dumps([dog, cat]))
    shared = "--method custom_diffusion --steps 1 --batch 2 --prior-images 2 --no-report --quiet"
    assert cli.main(["train", "--concepts_list", str(file), *shared.split(), "--out", str(tmp_path / "both")]) == 0
    capsys.readouterr()
    concept = load_concept(tmp_path / "both" / "concept.safetensors")
    assert set(concept.words) == {"<tom>"}  # sks is a rare word of the tokenizer
    assert filled("a {} and a {}", [concept]) == "a sks dog and a <tom> cat"
    assert filled("a {}", [concept]) == "a sks dog and <tom> cat"
    with pytest.raises(UsageError, match="expected FOLDER=WORD"):
        parse(command("train"), ["x", "--with", "cats"])


@pytest.mark.parametrize("line", ["--learning_rate 1e-4 --unet_lr 2e-4", "--unet_lr=2e-4 --learning_rate 1e-4"])
def test_the_unets_rate_wins_over_the_general_one_as_in_sd_scripts(line, tmp_path):
    assert parse(command("train"), ["p", "--class", "mug", *line.split()]).lr == 2e-4
    file = tmp_path / "run.toml"
    pairs = [
        (name.lstrip("-"), value) for name, value in (part.split(" ") for part in line.replace("=", " ").split(" --"))
    ]
    file.write_text("[train]\n" + "".join(f"{name} = {value}\n" for name, value in pairs))
    assert read_config(file, command("train"))["lr"] == 2e-4


def test_one_folder_may_be_written_in_two_ways():
    assert parse(command("train"), ["p", "--class", "mug", "--output_dir", "a", "--out", "./a/"]).out == "./a/"
