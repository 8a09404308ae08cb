"""python -m benchmarks.gpu keeps every other row, whatever a row, its process or the machine does."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import (
    commands,
    headline,
    inject,
    methods,
    ops,
    probe,
    rehearsed,
    section,
    steps,
    tools,
)
from benchmarks.gpu.book import ABSENT, AGAIN, DONE, FAILED, LISTING, WAITING, Book, summary, unwell
from benchmarks.gpu.row import Absent, Machine, Row, Stopped
from benchmarks.gpu.sections import SECTIONS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """As in a section: what is there before its rows is not looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


def machine(folder, seconds=300.0):
    return Machine(folder, folder / "work", True, time.monotonic() + seconds)


def ended(folder, rows, injected=(), seconds=300.0):
    """(exit code, {row: what became of it}) of a section of these rows."""
    book = Book(folder)
    book.plan_rows("steps", {}, [row.name for row in rows])
    code = section.run_rows("steps", rows, machine(folder, seconds), book, injected)
    return code, {row["row"]: row for row in Book(folder).rows("steps")}


def good(name="good"):
    return Row(name, lambda m: {"seconds": 1.5, "said": "well"})


def raising(error, name="bad"):
    def run(m):
        raise error

    return Row(name, run)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    (
        (RuntimeError("CUDA error:\n an illegal access"), FAILED, "CUDA error: an illegal access"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), FAILED, "OutOfMemoryError: CUDA out of memory"),
        (SystemExit(3), FAILED, "SystemExit: 3"),
        (ModuleNotFoundError("No module named 'diffusers'", name="diffusers"), ABSENT, "diffusers is not installed"),
        (ModuleNotFoundError("No module named 'pcs_x'", name="pcs_x"), FAILED, "ModuleNotFoundError: No module"),
        (ImportError("cannot import name 'a' from 'diffusers'"), FAILED, "ImportError: cannot import name"),
        (Absent("git is not on the PATH"), ABSENT, "git is not on the PATH"),
    ),
    ids=lambda value: type(value).__name__,
)
def test_a_row_that_fails_says_why_and_the_others_run(tmp_path, error, status, said):
    code, found = ended(tmp_path, [good("first"), raising(error), good("last")])
    assert code == 0 and found["bad"]["status"] == status and found["bad"]["said"].startswith(said)
    assert found["first"]["status"] == found["last"]["status"] == DONE and found["last"]["seconds"] == 1.5


def test_a_section_stops_itself_at_its_limit_and_names_what_was_not_reached(tmp_path):
    slow = Row("slow", lambda m: time.sleep(60))
    begin = time.monotonic()
    code, found = ended(tmp_path, [good("first"), slow, good("last")], seconds=4)
    assert code == 0 and time.monotonic() - begin < 40
    assert [found[name]["status"] for name in ("first", "slow", "last")] == [DONE, FAILED, WAITING]
    assert "the section's time was over" in found["slow"]["said"]
    assert unwell(Book(tmp_path).rows("steps")) == 2
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_lost_context_asks_for_a_new_process_that_goes_on_behind_the_row(tmp_path, monkeypatch):
    monkeypatch.setattr(inject, "LOST", [])
    rows = [good("first"), good("second"), good("third")]
    code, found = ended(tmp_path, rows, [("steps", 2, "lost")])
    assert code == AGAIN and found["second"]["status"] == FAILED and found["third"]["status"] == WAITING
    monkeypatch.setattr(inject, "LOST", [])
    book = Book(tmp_path)
    assert section.run_rows("steps", rows, machine(tmp_path), book) == 0
    assert [row["status"] for row in book.rows("steps")] == [DONE, FAILED, DONE]


def test_a_signal_in_a_row_is_that_rows_failure_and_ends_the_section(tmp_path):
    with pytest.raises(Stopped):
        ended(tmp_path, [good("first"), raising(Stopped("stopped by SIGTERM")), good("last")])
    assert [row["status"] for row in Book(tmp_path).rows("steps")] == [DONE, FAILED, WAITING]


def test_a_section_that_cannot_be_listed_is_a_row(tmp_path, monkeypatch):
    def broken(name, smoke):
        raise ImportError("no such kernel")

    monkeypatch.setattr(section, "rows_of", broken)
    with pytest.raises(ImportError):
        section.run("steps", machine(tmp_path))
    assert Book(tmp_path).rows("steps") == [{"row": LISTING, "status": FAILED, "said": "ImportError: no such kernel"}]


def test_the_book_is_whole_when_writing_it_fails(tmp_path, monkeypatch):
    book = Book(tmp_path)
    book.plan_rows("steps", {"commit": "abc"}, ["a", "b"])
    before = book.path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        book.put("steps", "a", {"status": DONE})
    assert book.path.read_bytes() == before


class Stub(gpu.Run):
    """Runs a script in place of a section; {book} is the results' folder."""

    def __init__(self, folder, script):
        super().__init__(folder, folder, True, "", grace=1.0)
        path = folder / "section.py"
        begin = "import os, signal, sys, time\nfrom pathlib import Path\nfrom benchmarks.gpu.book import *\n"
        path.write_text(f"{begin}book = Book(Path({str(folder)!r}))\n{script}")

    def command(self, section, seconds):
        return [sys.executable, str(self.out / "section.py")]


BEGINS = """
if not book.rows("steps"):
    book.plan_rows("steps", {}, ["a", "b", "c"])
    book.put("steps", "a", {"status": DONE})
    book.put("steps", "b", {"status": RUNNING})
    AT_FIRST
book.put("steps", "c", {"status": DONE})
"""


@pytest.mark.parametrize(
    ("at_first", "said"),
    (
        ("os.kill(os.getpid(), signal.SIGKILL)", "its process ended with signal 9"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its process ended with signal 11"),
        ("sys.exit(3)", "its process ended with exit code 3"),
    ),
)
def test_a_process_that_dies_in_a_row_is_followed_by_one_that_goes_on(tmp_path, at_first, said):
    gpu.run_section("steps", Stub(tmp_path, BEGINS.replace("AT_FIRST", at_first)), 60)
    found = {row["row"]: row for row in Book(tmp_path).rows("steps")}
    assert [found[name]["status"] for name in "abc"] == [DONE, FAILED, DONE]
    assert found["b"]["said"] == said


def test_a_process_that_never_returns_is_killed_behind_its_limit(tmp_path):
    script = BEGINS.replace("AT_FIRST", "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)")
    begin = time.monotonic()
    gpu.run_section("steps", Stub(tmp_path, script), 3)
    assert time.monotonic() - begin < 30
    found = {row["row"]: row for row in Book(tmp_path).rows("steps")}
    assert [found[name]["status"] for name in "abc"] == [DONE, FAILED, WAITING]
    assert "was killed" in found["b"]["said"]


def test_a_process_that_dies_before_its_rows_is_not_started_for_ever(tmp_path):
    gpu.run_section("steps", Stub(tmp_path, "sys.exit(4)"), 60)
    (only,) = Book(tmp_path).rows("steps")
    assert only["row"] == LISTING and only["status"] == FAILED and "exit code 4; log.txt" in only["said"]


def test_sigterm_ends_with_a_summary(tmp_path, monkeypatch, capsys):
    """The row that ran is failed, what came before is kept, and the exit code is the signal's."""
    kill = f"os.kill({os.getpid()}, signal.SIGTERM); time.sleep(100)"
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        code = gpu.run_all(Stub(tmp_path, BEGINS.replace("AT_FIRST", kill)), ["steps", "ops"], None, 60)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert code == 128 + signal.SIGTERM
    said = (tmp_path / "summary.txt").read_text()
    assert "b: failed: stopped by SIGTERM" in said and "ops: not begun" in said and said in capsys.readouterr().out


def test_the_exit_code_is_the_number_of_rows_without_a_result(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    script = 'book.plan_rows("steps", {}, ["a", "b", "c"])\nbook.put("steps", "a", {"status": FAILED, "said": "no"})'
    try:
        assert gpu.run_all(Stub(tmp_path, script), ["steps"], None, 60) == 3
        assert gpu.run_all(Stub(tmp_path, script), ["steps"], 0, 60) == 1, "a section that --minutes leaves no time for"
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert "1 rows failed or were not reached" in summary(Book(tmp_path), ["steps"])


def test_injected_failures_need_smoke_and_are_spelled_right(capsys, monkeypatch):
    assert inject.parsed("steps:2=memory,no-diffusers,ops", list(SECTIONS)) == [
        ("steps", 2, "memory"),
        ("", 0, "diffusers"),
        ("ops", 0, "error"),
    ]
    with pytest.raises(ValueError, match="'step:2'"):
        inject.parsed("step:2", list(SECTIONS))
    for words, said in ((["--inject", "ops"], "needs --smoke"), (["--smoke", "--inject", "x"], "kinds: error")):
        monkeypatch.setattr(sys, "argv", ["gpu", *words])
        with pytest.raises(SystemExit):
            gpu.main()
        assert said in capsys.readouterr().err


def test_without_git_a_compiler_or_nvidias_tools_rows_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert timing.commit() == "unknown"
    _, found = ended(tmp_path, [*probe.rows(True)[:4], *tools.rows(True)])
    missing = ("nvidia smi", "compiler", "git", "compute-sanitizer memcheck", "ncu adamw8bit")
    assert all(found[name]["status"] == ABSENT and "on the PATH" in found[name]["said"] for name in missing), found


def test_without_diffusers_every_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", sys.modules.get("diffusers"))  # put back afterwards
    inject.hide_packages(inject.parsed("no-diffusers", list(SECTIONS)))
    code, found = ended(tmp_path, commands.rows(True))
    assert code == 0 and {row["status"] for row in found.values()} == {ABSENT}
    assert all("diffusers is not installed" in row["said"] for row in found.values())


def test_no_model_outlives_its_row(tmp_path):
    """Hooks and their parameters, scenes and their closures are cycles: the next row's peak must not hold them."""
    kept = []

    def run(m):
        real = rehearsed.rehearsed(m, "small", "dreambooth", 1)
        real.step()
        kept.append(weakref.ref(real.unet))
        raise RuntimeError("with the model in the traceback")

    ended(tmp_path, [Row("holds", run)])
    assert len(kept) == 1 and kept[0]() is None


def test_networks_are_made_in_the_training_dtype_at_once():
    """A float32 copy would be the row's peak, and above the caps."""
    largest = []
    mode = type("Watch", (torch.utils._python_dispatch.TorchDispatchMode,), {})

    def watch(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu" and out.dtype == torch.float32:
            largest.append(out.numel())
        return out

    mode.__torch_dispatch__ = watch
    given = Machine(Path(), Path(), False, 0.0)
    object.__setattr__(given, "__class__", type("OnCpu", (Machine,), {"device": "cpu"}))
    with mode():
        real = rehearsed.rehearsed(given, "small", "personalized_residuals", 1)
    assert real.dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for p in real.unet.parameters())
    assert max(largest) < max(p.numel() for p in real.unet.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("part", (probe, commands, steps, ops, methods, headline), ids=lambda m: m.__name__[15:])
def test_every_line_of_a_section_runs_on_the_cpu(part, tmp_path, monkeypatch):
    monkeypatch.setenv("PCS_CACHE", str(tmp_path / "cache"))
    code, found = ended(tmp_path, part.rows(True))
    bad = {name: row for name, row in found.items() if row["status"] not in (DONE, ABSENT)}
    assert code == 0 and not bad
    assert sum(row["status"] == DONE for row in found.values()) >= 2


@pytest.mark.slow
def test_injected_failures_leave_every_other_row(tmp_path):
    """The whole command: a row that kills its process, one out of memory, one that raises."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--sections", "steps"]
    command += ["--inject", "steps:1=die,steps:3=memory,steps:5,no-xformers"]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert ran.returncode == 3, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["sections"]
    assert [row["status"] for row in found["steps"]["rows"]] == [FAILED, ABSENT, FAILED, DONE, FAILED]
    said = [row.get("said", "") for row in found["steps"]["rows"]]
    assert "signal 9" in said[0] and "out of memory" in said[2] and "injected: the row raises" in said[4]
    assert found["steps"]["machine"]["torch"] == torch.__version__
    assert "Traceback" in (tmp_path / "out" / "log.txt").read_text()
