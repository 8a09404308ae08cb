"""The methods: one file each. A method is its file and its line in TITLES; everything else reads from there.

Importing this package imports no torch, so that `pcs --help` stays light.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings
    from .method import Method

# How a model may hold its UNet's frozen weights: the setting's usual value, and why the other is none for a whole UNet.
HELD = {"weights": ("full", "8 bits do not train"), "resident": ("device", "only frozen ones are streamed")}
TITLES = {
    "personalized_residuals": "Personalized Residuals",
    "dreambooth": "DreamBooth",
    "dreambooth_lora": "DreamBooth-LoRA",
    "custom_diffusion": "Custom Diffusion",
    "textboost": "TextBoost",
    "textual_inversion": "Textual Inversion",
    "lora_fa": "LoRA-FA",
}


def method_named(name: str) -> Method:
    """The method of this name, its file imported; ValueError with the nearest name where there is none."""
    if name not in TITLES:
        near = difflib.get_close_matches(name, TITLES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the methods are {', '.join(TITLES)}"
        raise ValueError(f"there is no method {name!r}; {hint}")
    found: Method = import_module(f".{name}", __name__).METHOD
    return found


def settings_for(model: Model | None, method: str, **overrides: Any) -> Settings:
    """A method's settings: its paper's values, adapted to the embedded model where it is that, then the overrides.

    Args:
        model: what will be trained; None for a real checkpoint.
        method: a name in TITLES.
        overrides: settings by name; a setting that only another method has is refused with that method's name. And
            `preset`: the name of some that the method's authors give together.

    Raises:
        ValueError: one sentence about a wrong name or value.
    """
    from ..settings import with_none_for_unset
    from ..unet.plans import short_plan

    chosen = method_named(method)
    preset = overrides.pop("preset", None)
    if preset is not None and preset not in chosen.presets:
        has = f"it has {', '.join(chosen.presets)}" if chosen.presets else "it has none"
        raise ValueError(f"{method} has no preset {preset!r}; {has}")
    known = {field.name for field in fields(chosen.settings)}
    for name in overrides:
        if name not in known:
            raise ValueError(why_unknown(method, name))
    adapted = dict(chosen.tiny if model is not None and model.embedded else {})
    for name, (usual, _) in HELD.items():
        if getattr(model, name, usual) != usual:
            adapted[name] = getattr(model, name)
    if model is not None and getattr(model, "turns", None) is not None and model.turns.on:
        adapted["offload"] = True
    given = adapted | dict(chosen.presets[preset] if preset else {}) | overrides
    values = chosen.implied(given) | given
    if "plan" in values:
        plan = values["plan"]
        many = isinstance(plan, Mapping)
        values["plan"] = {n: short_plan(p) for n, p in plan.items()} if many else short_plan(plan)
    settings = chosen.settings(method=method, **with_none_for_unset(chosen.settings, values))
    settings.check()
    for name, (usual, why) in HELD.items():
        if chosen.trains_whole_unet and getattr(settings, name) != usual:
            raise ValueError(
                f"{method} trains every weight of the UNet, and {why}. Fix: {name}='{usual}', or dreambooth_lora, "
                "whose UNet stays frozen"
            )
    return settings


def methods_with(setting: str) -> list[str]:
    """The names of the methods that have a setting."""
    return [name for name in TITLES if setting in {field.name for field in fields(method_named(name).settings)}]


def why_unknown(method: str, setting: str) -> str:
    """One sentence on a setting that the method does not have: who has it, or what was meant."""
    others = methods_with(setting)
    if others:
        return f"{method} has no setting {setting!r} ({', '.join(others)} {'has' if len(others) == 1 else 'have'} it)"
    near = difflib.get_close_matches(setting, [field.name for field in fields(method_named(method).settings)], 1)
    return f"there is no setting {setting!r}{f'; did you mean {near[0]!r}?' if near else ''}"
