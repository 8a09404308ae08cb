"""Which bytes of new tensors were written: a kernel that reads others reads whatever the last owner left there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pcs_kernels._dispatch import COSTS

MAKERS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def bytes_of(storage: torch.UntypedStorage) -> NDArray[np.uint8]:
    """The storage's own memory."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


class Written(TorchDispatchMode):
    """Sees every torch op: those that make memory without filling it, and those that fill it."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, NDArray[np.bool_]]] = {}

    def of(self, storage: torch.UntypedStorage) -> NDArray[np.bool_] | None:
        """A mask of the written bytes, for a kernel to fill in; None where all are."""
        found = self.known.get(storage._cdata)
        return None if found is None else found[1]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, _, name = op._schema.name.partition("::")
        if space == "pcs_kernels":  # its body is Python, and made of the ops that count
            with self:
                return COSTS[name].run(*args, **kwargs)
        result = op(*args, **kwargs)
        for argument, value in zip(op._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._filled(value)
        for argument in op._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in kwargs:
                self._filled(kwargs[argument.name])
        if name in MAKERS and isinstance(result, Tensor) and result.device.type == "cpu":
            storage = result.untyped_storage()
            # the weak reference keeps the number from being another storage's while it stands here
            self.known[storage._cdata] = StorageWeakRef(storage), np.zeros(storage.nbytes(), bool)
            self._forget()
        return result

    def _filled(self, value: Any) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self.known.pop(leaf.untyped_storage()._cdata, None)

    def _forget(self) -> None:
        for number in [n for n, (reference, _) in self.known.items() if reference.expired()]:
            del self.known[number]
