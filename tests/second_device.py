"""A second device without a GPU: tensors in the CPU's memory that refuse to meet a CPU tensor, as a GPU's do.

`torch.device("second")` is torch's PrivateUse1 device, registered from Python. Its tensors wrap a CPU tensor and
compute with it, so that values, control flow and gradients are real; what GPUs refuse is an error here too:

    tensors of both devices in one operation, but for 0-dim CPU tensors in pointwise operations and CPU indices into a
    tensor of the device; a CPU generator for random numbers made on the device; .numpy() without .cpu(); and float64,
    which Apple's GPUs and many of Intel's do not have.

The product's own operations are run on the wrapped tensors, by the backend that a device other than CPU and CUDA gets.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import cache

import pytest
import torch
from pcs_trainer import load_model
from pcs_trainer.model.sources import TINY
from pcs_trainer.unet.unet import UNet
from safetensors.torch import save_file

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register
except ImportError:
    pytest.skip("this version of torch registers no device from Python", allow_module_level=True)

NAME = "second"
register(NAME)
# Other tests of the process save and restore the random state of every device that torch knows.
torch.second.get_rng_state = lambda *_: torch.get_rng_state()
torch.second.set_rng_state = lambda *_: None
DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")
PRIVATE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
aten = torch.ops.aten
MOVES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Not tagged as pointwise, but they take a 0-dim CPU tensor beside a GPU's: they read its value.
TAKE_SCALARS = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
RESHAPED_IN_PLACE = {"resize_", "set_", "squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_", "swapaxes_"}
calls: Counter[str] = Counter()  # of the product's operations, by name
# What makes a host wait for a GPU: reading a value, or a size that depends on values. And copies from the host, for
# which it waits where they do not come from pinned memory, and which no CUDA graph can hold.
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}
READS |= {aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default}
waits: list[str] = []  # operations for which the host would have waited, while it was `watching`
copies: list[str] = []  # operations that took values from the host's memory
late: list[Exception] = []  # of a running backward: raised there, they would abort the process in torch's stream guard


def refuse(error):
    """Raise an error, or keep it until the backward that runs is over."""
    if torch._C._current_graph_task_id() == -1:
        raise error
    late.append(error)


def raise_late():
    if late:
        first = late[0]
        late.clear()
        raise first


def _kept(hook):
    """A hook whose errors are kept until its backward is over."""

    def run(x):
        try:
            return hook(x)
        except Exception as error:
            late.append(error)
            return None

    return run


class Second(torch.Tensor):
    """A tensor of the second device; `held` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        if held.dtype == torch.float64:
            refuse(TypeError("the second device has no float64"))
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self):
        return f"Second({self.held!r})"

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held  # torch takes the memory over and does not tell Python

    def backward(self, *args, **options):
        torch.Tensor.backward(self, *args, **options)
        raise_late()

    def register_hook(self, hook):
        return torch.Tensor.register_hook(self, _kept(hook))

    def register_post_accumulate_grad_hook(self, hook):
        return torch.Tensor.register_post_accumulate_grad_hook(self, _kept(hook))

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        waits.append("tolist")
        return self.held.tolist()  # torch copies a GPU's tensor, and refuses a subclass

    def __deepcopy__(self, memo):
        copied = self.detach().clone()
        copied = torch.nn.Parameter(copied, self.requires_grad) if getattr(self, "_is_param", False) else copied
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)  # as torch.load(map_location="cpu") gives a GPU's tensor back

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        facts = _facts(func)
        if facts.ours:
            calls[facts.ours] += 1
            return func.redispatch(PRIVATE, *args, **kwargs)
        if func in READS:
            waits.append(facts.name)
        foreign: list[torch.Tensor] = []
        held = [_held(x, foreign) for x in args]
        held_kwargs = {name: _held(x, foreign) for name, x in kwargs.items()}
        if foreign or facts.reshapes or "generator" in kwargs:
            _check(func, facts, args, kwargs, foreign)
        if foreign and (func in MOVES or func in INDEXED):
            copies.append(facts.name)
        place = kwargs.get("device")
        if place is not None:
            held_kwargs["device"] = CPU
            if torch.device(place).type != NAME:
                waits.append(facts.name)
                result = func(*held, **held_kwargs | {"device": place})
                return result.clone() if any(result is x for x in held) else result
        out = func(*held, **held_kwargs)
        if facts.written:
            given = [kwargs[name] if name in kwargs else args[i] for i, name in facts.written]
            return given[0] if len(given) == 1 else tuple(given)
        return _wrapped(out)


class _Facts:
    """What an operation's schema says: whose it is, whether it takes 0-dim CPU tensors, what it writes and returns."""

    def __init__(self, func):
        schema = func._schema
        space, _, self.name = schema.name.partition("::")
        self.ours = self.name if space == "pcs_kernels" else ""
        self.reshapes = self.name in RESHAPED_IN_PLACE
        self.mutable = schema.is_mutable
        foreach = self.name.startswith("_foreach_")
        self.scalars = torch.Tag.pointwise in func.tags or func in TAKE_SCALARS or foreach
        returned = schema.returns and all(_is_written(r) for r in schema.returns)
        self.written = [(i, a.name) for i, a in enumerate(schema.arguments) if _is_written(a)] if returned else []


def _is_written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


_facts = cache(_Facts)


def _held(x, foreign):
    """An argument with CPU tensors in place of the device's; the CPU's own are noted."""
    if isinstance(x, Second):
        return x.held
    if isinstance(x, torch.Tensor):
        foreign.append(x)
        return x
    return [_held(y, foreign) for y in x] if isinstance(x, (list, tuple)) else x


def _wrapped(x):
    if isinstance(x, torch.Tensor):
        return Second(x)
    return type(x)([_wrapped(y) for y in x]) if isinstance(x, (list, tuple)) else x


def _check(func, facts, args, kwargs, foreign):
    """Raise for what a GPU refuses, in torch's words. At least one other argument is of the device."""
    if facts.reshapes:
        raise NotImplementedError(f"{facts.name} on the second device: the wrapper's shape would not follow")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        found = generator.device.type
        refuse(RuntimeError(f"{facts.name}: Expected a '{NAME}' device type for generator but found '{found}'"))
    if not foreign or func in MOVES:
        return
    if func in INDEXED and isinstance(args[0], Second) and (len(args) < 3 or isinstance(args[2], Second)):
        return
    writes_foreign = facts.mutable and isinstance(args[0], torch.Tensor) and not isinstance(args[0], Second)
    if facts.scalars and not writes_foreign and all(x.dim() == 0 for x in foreign):
        return
    shapes = [tuple(x.shape) for x in foreign]
    refuse(RuntimeError(f"{facts.name}: Expected all tensors to be on the same device, but found {shapes} on the CPU"))


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Second(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Second(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(self, dst, non_blocking=False):
    """What torch.tensor(..., device="second") ends in: it passes Python's dispatch by."""
    (copies if isinstance(dst, Second) else waits).append("_copy_from")
    getattr(dst, "held", dst).copy_(getattr(self, "held", self))
    return dst


_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")


@pytest.fixture(autouse=True)
def one_thread():
    """Backwards on the caller's thread: a device thread that has run Python would abort the process at its end."""
    with torch.autograd.set_multithreading_enabled(False):
        yield
    raise_late()


# Attention on the way down and in the middle: 500 operations a prediction, where the embedded model's have 1400.
SMALLER = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "sample_size": 16,
    "norm_num_groups": 8,
}
SIZE = 32  # pixels: eight latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model with a smaller UNet of random weights."""
    root = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(TINY, root)
    file = root / "unet" / "config.json"
    config = json.loads(file.read_text()) | SMALLER
    file.write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = UNet.from_config(config).state_dict()
    save_file(
        {n: torch.randn_like(w) * 0.1 + (n.endswith("norm.weight") or ".norm" in n) for n, w in weights.items()},
        root / "unet" / "diffusion_pytorch_model.safetensors",
    )
    return root


@pytest.fixture(scope="module")
def model(folder):
    """That model on the second device, in float32."""
    return load_model(folder, torch.float32, device=NAME)


@pytest.fixture(scope="module")
def halved(folder):
    """That model on the second device, in bfloat16."""
    return load_model(folder, torch.bfloat16, device=NAME)


@pytest.fixture(scope="module")
def twin(folder):
    """The same model on the CPU: what makes concepts by hand and what results are compared with."""
    return load_model(folder, torch.float32)


def of_cpu(concept):
    """A concept whose tensors are all on the CPU, finite."""
    tensors = [*concept.tensors.values(), *(r for rows in concept.words.values() for r in rows)]
    assert tensors and not any(isinstance(t, Second) for t in tensors)
    assert all(bool(torch.isfinite(t).all()) for t in tensors)
    return concept
