"""Concept and LoRA files with one thing wrong: names, shapes, kinds, values, headers; the same for the same seed."""

from __future__ import annotations

import json
import random

import torch

FLOAT8 = torch.float8_e4m3fn
KINDS = (torch.bfloat16, torch.float16, torch.float64, FLOAT8, torch.int8, torch.int64, torch.bool, torch.complex64)
VALUES = (float("nan"), float("inf"), 1e38, 1e30, -1e9, 0.0)
TEXTS = ("", "[", "[" * 50_000, "{}", "null", "[[1]]", '{"a": 1}', "\x00", "é" * 300, "9" * 400, "-1", "<x>", "../x")
METADATA = (
    {"unet.lora_alpha": [1]},
    {"unet.lora_alpha": "x"},
    {"unet.lora_alpha": 1e308},
    {"unet.lora_alpha": -3},
    {"unet.alpha_pattern": 3},
    {"unet.alpha_pattern": ["to_k"]},
    {"unet.alpha_pattern": {"([a-z0-9_.]+)+!": 2}},
    {"unet.alpha_pattern": {"(": 2}},
    {"unet.alpha_pattern": {"proj_out": None}},
    {"unet.use_rslora": "yes"},
    {"unet.r": "x", "unet.lora_alpha": 0},
    [1],
    None,
    "x",
    {"unet.alpha_pattern": {"": 1}, "unet.lora_alpha": True},
)


def shapes_of(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    flat = t.flatten()
    forms = [
        flat,
        t[:0] if t.dim() else flat,
        t[1:] if t.dim() else flat,
        t.unsqueeze(0),
        t[..., None, None],
        t.new_zeros(0),
        torch.cat([flat, flat]),
    ]
    forms += [t.reshape(1, -1), t.reshape(-1)[0] if t.numel() else flat]
    forms += [t.T, t[..., :-1]] if t.dim() == 2 else []
    return rng.choice(forms)


def rename(name: str, rng: random.Random) -> str:
    parts = name.split(".")
    where = rng.randrange(len(parts))
    return rng.choice(
        [
            ".".join([*parts[:where], "nope", *parts[where + 1 :]]),
            ".".join(parts[:where] + parts[where + 1 :]),
            f"{name}.weight",
            f"context.{name}",
            f"context.nope.{parts[-1]}",
            name.replace("unet", "text_encoder_2"),
            name.upper(),
            f"text_encoder.{name}",
            name + ".diff",
            f"word.1.{name}",
            "word.0.",
            "",
            "unet.conv_in.down",
            name.replace("word.0.", "word.1."),
            name.replace(".up", ".causal_up"),
            name.replace("lora_up", "hada_w1_a"),
            name.replace("lora_down", "lokr_w1"),
            f"{parts[0]}.dora_scale",
            f"unet.{'x.' * 300}down",
        ]
    )


def mutated(
    tensors: dict[str, torch.Tensor], header: dict[str, str], rng: random.Random
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """One, two or three changes of a file."""
    tensors, header = dict(tensors), dict(header)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not tensors:
            break
        name = rng.choice(sorted(tensors))
        what = rng.randrange(8)
        if what == 0:
            tensors[name] = shapes_of(tensors[name], rng)
        elif what == 1:
            tensors[rename(name, rng)] = tensors.pop(name)
        elif what == 2:
            kind = rng.choice(KINDS)
            chosen = tensors if rng.random() < 0.3 else [name]
            tensors |= {n: tensors[n].to(kind) for n in chosen if not tensors[n].is_complex()}
        elif what == 3 and tensors[name].is_floating_point() and tensors[name].numel():
            flat = tensors[name].float().flatten().clone()
            flat[rng.randrange(len(flat)) if rng.random() < 0.5 else slice(None)] = rng.choice(VALUES)
            tensors[name] = flat.reshape(tensors[name].shape)
        elif what == 4:
            del tensors[name]
        elif what == 5:
            header[rng.choice([*header, "subjects", "version", "hold_first", "format"])] = rng.choice(TEXTS)
        elif what == 6:
            text = rng.choice(TEXTS) if rng.random() < 0.3 else json.dumps(rng.choice(METADATA))
            header["lora_adapter_metadata"] = text
        else:
            tensors[rename(name, rng)] = torch.randn(rng.choice([(), (0,), (1,), (2, 3), (128, 2), (4, 4, 4)]))
    return {n: t.contiguous() for n, t in tensors.items()}, header
