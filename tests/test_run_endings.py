"""How runs end and share their work: kills, interrupts, two processes. Small runs on the embedded model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from every_case import cases
from pcs_trainer.cli import entry as cli
from pcs_trainer.concept.loading import load_concept
from pcs_trainer.training.trainer import Trainer
from trainer_cases import SMALL, cache, pictures, trainer
from warm import warm_process

from pcs_kernels.optim import loss_scale

__all__ = ["cache"]
pytestmark = pytest.mark.slow
PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


@pytest.fixture(scope="module")
def warm():
    with warm_process() as started:
        yield started


SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have been started without it
from pcs_trainer import Trainer, load_model
from pcs_trainer.tiny.subjects import photos
from pcs_trainer.training import Stop
t = Trainer(load_model("tiny"), "personalized_residuals", [p.picture for p in photos(51, 2)], class_word="mug",
            out={out!r}, steps=100000, checkpoint_every=3, keep=2, batch=1, resolution=32, check_backend=False)
with Stop() as stop:
    t.train(on_event=lambda e: print(e.kind, e.step, flush=True), should_stop=stop, resume=False)
"""


KILLS = """
import os, random, signal, time
from pathlib import Path
from pcs_trainer import Trainer, load_model
from pcs_trainer.run_folder import checkpoints
from pcs_trainer.training.checkpoint import read_checkpoint
from pcs_trainer.tiny.subjects import photos

out, moments, reached = Path({out!r}), random.Random(0), 0
model = load_model("tiny")
model.unet, model.text_encoder, model.vae, model.schedule, model.tokenizer

def child(pipe):
    t = Trainer(model, "personalized_residuals", [p.picture for p in photos(51, 2)], class_word="mug", out=out,
                steps=100000, checkpoint_every=3, keep=2, batch=1, resolution=32, check_backend=False)
    def tell(event):
        if event.kind == "step":
            os.write(pipe, b"%d\\n" % event.step)
    t.train(on_event=tell, resume=bool(checkpoints(out)))

for attempt in range(10):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            child(write)
        finally:
            os._exit(1)
    os.close(write)
    steps = os.fdopen(read)
    first = int(steps.readline())
    # the last checkpoint is at most three steps old; the step that was running when it was killed is lost too
    assert first > reached - 3, (attempt, first, reached)
    time.sleep(moments.uniform(0.0, 0.8))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    reached = max([first, *map(int, steps.read().split())])
    for folder in checkpoints(out)[-1:]:
        tensors, state = read_checkpoint(folder)
        assert tensors and state["step"] == int(folder.name[11:]) >= reached - 3, (folder, reached)
print("reached", reached)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_loses_at_most_the_steps_since_the_last_checkpoint(warm, tmp_path):
    """Ten kills at random moments of one run that is resumed each time."""
    said = warm.run(KILLS.format(out=str(tmp_path)))
    assert int(said.split()[-1]) >= 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_ends(warm, model, tmp_path, number):
    process = warm.start(SCRIPT.format(out=str(tmp_path)))
    process.wait_for("step 4\n")
    os.kill(process.pid, number)
    code, said, error = process.ends()
    rest = said.partition("step 4\n")[2]
    assert code == 0 and "stopped" in rest and "saved" in rest, error
    assert load_concept(tmp_path / "concept.safetensors", model).meta["finished"] == "0"


PARALLEL = """
import os, torch
import torch.distributed as dist
from pcs_trainer import Trainer, load_model
from pcs_trainer.tiny.subjects import photos
from pcs_kernels.optim import loss_scale
loss_scale.LossScale.__init__.__defaults__ = ({scale}, None)
model = load_model("tiny", torch.{dtype})
model.unet, model.text_encoder, model.vae, model.schedule, model.tokenizer
import pcs_trainer.distributed
pcs_trainer.distributed.ALONE = {alone}
rank = 0 if os.fork() else 1
dist.init_process_group("gloo", init_method="file://" + {meeting!r}, rank=rank, world_size=2)
for out, steps, resume in {runs!r}:
    t = Trainer(model, {method!r}, [p.picture for p in photos(51, 2)], class_word="mug", out=out, steps=steps,
                **{settings!r})
    t.train(resume=resume)
    dist.barrier()
if rank:
    os._exit(0)
assert os.wait()[1] == 0
"""
PLAIN = dict(optimizer="adamw", learning_rate=1e-4, step_in_backward=False)


def in_two_processes(
    warm,
    method: str,
    runs: list[tuple[Path, int, bool]],
    alone: int = 10**6,
    dtype="float32",
    scale: float = loss_scale.START,
    **settings,
):
    """Each (folder, steps, resume) in turn, by two processes that share the batch; each folder's concept."""
    code = PARALLEL.format(
        meeting=str(Path(tempfile.mkdtemp()) / "file"),  # nobody else's, where a free port may be another's by now
        method=method,
        runs=[(str(out), steps, resume) for out, steps, resume in runs],
        alone=alone,
        settings=SMALL | settings,
        dtype=dtype,
        scale=scale,
    )
    warm.run(code)
    return [load_concept(out / "concept.safetensors") for out in dict.fromkeys(out for out, _, _ in runs)]


def assert_same_movement(model, one, two, limit: float = 1e-2) -> None:
    base = dict(model.unet.named_parameters())
    for name, tensor in one.tensors.items():
        if name.endswith("k_proj.bias"):  # the softmax takes it away: its gradient is rounding, and AdamW follows that
            continue
        if not name.startswith("unet."):
            assert torch.allclose(two.tensors[name], tensor, atol=1e-5), name
            continue
        moved = (tensor - base[name.removeprefix("unet.")]).norm()
        assert float((two.tensors[name] - tensor).norm() / moved) < limit, name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("method", "alone", "more"),
    cases(
        (
            ("custom_diffusion", 10**6, dict(token_learning_rate=1e-5, bank=12)),
            # most convolutions gathered by themselves, as in a real model
            ("dreambooth", 10_000, dict(plan="B", train_text_encoder=True)),
        ),
        (("dreambooth", 10**6, {}), ("dreambooth", 10_000, dict(plan="checkpoint"))),
    ),
)
def test_two_processes_are_one_of_twice_the_batch(warm, model, tmp_path, method, alone, more):
    """Each holds everything and averages gradients; of a whole network each holds its part."""
    more = PLAIN | {"resolution": 32} | more
    (two,) = in_two_processes(warm, method, [(tmp_path, 3, False)], alone, batch=2, **more)
    settings = SMALL | more | dict(steps=3, batch=4)
    one = Trainer(model, method, pictures(), class_word="mug", **settings).train()
    assert_same_movement(model, one, two)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_shared_network_resumes_bit_for_bit_with_as_many_processes(warm, model, tmp_path):
    runs = [(tmp_path / "a", 2, False), (tmp_path / "b", 1, False), (tmp_path / "b", 2, True)]
    small = dict(learning_rate=1e-4, resolution=32)
    at_once, resumed = in_two_processes(warm, "dreambooth", runs, **small)
    assert all(torch.equal(at_once.tensors[n], resumed.tensors[n]) for n in at_once.tensors)
    alone = dict(out=tmp_path / "b", steps=4, **small)
    with pytest.raises(ValueError, match="processes was 2 and is 1"):
        Trainer(model, "dreambooth", pictures(), class_word="mug", **SMALL | alone).train(resume=True)


@pytest.mark.skipif(os.name == "nt", reason="gloo over sockets")
def test_the_command_line_under_torchrun(model, tmp_path):
    """Two processes, one folder: the first one writes, both resume, and the result is that of twice the batch."""
    flags = "--class mug --method custom_diffusion --no-report --quiet --optimizer adamw --lr 1e-4 --token-lr 1e-5"
    flags += " --prior-images 2 --set prior_steps=2 --set bank=12"

    def words(out: str, more: str) -> list[str]:
        return ["train", str(PHOTOS), *flags.split(), *more.split(), "--out", str(tmp_path / out)]

    # One launch for both: `pcs` twice in each of the two processes.
    lines = [words("two", "--batch 2 --steps 2"), words("two", "--batch 2 --steps 3 --resume")]
    script = tmp_path / "pcs_twice.py"
    script.write_text(f"from pcs_trainer.cli.entry import main\nassert [main(w) for w in {lines!r}] == [0, 0]\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == 2 * [str(tmp_path / "two" / "concept.safetensors")]
    assert cli.main(words("one", "--batch 4 --steps 3")) == 0
    two, one = (load_concept(tmp_path / name / "concept.safetensors") for name in ("two", "one"))
    lines = (tmp_path / "two" / "logs" / "loss.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3"]
    assert_same_movement(model, one, two)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
# At 32 pixels Custom Diffusion fits at 2^22, DreamBooth at 2^17: two steps overflow, the third trains and is saved.
@pytest.mark.parametrize(("method", "scale"), cases([("custom_diffusion", 2.0**24)], [("dreambooth", 2.0**19)]))
def test_two_processes_agree_on_the_loss_scale_of_float16(warm, tmp_path, method, scale):
    """Found together from one that overflows, kept in the checkpoint, and the training goes on in step."""
    settings = {"token_learning_rate": 1e-5, "bank": 12} if method == "custom_diffusion" else {}
    settings |= PLAIN | {"batch": 2, "dtype": "float16", "scale": scale, "learning_rate": 3e-4, "resolution": 32}
    # DreamBooth's resume is compared in float32 above: float16 takes a CPU a minute for five steps.
    last = 4 if method == "dreambooth" else 5
    runs = [(tmp_path / "b", 3, False), (tmp_path / "b", last, True)]
    runs += [(tmp_path / "a", last, False)] * (method != "dreambooth")
    later, *at_once = in_two_processes(warm, method, runs, **settings)
    saved = torch.load(tmp_path / "b" / "checkpoint-3" / "optimizer.pt", weights_only=False)
    scales = [state["scale"] for state in saved] if isinstance(saved, list) else [saved["scale"]]
    assert scales == scales[:1] * len(scales) and loss_scale.START < scales[0]["value"] < scale
    assert all(bool(x.isfinite().all()) for x in later.tensors.values())
    for other in at_once:
        assert all(torch.equal(other.tensors[n], later.tensors[n]) for n in other.tensors)


@pytest.mark.slow
def test_custom_diffusion_ends_in_16_bits_although_its_values_train_in_float32(tmp_path):
    from pcs_trainer import load_model

    model = load_model("tiny", dtype=torch.bfloat16)
    events = []
    trainer(model, "custom_diffusion", tmp_path, steps=3).train(on_event=events.append)
    assert events[-1].kind == "done" and (tmp_path / "concept.safetensors").is_file()


def test_a_log_goes_on_by_the_steps_numbers_where_some_were_skipped(tmp_path):
    from pcs_trainer.methods import settings_for
    from pcs_trainer.training.log import Log

    (tmp_path / "logs").mkdir()
    rows = [f"{step},1,1,1,,,1e-3,1" for step in (1, 4, 5, 6, 7)]  # 2 and 3 were skipped; the checkpoint is of 5
    (tmp_path / "logs" / "loss.csv").write_text("\n".join(["step", *rows]) + "\n")
    with Log(tmp_path, settings_for(None, "dreambooth", class_word="mug"), 5, print):
        pass
    lines = (tmp_path / "logs" / "loss.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "4", "5"]
