"""Everything on a GPU: python -m benchmarks.gpu [--sections probe tests ...] [--minutes 9] [--out FOLDER]

For a machine without network that has torch, triton, numpy and pytest. Each section is a process with a limit of its
own, at most five minutes, and each row is saved as it ends: a row that raises, runs out of memory or takes its process
with it is a row that says so, and the others still run. The --out folder then holds gpu.json (every row), summary.txt
and log.txt; sections of an earlier call stay. The exit code is the number of rows that failed or were not reached, at
most 100; 143 after SIGTERM, 130 after Ctrl-C.

How long it takes on a card has not been measured; the limits together are about half an hour. --smoke runs the same
on the CPU with small shapes; its times mean nothing.

Sections
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from benchmarks.gpu import inject
from benchmarks.gpu.book import AGAIN, FAILED, LISTING, WAITING, Book, summary, unwell
from benchmarks.gpu.sections import SECTIONS

GRACE = 15.0  # seconds that a section has to stop by itself, after its limit and after SIGTERM
WORK = ROOT / "out" / "gpu-work"


class Signalled(BaseException):
    """SIGTERM or Ctrl-C: the summary is still written."""


@dataclass(frozen=True)
class Run:
    """What every section of a call is given."""

    out: Path
    work: Path
    smoke: bool
    injected: str
    grace: float = GRACE

    def command(self, section: str, seconds: float) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.gpu.section", section, "--out", str(self.out.resolve())]
        words += ["--work", str(self.work.resolve()), "--seconds", f"{seconds:.1f}"]
        return [*words, *(["--smoke"] if self.smoke else []), *(["--inject", self.injected] if self.injected else [])]

    def environment(self) -> dict[str, str]:
        """Compiled kernels stay from one call to the next; the cache of latents is the run's own."""
        found = {"TRITON_CACHE_DIR": str(self.work.resolve() / "triton"), "PCS_CACHE": str(self.work.resolve())}
        path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
        return os.environ | found | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def started(command: list[str], run: Run) -> Iterator[subprocess.Popen]:
    """A process in a group of its own that does not outlive the block, nor do its children."""
    with (run.out / "log.txt").open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        child = subprocess.Popen(command, stderr=log, cwd=ROOT, env=run.environment(), preexec_fn=os.setpgrp)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(run.grace / 3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run_section(section: str, run: Run, seconds: float) -> None:
    """Run a section to its end or its limit; a process that dies is followed by one that goes on behind its row."""
    book = Book(run.out)
    book.begin_section(section)
    if seconds <= 0:
        book.put(section, LISTING, {"status": WAITING, "said": "the time of --minutes was over"})
        return
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        said, code = "", None
        try:
            with started(run.command(section, left), run) as child:
                code = child.wait(left + run.grace)
            said = f"its process ended with signal {-code}" if code < 0 else f"its process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            said = f"did not stop {run.grace:.0f} s after the section's time was over, and was killed"
        except Signalled as stopped:
            book.read()
            book.close_running(section, str(stopped))
            raise
        book.read()
        closed = book.close_running(section, said)
        waiting = any(row["status"] == WAITING for row in book.rows(section))
        if code == 0 or (book.rows(section) and not waiting):
            return
        if not closed and code != AGAIN:  # a new process would end the same way
            if not any(row["status"] == FAILED for row in book.rows(section)):
                book.put(section, LISTING, {"status": FAILED, "said": f"{said}; log.txt has its errors"})
            return


def _signalled(number: int, *_: object) -> NoReturn:
    raise Signalled(f"stopped by {signal.Signals(number).name}")


def run_all(run: Run, sections: list[str], minutes: float | None, limit: float | None) -> int:
    """Every section in turn, then the summary, also where a signal ends it; the exit code."""
    begin, code = time.monotonic(), 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _signalled)
    try:
        for name in sections:
            left = float("inf") if minutes is None else begin + 60 * minutes - time.monotonic()
            started_at = time.monotonic()
            run_section(name, run, min(limit or SECTIONS[name].seconds, left))
            print(f"[{name}] {time.monotonic() - started_at:.0f} s in all", flush=True)
    except Signalled as stopped:
        code = 128 + (signal.SIGTERM if "SIGTERM" in str(stopped) else signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    book = Book(run.out)
    text = summary(book, sections)
    (run.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}", flush=True)
    return code or min(100, sum(unwell(book.rows(name)) for name in sections))


def has_a_gpu() -> bool:
    """Asked in a process of its own, so that this one holds nothing of the card."""
    asked = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asked]).returncode == 0


def main() -> int:
    about = (__doc__ or "") + "\n".join(f"  {name:<10}{section.about}" for name, section in SECTIONS.items())
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="folder to write to (default: out/gpu)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of concepts and compiled kernels, which stays")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these alone, in order")
    parser.add_argument("--minutes", type=float, help="over all sections; what is not reached is named")
    parser.add_argument("--limit", type=float, help="seconds of each section (default: the section's own)")
    parser.add_argument("--smoke", action="store_true", help="a short run on the CPU that says nothing about speed")
    parser.add_argument("--inject", default="", help="with --smoke: fail on purpose, such as trainer:2=memory")
    given = parser.parse_args()
    if given.inject and not given.smoke:
        parser.error("--inject needs --smoke: failures on purpose have no place in a measurement")
    try:
        inject.parsed(given.inject, list(SECTIONS))
    except ValueError as error:
        parser.error(str(error))
    if not given.smoke and not has_a_gpu():
        sys.exit("benchmarks.gpu needs a CUDA GPU and found none; --smoke runs it on the CPU")
    for folder in (given.out, given.work):
        folder.mkdir(parents=True, exist_ok=True)
    return run_all(Run(given.out, given.work, given.smoke, given.inject), given.sections, given.minutes, given.limit)


if __name__ == "__main__":
    sys.exit(main())
