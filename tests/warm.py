"""Processes that start in no time: forks of one that has imported everything and has done nothing else yet.

A test that wants a process of its own (to be killed, to be one of two) wants no import of torch and diffusers with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVER = """
import json, os, sys, traceback
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
import torch.distributed.fsdp
from pcs_trainer import Trainer, load_model
model = load_model("tiny")
model.unet, model.text_encoder, model.vae, model.schedule, model.tokenizer
del model
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), number)
        failed = True
        try:
            exec(compile(job["code"], "<the job>", "exec"), {{"__name__": "__main__"}})
            failed = False
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(failed)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Job:
    """A fork that runs some code; its output goes into files."""

    server: subprocess.Popen
    pid: int
    folder: Path

    def said(self) -> str:
        return (self.folder / "out").read_text() if (self.folder / "out").exists() else ""

    def wait_for(self, text: str, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < until, f"never said {text!r}: {self.said()}\n{(self.folder / 'err').read_text()}"
            time.sleep(0.01)

    def ends(self) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        code = int(self.server.stdout.readline())
        return code, self.said(), (self.folder / "err").read_text()


@dataclass
class Warm:
    """The process that forks; one job at a time."""

    server: subprocess.Popen

    def start(self, code: str) -> Job:
        folder = Path(tempfile.mkdtemp())
        job = {"code": code, "out": str(folder / "out"), "err": str(folder / "err")}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return Job(self.server, int(self.server.stdout.readline()), folder)

    def run(self, code: str) -> str:
        """What the code prints; it must not fail."""
        status, out, err = self.start(code).ends()
        assert status == 0, err[-3000:]
        return out


@contextmanager
def warm_process() -> Iterator[Warm]:
    code = SERVER.format(path=[p for p in sys.path if p])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        yield Warm(server)
        server.stdin.close()
        assert server.wait(timeout=60) == 0
