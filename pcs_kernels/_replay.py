"""A call of an op played again: its launches with other addresses, without the host code between them.

Around its kernels an implementation computes tiles, splits and strides, makes views and buffers: several times what the
launches cost, and for a call of one kind (`_direct.kind_of`) always with the same outcome. So the second call of a kind
that launches Triton kernels is written down: the tensors it makes, the launches, and which argument or new tensor each
address belongs to, with its offset. From then on the tensors are made and the kernels launched with these addresses.

Nothing is written down of a call in which torch computes anything itself (a copy into a dense layout, a sum), whose
result shares memory with an argument, whose arguments share memory in a way that hides which of them is meant, or whose
buffers are so large that to hold them all at once would be seen. Such calls run their host code each time. Of an
implementation it asks that a kernel gets an argument from its first element on, and what it makes from any.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TRIES = 3  # calls of a kind that are watched: the first of them may compile its kernels
MOST_SCRATCH = 4 << 20  # bytes of buffers that are made as one and live until the call's end
PIECE = 256  # bytes of which each buffer's place is a multiple, as in torch's own allocator on a GPU
aten = torch.ops.aten
MAKERS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class _Watch(TorchDispatchMode):
    """Sees what torch is asked for: new tensors, views, or more."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.computed = False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op in MAKERS:
            self.made.append(result)
        elif not op.is_view:
            self.computed = True
        return result


class Unknown(Exception):
    """The call cannot be played again."""


class _Addresses:
    """Whose memory an address is in: (number of the source, bytes from its start); arguments come first."""

    def __init__(self, args: tuple[Any, ...], made: list[Tensor]) -> None:
        self.given = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.numel()]
        self.exact: dict[int, int] = {}
        self.storages: dict[int, tuple[int, int]] = {}
        shared: set[int] = set()
        for number, i in enumerate(self.given):
            tensor, storage = args[i], args[i].untyped_storage()._cdata
            if tensor.data_ptr() in self.exact or tensor.data_ptr() % 16:
                raise Unknown("two arguments at one place, or one that a kernel of its own is compiled for")
            self.exact[tensor.data_ptr()] = number
            if storage in self.storages:
                shared.add(storage)
            self.storages[storage] = number, tensor.data_ptr()
        for storage in shared:
            del self.storages[storage]  # an address between two arguments could be either's
        self.first_made = len(self.given)
        self.sizes: list[int] = []
        for number, tensor in enumerate(made):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = self.first_made + number, storage.data_ptr()
            self.sizes.append(storage.nbytes())

    def of(self, tensor: Tensor) -> tuple[int, int]:
        """The source of a tensor's address and its offset there."""
        if tensor.data_ptr() in self.exact:
            return self.exact[tensor.data_ptr()], 0
        found = self.storages.get(tensor.untyped_storage()._cdata)
        if found is None:
            raise Unknown("a kernel is given memory that is neither an argument's nor new")
        return found[0], tensor.data_ptr() - found[1]


def _bytes(tensor: Tensor) -> int:
    """From the first element to the last."""
    if not tensor.numel():
        return 0
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


class _Plan:
    """A call written down. Built from one that has just run; playing it gives new results for other arguments."""

    def __init__(self, args: tuple[Any, ...], result: Any, watch: _Watch, launches: list[Any]) -> None:
        if watch.computed or not launches or None in launches:
            raise Unknown("torch computed something, or a launch that is not known")
        results = result if isinstance(result, tuple) else (result,)
        addresses = _Addresses(args, watch.made)
        self.given = addresses.given
        self.single = not isinstance(result, tuple)
        outputs: dict[int, int] = {}  # the number of a new tensor -> of an output
        self.forms: list[tuple[Any, ...]] = []
        self.results: list[int] = []
        for tensor in results:
            source, offset = addresses.of(tensor) if tensor.numel() else self._empty(addresses, tensor)
            if source < addresses.first_made or offset:
                raise Unknown("a result that shares memory with an argument or another result")
            form = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
            if source not in outputs:
                if _bytes(tensor) != addresses.sizes[source - addresses.first_made]:
                    raise Unknown("a result that is a part of what was made")
                outputs[source] = len(self.forms)
                self.forms.append(form)
            elif self.forms[outputs[source]] != form:
                raise Unknown("two results in one new tensor")
            self.results.append(outputs[source])
        places = {source: (len(self.given) + number, 0) for source, number in outputs.items()}
        self.scratch = self._scratch(addresses, outputs, places, len(self.given) + len(self.forms))
        self.device = next(args[i].device for i in self.given)
        self.launches = [self._launch(one, addresses, places) for one in launches]
        (self.on,) = {one.device for one in launches}
        self.made_with = launches[0].made_with

    @staticmethod
    def _empty(addresses: _Addresses, tensor: Tensor) -> tuple[int, int]:
        found = addresses.storages.get(tensor.untyped_storage()._cdata)
        if found is None:
            raise Unknown("an empty result that is not new")
        return found[0], 0

    @staticmethod
    def _scratch(
        addresses: _Addresses, outputs: dict[int, int], places: dict[int, tuple[int, int]], number: int
    ) -> int:
        """Give every new tensor but the results its place in one buffer; the buffer's bytes."""
        total = 0
        for made, size in enumerate(addresses.sizes):
            source = addresses.first_made + made
            if source not in outputs:
                places[source] = number, total
                total += -(-size // PIECE) * PIECE
        if total > MOST_SCRATCH:
            raise Unknown("large buffers")
        return total

    @staticmethod
    def _launch(one: Any, addresses: _Addresses, places: dict[int, tuple[int, int]]) -> tuple[Any, ...]:
        slots = []
        for place, a in enumerate(one.args):
            if isinstance(a, Tensor) and a.numel():
                source, offset = addresses.of(a)
                base, start = places.get(source, (source, 0))
                slots.append((place, base, start + offset))
        values = [0 if isinstance(a, Tensor) else a for a in (*one.args, *one.ready.constants)]  # empty: no address
        return one.ready, one.grid, values, slots

    def play(self, args: tuple[Any, ...], stream: Any) -> Any:
        """The results for other arguments of the same kind; None where one of them lies at an odd address."""
        bases = [args[i].data_ptr() for i in self.given]
        bits = 0
        for base in bases:
            bits |= base
        if bits & 15:
            return None
        new = [torch.empty_strided(size, stride, dtype=dtype, device=on) for size, stride, dtype, on in self.forms]
        bases += [tensor.data_ptr() for tensor in new]
        if self.scratch:
            buffer = torch.empty(self.scratch, dtype=torch.uint8, device=self.device)
            bases.append(buffer.data_ptr())
        for ready, (x, y, z), template, slots in self.launches:
            values = template.copy()
            for place, base, offset in slots:
                values[place] = bases[base] + offset
            ready.run(x, y, z, stream, ready.function, ready.metadata, None, None, None, *values)
        return new[0] if self.single else tuple([new[i] for i in self.results])


class Repeated:
    """An implementation of an op for calls of one kind: by its host code, and as soon as it can be, played again."""

    __slots__ = ("chosen", "plan", "run", "tries")

    def __init__(self, run: Callable[..., Any], chosen: Any) -> None:
        self.run, self.chosen = run, chosen
        self.plan: _Plan | None = None
        self.tries = TRIES

    def __call__(self, *args: Any) -> Any:
        if self.plan is not None:
            stream = sys.modules["pcs_kernels._relaunch"].stream_of(self.plan.made_with, self.plan.on)
            result = None if stream is None else self.plan.play(args, stream[0])
            if result is not None:
                return result
        elif self.tries:
            self.tries -= 1
            return self._watched(args)
        return self.run(self.chosen, *args)

    def _watched(self, args: tuple[Any, ...]) -> Any:
        relaunch = sys.modules.get("pcs_kernels._relaunch")
        if relaunch is None:  # no Triton kernel was launched in this process
            return self.run(self.chosen, *args)
        with relaunch.written_down() as launches, _Watch() as watch:
            result = self.run(self.chosen, *args)
        try:
            self.plan = _Plan(args, result, watch, launches)
        except Unknown:
            if watch.computed:  # and so it will
                self.tries = 0
        return result
