"""Other tools' files as concepts: LoRA of diffusers, PEFT and kohya, Custom Diffusion, textual inversions.

A file's scale (alpha / rank) goes into `up`; low-rank changes of larger convolutions become differences. What a file
holds beyond that is named and refused. A pickle is read by torch's restricted loader alone, which runs no code.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...files import check_finite, read_safetensors
from ...model.fingerprint import fingerprint
from ...unet.config import family
from ..attach import check_fits, text_widths
from ..base_weights import BaseWeights
from ..concept import FORMAT, Concept
from ..grammar import UNET, Kind, Part, difference_name, pair_names, parse, spell, value_name
from ..loading import check_differs, load_concept
from .layer_names import LayerNames
from .report import file_part, listed

if TYPE_CHECKING:
    from ...model.model import Model

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ENDINGS = (  # of a layer's tensors in the tools' files, and what the tensor is
    (re.compile(r"\.lora_A(?:\.\w+)?\.weight$"), "down"),
    (re.compile(r"\.lora_B(?:\.\w+)?\.weight$"), "up"),
    (re.compile(r"(?:[._]lora|\.lora_linear_layer)\.down\.weight$"), "down"),
    (re.compile(r"(?:[._]lora|\.lora_linear_layer)\.up\.weight$"), "up"),
    (re.compile(r"\.lora_down\.weight$"), "down"),
    (re.compile(r"\.lora_up\.weight$"), "up"),
    (re.compile(r"\.lora_mid\.weight$"), "mid"),
    (re.compile(r"(?:_lora)?\.alpha$"), "alpha"),
    (re.compile(r"\.diff$"), "diff"),
    (re.compile(r"\.diff_b$"), "diff_b"),
)
CUSTOM = re.compile(r"(.+\.attn[12])\.processor\.(to_[kvq]|to_out)_custom_diffusion\.(0\.)?(weight|bias)")
OLD_TEXT_NAMES = {"self_attn.to_q": "self_attn.q_proj", "self_attn.to_k": "self_attn.k_proj"}
OLD_TEXT_NAMES |= {"self_attn.to_v": "self_attn.v_proj", "self_attn.to_out": "self_attn.out_proj"}
BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|emb_params|clip_l|clip_g)")
ROW_NAMES = {"string_to_param.*": 0, "emb_params": 0, "clip_l": 0, "clip_g": 1}
DIFFERENCES = {"diff": "weight", "diff_b": "bias"}  # kohya's ending -> the parameter it is added to
TAKEN_OVER = {"ss_steps": "steps", "ss_seed": "seed", "ss_learning_rate": "learning_rate"}
Scale = Callable[[Part, str, int], float]
QUOTED = 120  # characters of another library's error message: enough for its first sentence, and still one line


@dataclass
class _Found:
    """What was recognized in one file: tensors of layers by kind, parameters, words, and names of everything else."""

    layers: dict[tuple[Part, str], dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    tensors: dict[str, Tensor] = field(default_factory=dict)
    words: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    unknown: list[str] = field(default_factory=list)


def import_concept(path: str | Path, model: Model, token: str | None = None, force: bool = False) -> Concept:
    """A concept from a file, or a folder of files, that another tool wrote for this model.

    Args:
        path: a .safetensors, .bin, .pt, .pth or .ckpt file, or a folder of them.
        model: the base model; names and shapes are checked against it.
        token: the word to call the subject by; default: the file's own.
        force: leave out what the files hold beyond this package's knowledge, and take a concept that changes nothing.
    """
    path = Path(path).expanduser()
    layers, base = LayerNames(model), BaseWeights(model)
    tensors: dict[str, Tensor] = {}
    words: dict[str, list[Tensor]] = {}
    unknown: list[str] = []
    headers: dict[str, str] = {}
    for file in _files(path):
        raw, header = read_file(file)
        if header.get("format") == FORMAT:
            own = load_concept(file, model, force)
            return own if token is None else own.renamed(token)
        found = _recognized(raw, file, layers)
        tensors |= _converted(found, file, base, header)
        words |= _words(found, file, model)
        unknown += found.unknown
        headers |= header
    if unknown and not force:
        raise ValueError(
            f"{path} holds tensors for no layer of this model ({listed(unknown)}); "
            "if it was made for this model, force=True leaves them out"
        )
    if not tensors and not words:
        raise ValueError(f"{path} holds nothing that this package knows: no LoRA, Custom Diffusion or embedding")
    concept = _named(tensors, words, headers, model, path.stem, token)
    if unknown:
        concept.meta["left_out"] = ", ".join(unknown)
    check_fits(concept, model, str(path))
    if not force:
        check_differs(concept, model, str(path))
    return concept


def _files(path: Path) -> list[Path]:
    """The file, or a folder's files; of one in both forms the safetensors."""
    if not path.is_dir():
        return [path]
    if (path / "model_index.json").is_file():
        raise ValueError(f"{path} is a whole model: use it as the base model itself (load_model)")
    files = sorted([*path.glob("*.safetensors"), *path.glob("embeddings/*.safetensors")])
    stems = {file.stem for file in files}
    files += sorted(f for f in path.iterdir() if f.suffix in PICKLES and f.stem not in stems)
    if not files:
        raise ValueError(f"{path} has no safetensors and no .bin or .pt file")
    return files


def read_file(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's tensors (and, of a pickle, its few strings) by their full names, and its header."""
    if file.suffix not in PICKLES or not file.is_file():
        return read_safetensors(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        reason = " ".join(str(error).split())[:QUOTED]
        raise ValueError(
            f"{file} is a pickle of more than tensors ({reason}); reading it could run code, so it is refused: "
            "convert it to safetensors"
        ) from None
    flat: dict[str, Any] = {}
    _flatten(content if isinstance(content, Mapping) else {"": content}, "", flat)
    for name, value in flat.items():
        if isinstance(value, Tensor):
            check_finite(file, name, value)
    return flat, {}


def _flatten(content: Mapping[Any, Any], prefix: str, into: dict[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, Mapping):
            _flatten(value, f"{prefix}{key}.", into)
        else:
            into[f"{prefix}{key}"] = value.detach() if isinstance(value, Tensor) else value


def _recognized(raw: dict[str, Any], file: Path, layers: LayerNames) -> _Found:
    found = _Found()
    tensors = {name: t for name, t in raw.items() if isinstance(t, Tensor)}
    if "string_to_param.*" in tensors:  # A1111's and the first textual inversions: one word, beside training's records
        name = raw.get("name") or next(iter(k.split(".", 1)[1] for k in raw if k.startswith("string_to_token.")), "")
        found.words[file.stem if name in ("", "*") else str(name)][0] = tensors["string_to_param.*"]
        return found
    if tensors.keys() & ROW_NAMES.keys():
        for name, tensor in tensors.items():
            if name in ROW_NAMES:
                found.words[file.stem][ROW_NAMES[name]] = tensor
            else:
                found.unknown.append(name)
        return found
    for name, tensor in tensors.items():
        _place(name, tensor, found, layers)
    if not found.layers and not found.tensors and not found.words and not layers_alike(found.unknown):
        for name in found.unknown:  # diffusers' textual inversions: the word is the key
            found.words[name or file.stem][0] = tensors[name]
        found.unknown = []
    return found


def layers_alike(names: list[str]) -> bool:
    """Whether names look like a network's: dotted, or ending as weights do."""
    return any(re.search(r"\.(weight|bias|alpha|diff|hada_\w+|lokr_\w+)$|^lora_|_embedding", name) for name in names)


def _place(name: str, tensor: Tensor, found: _Found, layers: LayerNames) -> None:
    bundled, custom = BUNDLED.fullmatch(name), CUSTOM.fullmatch(name)
    if bundled:
        found.words[bundled[1]][ROW_NAMES[bundled[2]]] = tensor
        return
    if custom:
        where = layers.find(custom[1].removeprefix(f"{UNET}.") + f".{custom[2]}{'.0' * (custom[2] == 'to_out')}")
        if where is None:
            found.unknown.append(name)
        else:
            found.tensors[value_name(where[0], f"{where[1]}.{custom[4]}")] = tensor
        return
    if tensor.numel() == 0 and name.endswith((".attn1.processor", ".attn2.processor")):
        return  # Custom Diffusion's sign for a layer it left alone
    for ending, kind in ENDINGS:
        match = ending.search(name)
        where = layers.find(module_name(name[: match.start()])) if match else None
        if where is not None:
            found.layers[where][kind] = tensor
            return
    found.unknown.append(name)


def module_name(stem: str) -> str:
    """A layer's name without what older and newer writers put around it."""
    stem = stem.removeprefix("base_model.model.").replace(".processor.", ".").removesuffix(".processor")
    for old, new in OLD_TEXT_NAMES.items():
        stem = stem.replace(old, new)
    return f"{stem}.0" if stem.endswith(".to_out") else stem


def _converted(found: _Found, file: Path, base: BaseWeights, header: dict[str, str]) -> dict[str, Tensor]:
    """The contents by a concept's names, in float32, each shape checked against the model."""
    scale_of, tensors = header_scale(header, file), {}
    for (part, module), own in found.layers.items():
        for key, parameter in DIFFERENCES.items():
            if key in own:
                tensors[difference_name(part, f"{module}.{parameter}")] = own[key].float()
        if not own.keys() & {"down", "up", "mid"}:
            continue
        lacking = {"down", "up"} - own.keys()
        if lacking:
            raise ValueError(f"{file}: the layer '{part}.{module}' has no {lacking.pop()!r} half of its low-rank pair")
        down, up = own["down"].float(), own["up"].float()
        rank = down.shape[0]
        alpha = own.get("alpha")
        scale = scale_of(part, module, rank) if alpha is None else float(alpha) / rank
        tensors |= _pair(part, module, (down, up * scale, own.get("mid")), file, base)
    tensors |= {name: value.float() for name, value in found.tensors.items()}
    return {name: _shaped(name, value, file, base) for name, value in tensors.items()}


def _shaped(name: str, value: Tensor, file: Path, base: BaseWeights) -> Tensor:
    """A whole value or a difference in the shape of its parameter; half of a pair as it is."""
    slot = parse(name)
    if slot.kind is Kind.PAIR:
        return value
    weight = base.parameters.get(slot.path)
    if weight is not None and value.numel() == weight.numel() and value.dim() != weight.dim():
        value = value.reshape(weight.shape)
    if weight is None or weight.shape != value.shape:
        here = "nothing" if weight is None else list(weight.shape)
        raise ValueError(f"{file}: {spell(slot)!r} has shape {list(value.shape)}; this model has {here} there")
    return value


def _pair(
    part: Part, module: str, factors: tuple[Tensor, Tensor, Tensor | None], file: Path, base: BaseWeights
) -> dict[str, Tensor]:
    """A low-rank pair; the difference it makes where no pair can sit.

    factors: down and up, and LyCORIS's middle one of a convolution, or None.
    """
    down, up, mid = factors
    path = f"{part}.{module}"
    weight = base.parameters[f"{path}.weight"]
    c_out, c_in = weight.shape[:2]
    if up.shape[0] != c_out or down.shape[1] != c_in or (mid is None and up.flatten(1).shape[1] != down.shape[0]):
        raise ValueError(
            f"{file}: {path!r} has a pair of shapes {list(down.shape)} and {list(up.shape)}; "
            f"this model's weight there is {list(weight.shape)}"
        )
    if mid is not None:
        product = torch.einsum("or,rskl,si->oikl", up.flatten(1), mid.float(), down.flatten(1))  # [O, I, kh, kw]
    elif base.takes_residual(path):
        halves = (down.flatten(1).contiguous(), up.flatten(1).contiguous())
        return dict(zip(pair_names(part, module), halves, strict=True))
    else:
        product = (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])  # [O, I, kh, kw]
    return {difference_name(part, f"{module}.weight"): product.contiguous()}


def header_scale(header: dict[str, str], file: Path) -> Scale:
    """alpha / rank of each layer by the header that diffusers writes; 1 without one, as diffusers has it."""
    try:
        fields = json.loads(header.get("lora_adapter_metadata", "{}"))
        if not isinstance(fields, dict):
            raise ValueError("expected a JSON object")
    except ValueError as error:
        raise ValueError(f"{file}: the header's lora_adapter_metadata cannot be read ({error})") from None

    def scale(part: Part, module: str, rank: int) -> float:
        alpha = fields.get(f"{part}.lora_alpha")
        for pattern, value in (fields.get(f"{part}.alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if fields.get(f"{part}.use_rslora") else rank)

    return scale


def _words(found: _Found, file: Path, model: Model) -> dict[str, list[Tensor]]:
    widths = text_widths(model)
    words = {}
    for word, rows in found.words.items():
        own = [r.float()[None] if r.dim() == 1 else r.float() for _, r in sorted(rows.items())]
        shapes = [list(r.shape) for r in own]
        if [s[-1] for s in shapes if len(s) == 2] != widths:
            raise ValueError(
                f"{file}: the token embeddings of {word!r} have shapes {shapes}; this model's text width is {widths}"
            )
        words[word] = own
    return words


def _named(
    tensors: dict[str, Tensor],
    words: dict[str, list[Tensor]],
    header: dict[str, str],
    model: Model,
    title: str,
    token: str | None,
) -> Concept:
    kv = all(".attn2." in name and name.endswith((".weight", ".bias")) for name in tensors)
    method = "textual_inversion" if not tensors else "custom_diffusion" if kv else "lora"
    meta = {"title": header.get("modelspec.title", title), "base_name": model.name}
    meta |= {"family": family(model.unet.settings), "prediction": model.schedule.prediction}
    meta |= {ours: header[theirs] for theirs, ours in TAKEN_OVER.items() if theirs in header}
    subject, _, class_word = header.get("modelspec.trigger_phrase", "").partition(" ")
    words = {subject if word == f"v-{file_part(subject)}" else word: rows for word, rows in words.items()}
    if len(words) == 1:
        subject = next(iter(words)) if subject not in words else subject
    if subject:
        meta |= {"token": subject} | ({"class_word": class_word} if class_word else {})
    concept = Concept(method, tensors, words, meta, fingerprint(model))
    return concept if token is None or token == concept.token else concept.renamed(token)
