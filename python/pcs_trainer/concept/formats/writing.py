"""Concepts as files that other tools load: diffusers' and kohya's formats, and whole pipeline folders.

"diffusers"  LoRA, Custom Diffusion and embedding files for diffusers; a whole pipeline where weights of other
             kinds were trained (DreamBooth)
"kohya"      one LoRA file and embeddings, for ComfyUI, A1111 and kohya's own tools
"pipeline"   a whole diffusers folder with everything merged into its weights
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...files import write_safetensors
from ...unet.config import family
from ..concept import Concept, check_base, check_fits
from ..header import described
from .layer_names import Layers, kohya_name

if TYPE_CHECKING:
    from ...model.model import Model

FORMATS = ("diffusers", "kohya", "pipeline")
LORA_FILE = "pytorch_lora_weights.safetensors"
CUSTOM_FILE = "pytorch_custom_diffusion_weights.safetensors"
CUSTOM_LAYERS = {
    "to_k.weight": "to_k_custom_diffusion.weight",
    "to_v.weight": "to_v_custom_diffusion.weight",
    "to_q.weight": "to_q_custom_diffusion.weight",
    "to_out.0.weight": "to_out_custom_diffusion.0.weight",
    "to_out.0.bias": "to_out_custom_diffusion.0.bias",
}
CROSS = re.compile(r"unet\.(.+\.attn2)\.(to_[kvq]\.weight|to_out\.0\.(?:weight|bias))(\.diff)?")
CLIP_NAMES = ("clip_l", "clip_g")
WORDWISE = "works from the concept's own word on, which no other program can do; it is kept in the concept's own file"


@dataclass
class Report:
    """What an export wrote, and what it left out with the reason; every tensor of the concept is in one of the two."""

    format: str
    files: list[Path] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)  # the concept's name -> file: key
    skipped: dict[str, str] = field(default_factory=dict)  # the concept's name -> why not
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in self.files if file.is_file()) / 1e6
        total = len(self.written) + len(self.skipped)
        lines = [f"{self.format}: {len(self.written)} of {total} tensors in {len(self.files)} files, {size:.2f} MB"]
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.skipped.items():
            reasons[reason].append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left out {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines + self.notes)


def export(
    concept: Concept,
    folder: str | Path,
    format: str = "diffusers",
    model: Model | None = None,
    metadata: bool = True,
    bundle: bool = False,
) -> Report:
    """Write `concept` into `folder` and report every tensor's fate.

    model: the base model, needed for "pipeline" and wherever whole values become differences.
    metadata=False leaves out how it was made. bundle: words inside kohya's LoRA file too (A1111 reads them there;
    diffusers then refuses the file).
    """
    if format not in FORMATS:
        raise ValueError(f"format = {format!r}; the formats are {', '.join(FORMATS)}")
    folder = Path(folder).expanduser()
    if model is not None:
        check_base(concept, model, concept.key)
        check_fits(concept, model, concept.key)
        known = {"family": family(model.unet.settings), "prediction": model.schedule.prediction}
        concept = replace(concept, meta=known | concept.meta)
    report = Report(format)
    _note_limits(concept, report)
    if format == "pipeline" or (format == "diffusers" and _needs_pipeline(concept)):
        from .pipeline import write_pipeline

        if model is None:
            raise ValueError(f"{concept.key} goes into a whole pipeline's weights: give the base model (model=...)")
        if format == "diffusers":
            report.notes.append(
                "weights of many kinds were trained, so this is a whole pipeline: load it by its folder"
            )
        write_pipeline(concept, folder, model, metadata, report)
    elif format == "diffusers":
        _write_diffusers(concept, folder, model, metadata, report)
    else:
        _write_kohya(concept, folder, model, metadata, bundle, report)
    return report


def _note_limits(concept: Concept, report: Report) -> None:
    for name in concept.tensors:
        if ".causal_" in name or name.startswith("context."):
            report.skipped[name] = WORDWISE
    if concept.hold_first and any(name.startswith("text_encoder") for name in concept.tensors):
        report.notes.append(
            "the text's first token, and the empty prompt, are held at the base model's values here; other programs "
            "take them from the tuned encoder, so their pictures differ from ours"
        )


def plain_pairs(concept: Concept) -> dict[str, tuple[Tensor, Tensor]]:
    """The low-rank pairs that other programs know."""
    return {n: p for n, p in concept.pairs().items() if not n.endswith(".causal") and not n.startswith("context.")}


def _needs_pipeline(concept: Concept) -> bool:
    """Whether a concept holds whole values that diffusers has no small file for."""
    wholes = concept.wholes()
    replaced = {found[1] for name in wholes if (found := CROSS.fullmatch(name))}
    others = any(not CROSS.fullmatch(name) for name in wholes)
    return others or any(stem.removeprefix("unet.").rpartition(".")[0] in replaced for stem in plain_pairs(concept))


def file_part(word: str) -> str:
    """A word as part of a file's name."""
    return re.sub(r"[^\w.-]+", "", word) or "word"


def header(concept: Concept, tensors: dict[str, Tensor], metadata: bool) -> dict[str, str]:
    """The header of an exported file; the hash is of its tensors' bytes."""
    if not metadata:
        return {"format": "pt"}
    from safetensors.torch import save

    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    body = data[8 + int.from_bytes(data[:8], "little") :]
    return {"format": "pt", **described(concept), "modelspec.hash_sha256": "0x" + hashlib.sha256(body).hexdigest()}


def is_convolution(concept: Concept, module: str, layers: Layers | None) -> bool:
    """Whether `part.module` is a 1x1 convolution: only SD1.x's transformers have such projections."""
    if layers is not None:
        return layers.parameters[f"{module}.weight"].dim() == 4
    return module.endswith(("proj_in", "proj_out")) and concept.meta.get("family", "sd1") == "sd1"


def _shaped(pair: tuple[Tensor, Tensor], convolution: bool) -> tuple[Tensor, Tensor]:
    down, up = pair
    return (down[:, :, None, None], up[:, :, None, None]) if convolution else (down, up)


def adapter_metadata(ranks: dict[str, int]) -> dict[str, object]:
    """What diffusers builds PEFT's configuration from: each layer's rank and an equal alpha, so every scale is 1."""
    fields: dict[str, object] = {}
    by_part: dict[str, dict[str, int]] = defaultdict(dict)
    for stem, rank in ranks.items():
        part, _, module = stem.partition(".")
        by_part[part][module.removeprefix("text_model.")] = rank
    for part, of in by_part.items():
        common = Counter(of.values()).most_common(1)[0][0]
        others = {module: rank for module, rank in of.items() if rank != common}
        values = {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others}
        fields |= {f"{part}.{name}": value for name, value in values.items()}
        fields[f"{part}.target_modules"] = sorted(of)
    return fields


def _write_diffusers(concept: Concept, folder: Path, model: Model | None, metadata: bool, report: Report) -> None:
    layers = Layers(model) if model is not None else None
    tensors: dict[str, Tensor] = {}
    names = {}
    for stem, pair in plain_pairs(concept).items():
        shaped = _shaped(pair, is_convolution(concept, stem, layers))
        for own, theirs, tensor in zip(("down", "up"), ("lora_A", "lora_B"), shaped, strict=True):
            tensors[f"{stem}.{theirs}.weight"] = tensor
            names[f"{stem}.{own}"] = f"{stem}.{theirs}.weight"
    if tensors:
        ranks = {stem: len(down) for stem, (down, _) in plain_pairs(concept).items()}
        own = {"lora_adapter_metadata": json.dumps(adapter_metadata(ranks), sort_keys=True)}
        _write(folder / LORA_FILE, tensors, header(concept, tensors, metadata) | own, names, report)
    if concept.wholes():
        tensors, names = _custom_diffusion(concept, layers)
        _write(folder / CUSTOM_FILE, tensors, header(concept, tensors, metadata), names, report)
        report.notes.append(f"load {CUSTOM_FILE} with pipe.unet.load_attn_procs(..., _pipeline=pipe)")
    for word, rows in concept.words.items():
        file = folder / (
            "learned_embeds.safetensors" if word == concept.token else f"learned_embeds_{file_part(word)}.safetensors"
        )
        keys = [word] if len(rows) == 1 else list(CLIP_NAMES)
        tensors = dict(zip(keys, rows, strict=True))
        names = {f"word.{e}.{word}": key for e, key in enumerate(keys)}
        _write(file, tensors, header(concept, tensors, metadata), names, report)


def _custom_diffusion(concept: Concept, layers: Layers | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The attention processors of diffusers' Custom Diffusion: one for each attention layer, empty where unchanged."""
    changed: dict[str, dict[str, Tensor]] = defaultdict(dict)
    names = {}
    for name in concept.wholes():
        module, layer, difference = CROSS.fullmatch(name).groups()
        if difference and layers is None:
            raise ValueError(f"{name} is a difference: give the base model (model=...) it is to be added to")
        parameter = name.removesuffix(".diff")
        value = layers.tuned(concept, parameter) if difference else concept.tensors[name]
        changed[module][layer] = value.to(concept.tensors[name].dtype)
        names[name] = f"{module}.processor.{CUSTOM_LAYERS[layer]}"
    tensors = {}
    for module, own in changed.items():
        wanted = ["to_k.weight", "to_v.weight"]
        wanted += [n for n in CUSTOM_LAYERS if n not in wanted] * any("to_q" in n or "to_out" in n for n in own)
        for layer in wanted:
            if layer not in own and layers is None:
                raise ValueError(
                    f"{module} lacks {layer}, which diffusers' file needs: give the base model (model=...)"
                )
            value = own[layer] if layer in own else layers.parameters[f"unet.{module}.{layer}"]
            tensors[f"{module}.processor.{CUSTOM_LAYERS[layer]}"] = value
    attention = {module.removesuffix("2") + number for module in changed for number in "12"}
    if layers is not None:
        found = (n.removeprefix("unet.").removesuffix(".to_q.weight") for n in layers.parameters)
        attention = {n for n in found if n.endswith((".attn1", ".attn2"))}
    for module in sorted(attention - changed.keys()):  # an empty tensor is diffusers' sign for an untrained layer
        tensors[f"{module}.processor"] = torch.zeros(0)
    return tensors, names


def _alphas(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Each pair's alpha: its rank, so that readers scale it by 1.

    diffusers loses the alphas of attention and text layers where they differ, so such files get one alpha for all, and
    the writer scales `up` instead.
    """
    ranks = {stem: len(down) for stem, (down, _) in pairs.items()}
    if len(set(ranks.values())) > 1 and any(".attn" in s or s.startswith("text_encoder") for s in ranks):
        return dict.fromkeys(ranks, Counter(ranks.values()).most_common(1)[0][0])
    return ranks


def _write_kohya(
    concept: Concept, folder: Path, model: Model | None, metadata: bool, bundle: bool, report: Report
) -> None:
    layers = Layers(model) if model is not None else None
    encoders = 2 if concept.meta.get("family") == "sdxl" else 1
    tensors: dict[str, Tensor] = {}
    names = {}
    alphas = _alphas(plain_pairs(concept))
    for stem, pair in plain_pairs(concept).items():
        part, _, module = stem.partition(".")
        flat = kohya_name(part, module, model, encoders)
        down, up = _shaped(pair, is_convolution(concept, stem, layers))
        up = up if alphas[stem] == len(down) else up * (len(down) / alphas[stem])
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(float(alphas[stem]))
        names |= {f"{stem}.down": f"{flat}.lora_down.weight", f"{stem}.up": f"{flat}.lora_up.weight"}
    for name, value in concept.wholes().items():
        parameter = name.removesuffix(".diff")
        part, _, rest = parameter.partition(".")
        module, _, kind = rest.rpartition(".")
        if parameter == name and layers is None:
            raise ValueError(
                f"{name} is a whole value: give the base model (model=...) whose difference kohya's file holds"
            )
        change = value if name.endswith(".diff") else value.double() - layers.parameters[name].double().to(value.device)
        key = f"{kohya_name(part, module, model, encoders)}.{'diff' if kind == 'weight' else 'diff_b'}"
        tensors[key] = change.to(value.dtype)
        names[name] = key
    words = _embeddings(concept)
    if bundle:
        tensors |= {
            f"bundle_emb.{n}.{'string_to_param.*' if k == 'emb_params' else k}": t
            for n, d, _ in words
            for k, t in d.items()
        }
    if tensors:
        name = file_part(concept.token or concept.meta.get("title", "") or concept.method)
        _write(folder / f"{name}.safetensors", tensors, header(concept, tensors, metadata), names, report)
    if any(key.endswith((".diff", ".diff_b")) for key in tensors):
        report.notes.append("whole weights are written as differences, which ComfyUI reads; compress makes them a LoRA")
    for name, rows, own in words:
        _write(folder / "embeddings" / f"{name}.safetensors", rows, header(concept, rows, metadata), own, report)
        word = next(iter(own)).split(".", 2)[2]
        if word != name:
            report.notes.append(f"the word {word} is called {name} there: {name} in A1111, embedding:{name} in ComfyUI")


def _embeddings(concept: Concept) -> list[tuple[str, dict[str, Tensor], dict[str, str]]]:
    """(file name, tensors, names) for each word. The file's name is the word there, so it must be no plain word."""
    found = []
    for word, rows in concept.words.items():
        plain = file_part(word)
        keys = ["emb_params"] if len(rows) == 1 else list(CLIP_NAMES)
        names = {f"word.{e}.{word}": key for e, key in enumerate(keys)}
        found.append((plain if plain == word else f"v-{plain}", dict(zip(keys, rows, strict=True)), names))
    return found


def _write(
    file: Path, tensors: dict[str, Tensor], fields: dict[str, str], names: dict[str, str], report: Report
) -> None:
    if file in report.files:
        raise ValueError(
            f"two of the concept's words make one file name, {file.name}: give one another with .renamed(...)"
        )
    write_safetensors(file, tensors, fields)
    report.files.append(file)
    report.written |= {own: f"{file.name}: {key}" for own, key in names.items()}
