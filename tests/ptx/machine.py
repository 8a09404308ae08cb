"""A batch of thread blocks of one launch, executed in lockstep: registers, masks, divergence.

B blocks of T threads; a register is an array that broadcasts to [B, T]: [1, 1] for a constant, [B, 1] for what a whole
block shares. Threads that took different branches each have their own place in the program, and the ones furthest
behind go first, so that they meet again where a GPU's would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .faults import Divergence, Fault, UnknownInstruction
from .global_memory import GlobalMemory
from .numbers import KINDS, UNSIGNED, Array
from .parse import NOWHERE, Constant, Instruction, Kernel, Operand, Register, Special, Vector
from .shared_memory import SharedMemory
from .traffic import Traffic

WARP = 32
MOST_STEPS = 2_000_000  # no kernel of the tests comes near: a loop that never ends

Handler = Callable[["Blocks", Instruction, "Array | None"], None]
HANDLERS: dict[str, Handler] = {}


def instruction(*opcodes: str) -> Callable[[Handler], Handler]:
    """The function below executes these opcodes: (blocks, instruction, mask of the threads that take part)."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return register


def _poison(register: Register) -> Array:
    """What a register holds that nothing was written to: all ones, a NaN to floats."""
    return np.array([[True]]) if register.bits == 1 else np.full((1, 1), -1, np.int64).astype(UNSIGNED[register.bits])


class Blocks:
    def __init__(
        self,
        kernel: Kernel,
        arguments: dict[str, int],
        grid: tuple[int, int, int],
        programs: Array,  # [B] numbers in the grid
        memory: GlobalMemory,
        shared_bytes: int,
        copies_land_late: bool = True,
        traffic: Traffic | None = None,
    ) -> None:
        self.kernel, self.arguments, self.grid, self.memory = kernel, arguments, grid, memory
        self.programs = programs
        self.shape = len(programs), kernel.threads
        self.shared = SharedMemory(len(programs), shared_bytes)
        self.copies_land_late = copies_land_late
        self.traffic = traffic
        self.executed: Counter[str] = Counter()
        self.registers: dict[str, Array] = {}
        self.copies: list[Any] = []  # asynchronous copies (transfers.py) that were not waited for
        self.committed = np.zeros(len(programs), np.int64)  # their groups
        self.products: list[Any] = []  # Hopper's products (warpgroup.py) likewise
        self.committed_products = np.zeros(len(programs), np.int64)
        self.next = 0  # the instruction that comes next ...
        self.places: Array | None = None  # ... or each thread's own, [B, T], while they differ
        block, thread = np.divmod(np.arange(self.shape[0] * self.shape[1]), self.shape[1])
        self.block_of, self.warp_of = block.reshape(self.shape), (thread // WARP).reshape(self.shape)

    # operands

    def bits(self, operand: Operand, bits: int) -> Array:
        """An operand as unsigned integers (predicates: bool) that broadcast to [B, T]."""
        if isinstance(operand, Register):
            found = self.registers.get(operand.name)
            if found is None:  # LLVM's undef: halves of pairs that nobody uses
                found = _poison(operand)
            if operand.bits != bits:
                if 1 in (operand.bits, bits):
                    raise UnknownInstruction(f"{operand.name} as a value of {bits} bits")
                return found.astype(UNSIGNED[bits])
            return found
        if isinstance(operand, Constant):
            if bits == 1:
                return np.array([[operand.value != 0]])
            return np.array([[operand.value & ((1 << bits) - 1)]], UNSIGNED[bits])
        if isinstance(operand, Special):
            return self._special(operand.name).astype(UNSIGNED[bits])
        raise UnknownInstruction(f"the operand {operand} where a value is wanted")

    def value(self, operand: Operand, kind: str) -> Array:
        """An operand as numbers of a kind: f32, s64, bf16x2, ..."""
        return KINDS[kind].decode(self.bits(operand, KINDS[kind].bits))

    def _special(self, name: str) -> Array:
        block, axis = np.arange(self.shape[0])[:, None], "xyz".find(name[-1])
        if name == "%tid.x":
            return np.arange(self.shape[1])[None]
        if name.startswith("%ctaid."):
            below = int(np.prod(self.grid[:axis]))
            return self.programs[block] // below % self.grid[axis]
        if name.startswith("%nctaid."):
            return np.array([[self.grid[axis]]])
        raise UnknownInstruction(f"the special register {name}")

    def put_bits(self, register: Operand, bits: Array, mask: Array | None) -> None:
        """Write a register in the threads of `mask`."""
        assert isinstance(register, Register)
        if register == NOWHERE:
            return
        if (register.bits == 1) != (bits.dtype == bool):
            raise UnknownInstruction(f"{bits.dtype} into {register.name}")
        if register.bits > 1 and bits.dtype != UNSIGNED[register.bits]:
            bits = bits.astype(UNSIGNED[register.bits])
        if mask is not None:
            old = self.registers.get(register.name)
            bits = np.where(mask, bits, _poison(register) if old is None else old)
        self.registers[register.name] = bits

    def put(self, register: Operand, numbers: Array, kind: str, mask: Array | None) -> None:
        self.put_bits(register, KINDS[kind].encode(numbers), mask)

    def full(self, values: Array) -> Array:
        return np.broadcast_to(values, self.shape)

    def lanes(self, values: Array) -> Array:
        """[B, T] -> [B, warps, 32]"""
        return self.full(values).reshape(self.shape[0], -1, WARP)

    def vector(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.parts if isinstance(operand, Vector) else (operand,)

    def whole_warps(self, mask: Array | None) -> Array:
        """[B, warps]: which warps execute an instruction of whole warps."""
        if mask is None:
            return np.ones((self.shape[0], self.shape[1] // WARP), bool)
        active = self.lanes(mask)
        if (active.any(-1) != active.all(-1)).any():
            raise Divergence("an instruction of a whole warp is executed by some of its threads")
        return active.all(-1)

    def whole_blocks(self, mask: Array | None) -> Array:
        """[B]: which blocks execute an instruction of whole blocks."""
        if mask is None:
            return np.ones(self.shape[0], bool)
        active = self.full(mask)
        if (active.any(-1) != active.all(-1)).any():
            raise Divergence("a barrier is reached by some of a block's threads")
        return active.all(-1)

    # execution

    def run(self) -> None:
        with np.errstate(all="ignore"):
            for current, where in self._order():
                mask = where
                if current.guard is not None:
                    held = self.bits(current.guard, 1) != current.negated
                    mask = held if where is None else held & where
                if current.opcode in ("bra", "ret"):
                    self._branch(current, mask, where)
                    continue
                if mask is not None and mask.all():
                    mask = None
                self.executed[".".join((current.opcode, *current.modifiers))] += 1
                if mask is None or mask.any():
                    self._execute(current, mask)

    def _order(self) -> Iterator[tuple[Instruction, Array | None]]:
        """Each instruction in turn with the threads that are there; None stands for all of them."""
        end = len(self.kernel.instructions)
        for _ in range(MOST_STEPS):
            where = None
            if self.places is not None:
                self.next = int(self.places.min())
                where = self.places == self.next
                if where.all():
                    self.places = where = None
            if self.next >= end:
                return
            at = self.next
            self.next = at + 1
            if self.places is not None:
                self.places[where] = at + 1
            yield self.kernel.instructions[at], where
        raise Fault(f"{self.kernel}: more than {MOST_STEPS} instructions; a loop that never ends")

    def _branch(self, current: Instruction, mask: Array | None, where: Array | None) -> None:
        self.executed[current.opcode] += 1
        target = len(self.kernel.instructions)
        if current.opcode == "bra":
            target = self.kernel.labels[current.operands[0].name]
        if where is None and (mask is None or mask.all()):
            self.next = target
        elif mask is None or mask.any():
            if self.places is None:
                self.places = np.full(self.shape, self.next)
            self.places[self.full(where if mask is None else mask)] = target

    def _execute(self, current: Instruction, mask: Array | None) -> None:
        handler = HANDLERS.get(current.opcode)
        if handler is None:
            raise UnknownInstruction(f"{self.kernel}: {current.text!r}: {current.opcode} is not known here")
        try:
            handler(self, current, mask)
        except Fault as fault:
            programs = f"programs {self.programs[0]} to {self.programs[-1]} of grid {self.grid}"
            raise type(fault)(f"{self.kernel} {current.source}: {fault}: {current.text!r}, {programs}") from None
