"""What is planned for: the configurations of a model's networks, found without loading any weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ..concept.grammar import TEXT_PARTS
from ..model.model import Model
from ..model.sources import Folder, find_source, read_json
from ..unet.unet import UNet

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
# The text encoders of the known families, by the width of the text states; for a UNet that comes without any.
KNOWN_TEXT: dict[int, list[dict[str, Any]]] = {
    768: [CLIP_L],
    1024: [CLIP_H],
    2048: [CLIP_L, CLIP_G | {"projection_dim": 1280, "architectures": ["CLIPTextModelWithProjection"]}],
}
# The autoencoder of all of them, for a UNet that comes without one.
KNOWN_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Networks:
    """The configurations of a model's networks, and how many pixels a latent one stands for."""

    unet: dict[str, Any]
    text: list[dict[str, Any]]
    pixels: int = 8
    vae: dict[str, Any] = field(default_factory=lambda: dict(KNOWN_VAE))
    folder: Path | None = None  # of the UNet's files, where it is known

    @property
    def resolution(self) -> int:
        """The side of the pictures that the model was made for."""
        return (self.unet.get("sample_size") or 64) * self.pixels


def networks_of(model: Any) -> Networks:
    """The configurations of a Model, a UNet, a folder, a hub name or a configuration; nothing is loaded.

    A configuration is a UNet's, or {"unet": ..., "text_encoder": ..., "vae": ...} with what is known of it.
    """
    if isinstance(model, UNet):
        return _with_text(model.config, [])
    if isinstance(model, dict):
        text = model.get("text_encoder", [])
        return _with_text(model.get("unet", model), [text] if isinstance(text, dict) else list(text), model.get("vae"))
    if isinstance(model, (str, Path)) and (Path(model) / "config.json").is_file():
        return _with_text(read_json(Path(model) / "config.json"), [])
    if isinstance(model, (str, Path)):
        source = find_source(model, None, fp16=True)
        model = Model(source, None, "cpu")
    if not isinstance(model, Model):
        kinds = "a Model, a UNet, a folder, a hub name or a UNet's configuration"
        raise ValueError(f"model must be {kinds}, not {type(model).__name__}")
    if not isinstance(model.source, Folder):
        return _of_file(model)
    source = model.source
    text = [read_json(source.part(n) / "config.json") for n in TEXT_PARTS if source.has(n)]
    vae = read_json(source.part("vae") / "config.json") if source.has("vae") else None
    folder = source.part("unet")
    return replace(_with_text(read_json(folder / "config.json"), text, vae), folder=folder)


def _of_file(model: Model) -> Networks:
    """Of a checkpoint file, which says what is in it only when it is read whole: on the CPU, as a GPU may not hold it.

    There it is read for this alone, once.
    """
    found = _read.get(model.source)
    if found is None:
        own = model if model.device == "cpu" else Model(model.source, model.dtype, "cpu")
        encoders = [encoder.config.to_dict() for encoder in own.text_encoders]
        found = _read[model.source] = _with_text(own.unet.config, encoders, dict(own.vae.config))
    return found


_read: WeakKeyDictionary[object, Networks] = WeakKeyDictionary()


def _with_text(unet: dict[str, Any], text: list[dict[str, Any]], vae: dict[str, Any] | None = None) -> Networks:
    vae = dict(vae or KNOWN_VAE)
    pixels = 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)
    width = unet.get("cross_attention_dim", 1280)  # diffusers' default
    known = KNOWN_TEXT.get(width if isinstance(width, int) else width[0], [])
    return Networks(dict(unet), text or known, pixels, vae)
