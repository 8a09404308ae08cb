"""The front page of the kernel package says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pcs_kernels
from pcs_kernels import diagnostics
from tests import needs

PACKAGE = Path(pcs_kernels.__file__).parent
TEXT = (PACKAGE / "README.md").read_text()


def test_every_function_in_it_is_there():
    names = set(re.findall(r"pcs_kernels\.([a-zA-Z_.0-9]+)\(", TEXT))
    assert len(names) > 10
    for name in names:
        found = pcs_kernels
        for part in name.split("."):
            if found is pcs_kernels and part == "diagnostics":
                found = diagnostics
            else:
                found = getattr(found, part)
        assert callable(found), name


@needs.native
def test_its_table_of_hardware_is_what_the_backends_say():
    pytest.importorskip("triton", reason="triton is not installed here; its reasons cannot be asked")
    table = TEXT.split("<!-- hardware:begin -->")[1].split("<!-- hardware:end -->")[0].strip().splitlines()[2:]
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in table)}
    hardware = diagnostics.hardware()
    assert set(rows) == set(hardware)
    for op, (cpu, turing, later) in rows.items():
        found = hardware[op]
        assert found["CPU"] == cpu and found["sm_75"] == turing, op
        assert {backend for where, backend in found.items() if where not in ("CPU", "sm_75")} == {later}, op


def test_its_layout_names_files_that_are_there():
    block = TEXT.split("## How the folder is laid out")[1].split("```")[1]
    for name in re.findall(r"^\s*([*\w/]+\.py|\w+/)\s", block, re.MULTILINE):
        pattern = f"ops/{name}" if name.startswith("*") else name
        assert any(PACKAGE.glob(pattern)), name


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)", TEXT):
        assert (PACKAGE / link).exists(), link
