"""The rules of tests/house_rules.py are kept, and each of them can be broken."""

from __future__ import annotations

import house_rules
import pytest


@pytest.mark.parametrize("rule", house_rules.RULES, ids=lambda rule: rule.__name__)
def test_is_kept(rule):
    assert not list(rule())


BREAKERS = {
    "addresses_are_taken_in_one_place": ("pcs_kernels/broken.py", "address = x.data_ptr()\n"),
    "kernels_know_no_trainer": ("pcs_kernels/broken.py", "def f():\n    from pcs_trainer import unet\n"),
    "only_tables_are_formatted_by_hand": ("python/broken.py", "x = f( 1 )  # fmt: skip\n"),
    "functions_have_names": ("tests/broken.py", "f = lambda x: x  # noqa: E731\n"),
    "nothing_names_a_machine": ("docs/broken.md", "see " + "/home/" + "somebody/model\n"),
    "nothing_is_left_to_do": ("csrc/broken.cpp", "// TO" + "DO: faster\n"),
    "files_are_short": ("benchmarks/broken.py", "x = 1\n" * (house_rules.LONGEST_FILE + 1)),
    "functions_are_short": ("python/broken.py", "def f():\n" + "    x = 1\n" * (house_rules.LONGEST_FUNCTION + 1)),
    "toml_parses": ("examples/broken.toml", "[tool\n"),
    "messages_speak_the_fields_english": ("python/broken.py", "raise ValueError(f'{x} is no whole number')\n"),
}


@pytest.mark.parametrize("rule", house_rules.RULES, ids=lambda rule: rule.__name__)
def test_can_be_broken(rule, tmp_path, monkeypatch):
    if rule is house_rules.toml_parses:
        pytest.importorskip("tomllib")
    monkeypatch.setattr(house_rules, "ROOT", tmp_path)
    monkeypatch.setattr(house_rules, "HAND_FORMATTED", {})
    assert not list(rule())
    path, text = BREAKERS[rule.__name__]
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    (line,) = rule()
    assert line.startswith(path)
