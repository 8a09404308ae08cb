"""PTX text -> a kernel: its parameters, its instructions with operands told apart, and where its labels point."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from .faults import UnknownInstruction

REGISTER_BITS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}


class Register(NamedTuple):
    name: str
    bits: int


NOWHERE = Register("_", 0)  # where results go that nobody reads


class Constant(NamedTuple):
    value: int  # two's complement of any width, or a float's bits


class Special(NamedTuple):
    name: str  # %tid.x, %ctaid.y, ...


class Address(NamedTuple):
    base: Register | Constant | str  # a register, shared memory's start, or a parameter's name
    offset: int


class Vector(NamedTuple):
    parts: tuple[Register | Constant, ...]


class Label(NamedTuple):
    name: str


Operand = Register | Constant | Special | Address | Vector | Label


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "ld", "mma", ...
    modifiers: tuple[str, ...]  # what follows it: ("global", "v4", "b32")
    operands: tuple[Operand, ...]
    guard: Register | None  # executed where this predicate holds ...
    negated: bool  # ... or where it does not
    text: str
    source: str  # "triton_kernels.py:73", the line of Python it came from

    @property
    def kind(self) -> str:
        return self.modifiers[-1]


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def __str__(self) -> str:
        return self.name


def parse(ptx: str) -> Kernel:
    """The one kernel of a module that Triton wrote."""
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*\.reqntid\s+(\d+)[^{]*\{", ptx, re.DOTALL)
    if head is None:
        raise UnknownInstruction("the PTX has no entry with parameters and .reqntid")
    body = ptx[head.end() : ptx.index("\n}", head.end())]
    registers = {prefix: REGISTER_BITS[kind] for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<\d+>;", body)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ""
    for line in body.split("\n"):
        if located := re.search(r"^\s*\.loc\b.*//\s*(\S+:\d+):\d+", line):
            source = located[1]
        line = line.split("//")[0].strip()
        if label := re.match(r"^(\$?\w+):$", line):
            labels[label[1]] = len(instructions)
        elif line and not line.startswith("."):
            for text in filter(None, map(str.strip, line.split(";"))):
                instructions.append(_instruction(text, source, registers))
    parameters = tuple(re.findall(r"(\w+)\s*(?:,|$)", head[2].strip()))
    return Kernel(head[1], parameters, int(head[3]), tuple(instructions), labels)


def _instruction(text: str, source: str, registers: dict[str, int]) -> Instruction:
    found = re.match(r"^(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.DOTALL)
    if found is None:
        raise UnknownInstruction(f"{text!r} does not read as an instruction")
    negated, guard, words, rest = found.groups()
    opcode, *modifiers = words.replace("shared::cta", "shared").split(".")
    operands = tuple(_operand(part, registers) for part in _split(rest))
    return Instruction(
        opcode, tuple(modifiers), operands, Register(guard, 1) if guard else None, negated == "!", text, source
    )


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, current.strip()] if current.strip() else parts


def _operand(text: str, registers: dict[str, int]) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_scalar(part, registers) for part in _split(text.strip("{} "))))
    if text.startswith("["):
        found = re.match(r"^\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
        if found is None:
            raise UnknownInstruction(f"the address {text} has a form that is not known")
        base = _scalar(found[1], registers) if found[1].startswith("%") else found[1]
        return Address(Constant(0) if base == "global_smem" else base, int(found[2] or "0", 0))
    if text.startswith("$"):
        return Label(text)
    if text.startswith("%") and text.rstrip("0123456789") not in registers:
        return Special(text)
    return _scalar(text, registers)


def _scalar(text: str, registers: dict[str, int]) -> Register | Constant:
    if text == "_":
        return NOWHERE
    if text.startswith("%"):
        return Register(text, registers[text.rstrip("0123456789")])
    if text == "global_smem":
        return Constant(0)
    if text.startswith("0f"):
        return Constant(int(text[2:], 16))
    try:
        return Constant(int(text.rstrip("U"), 0))
    except ValueError:
        raise UnknownInstruction(f"the operand {text!r} is neither register nor number") from None
