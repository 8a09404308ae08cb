"""What runs on which card, with the card's answers put in place of a GPU: capability, count, ROCm, the first launch."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here; its reasons cannot be asked")

from pcs_kernels import _fallback, _launch, _probe
from pcs_kernels._dispatch import OPS, BackendUnavailable
from pcs_kernels.ops.self_attention import op as attention

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A function that puts a card in place: its capability, its multiprocessors, and what its first launch says."""
    _launch._cuda_arch.cache_clear()
    monkeypatch.setattr(_fallback, "_told", set())

    def put(capability=(8, 6), multiprocessors=84, first_launch=None, hip=None, name=""):
        facts = types.SimpleNamespace(multi_processor_count=multiprocessors, gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(_probe, "_found", {0: first_launch})
        monkeypatch.setattr(attention, "xformers_reason", lambda kind: "not installed")

    yield put
    _launch._cuda_arch.cache_clear()


ATTENTION = [
    ((7, 5), torch.float32, 40, "sdpa"),  # Triton multiplies no matrices there
    ((8, 6), torch.float32, 40, "op"),
    ((8, 6), torch.float32, 320, "sdpa"),  # wider than the Triton kernel's heads
    ((8, 6), torch.float64, 40, "sdpa"),
    ((7, 5), torch.float16, 40, "sdpa"),
    ((7, 5), torch.float16, 36, "sdpa"),  # no flash kernel for this width: torch's other ones
    ((8, 6), torch.bfloat16, 40, "sdpa"),
]


@pytest.mark.parametrize("capability, dtype, width, runs", ATTENTION)
def test_no_gpu_gets_self_attentions_reference(capability, dtype, width, runs, card):
    """The reference stores all N x N scores; where no kernel of ours runs, torch's attention does."""
    card(capability)
    assert attention.backend_of(CUDA, dtype, width) == runs
    for kind in ("xpu", "mps"):
        assert attention.backend_of(torch.device(kind), dtype, width) == "sdpa"


def test_where_no_kernel_can_be_launched_torchs_attention_runs(card):
    card(first_launch=_fallback.Fault("Triton cannot build and launch a kernel here (no C compiler). Fix: gcc"))
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        assert attention.backend_of(CUDA, torch.float32, 40) == "sdpa"


def test_real_cards_count_their_own_multiprocessors(card):
    """An RTX 3060 has 28 where its architecture's table says 84: the tiles stay as large as they can be."""
    card((8, 6), multiprocessors=28)
    arch = _launch.current_arch(CUDA)
    assert arch == 86 and _launch.processors(arch) == 28 and _launch.processors(86) == 84
    from pcs_kernels.ops.lowrank_residual import triton_impl as lowrank

    call = (1, 1024, 320, 16)
    assert lowrank.launch_config(*call, arch, lowrank.Kernel.PRODUCT)["BLOCK_M"] == 128
    assert lowrank.launch_config(*call, 86, lowrank.Kernel.PRODUCT)["BLOCK_M"] < 128
    with _launch.recording(86):
        assert _launch.processors(_launch.current_arch(CUDA)) == 84, "a recording is of the tabled card"


@pytest.mark.parametrize(
    "name, arch",
    [
        ("gfx942:sramecc+:xnack-", 0x942),
        ("gfx90a:sramecc+", 0x90A),
        ("gfx1100", 0x1100),
        ("gfx1030", 0x1030),
        ("gfx950", 0x942),
        ("gfx1036", 0x1030),
        ("gfx1201", 0x1100),
        ("gfx906", 0x90A),
    ],
)
def test_amd_cards_are_not_read_as_nvidias(name, arch, card):
    """gfx1100 reports the capability (11, 0), which would be NVIDIA's sm_100 and its 227 KiB."""
    card((11, 0), multiprocessors=48, hip="6.4", name=name)
    found = _launch.current_arch(CUDA)
    assert found == arch and _launch.processors(found) == 48
    assert _launch.SHARED_LIMIT[found] == 64 * 1024
    reason = _launch.unavailable_for(CUDA, torch.float16, dots=True)
    assert reason == (
        None if arch != 0x1030 else "gfx1030 is unsupported: it has no matrix instructions; use the reference"
    )
    assert _launch.unavailable_for(CUDA, torch.float16, dots=False) is None


def test_on_rocm_the_reference_runs_and_triton_where_it_is_asked_for():
    """In a process of its own: which backend comes first is settled at the import."""
    code = (
        "import torch; torch.version.hip = '6.4.1'; from pcs_kernels import _dispatch, diagnostics;"
        "import types; triton = types.SimpleNamespace(reason=lambda *args: None);"
        "op = _dispatch.OPS['geglu']; op._modules['triton'] = triton;"
        "assert op.select('', 'cuda').__name__.endswith('reference');"
        "assert op.select('triton', 'cuda') is triton;"
        "from pcs_kernels.ops.self_attention.op import backend_of;"
        "assert backend_of(torch.device('cuda'), torch.float32, 40) == 'sdpa';"
        "print(diagnostics.triton_reason())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "ROCm 6.4.1" in ran.stdout and "PCS_BACKEND=triton" in ran.stdout


class Launched:
    """A stand-in for the probe's kernel: what its launch does, and how often it was asked."""

    def __init__(self, does):
        self.does, self.times = does, 0

    def __getitem__(self, grid):
        return self

    def __call__(self, out, value):
        self.times += 1
        if isinstance(self.does, Exception):
            raise self.does
        out.fill_(self.does)


@pytest.fixture
def first_launch(monkeypatch, card):
    """A function that lets the first launch on a card do this; tensors lie on the CPU in truth."""

    def put(does) -> Launched:
        card()
        kernel = Launched(does)
        zeros = torch.zeros
        monkeypatch.setattr(_probe, "_found", {})
        monkeypatch.setattr(_probe, "probe_kernel", kernel)
        monkeypatch.setattr(torch, "zeros", lambda *size, device, **kind: zeros(*size, **kind))
        monkeypatch.setattr(torch.cuda, "device", lambda index: warnings.catch_warnings())
        return kernel

    return put


NO_COMPILER = RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set triton.knobs")
STAGES = [
    (NO_COMPILER, None, "install a C compiler"),
    (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), "gcc", "python3-dev"),
    (RuntimeError("Cannot find ptxas"), "gcc", "reinstall triton"),
    (
        RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
        "gcc",
        "driver",
    ),
    (OSError("libcuda.so cannot be opened"), "gcc", "printed above"),
    (7, "gcc", "wrote 7"),
]


@pytest.mark.parametrize("does, compiler, fix", STAGES)
def test_a_first_launch_that_fails_is_a_reason_asked_for_once(does, compiler, fix, first_launch, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_probe.shutil, "which", lambda name: compiler if name == compiler else None)
    monkeypatch.setattr(_probe.os.path, "exists", lambda path: "python3-dev" not in fix)
    kernel = first_launch(does)
    geglu, x = OPS["geglu"], types.SimpleNamespace(device=CUDA, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="triton backend fails on this machine and plain torch runs") as told:
        for _ in range(3):
            assert geglu.select("", "cuda", x).__name__.endswith("reference")
    assert kernel.times == 1 and len(told) == 1
    reason = geglu.why_not("triton", x)
    assert reason is not None and fix in reason and "\n" not in reason
    with pytest.raises(BackendUnavailable, match="geglu"):
        geglu.select("triton", "cuda", x)


def test_a_first_launch_that_works_is_made_once(first_launch):
    kernel = first_launch(_probe.WRITTEN)
    for dots in (True, False, True):
        assert _launch.unavailable_for(CUDA, torch.bfloat16, dots) is None
    assert kernel.times == 1


def test_nothing_is_launched_where_nothing_may_be(first_launch, monkeypatch):
    """Not for a recording, under fake tensors, in a graph's capture or in the interpreter; it is asked anew after."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernel = first_launch(NO_COMPILER)
    with _launch.recording(86):
        assert _launch.unavailable_for(CUDA, torch.float32, dots=False) is None
        assert _launch.unavailable_for(torch.device("meta"), torch.float32, dots=False) is None
    with FakeTensorMode():
        assert _launch.unavailable_for(CUDA, torch.float32, dots=False) is None
    with monkeypatch.context() as inside:
        inside.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert _launch.unavailable_for(CUDA, torch.float32, dots=False) is None
    with monkeypatch.context() as inside:
        inside.setattr(_launch, "INTERPRETED", True)
        assert _launch.unavailable_for(CUDA, torch.float32, dots=False) is None
    assert kernel.times == 0
    assert "C compiler" in str(_launch.unavailable_for(CUDA, torch.float32, dots=False))


def test_running_out_of_memory_says_nothing_of_triton(first_launch):
    kernel = first_launch(torch.OutOfMemoryError("CUDA out of memory"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            _launch.unavailable_for(CUDA, torch.float32, dots=False)
    assert kernel.times == 2
