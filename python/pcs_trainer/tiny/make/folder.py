"""Write the trained parts as a folder that diffusers' StableDiffusionPipeline reads, and sample with such parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...concept.formats.portable import make_portable
from ..common import to_pictures
from .networks import SCHEDULE, alphas

GUIDANCE, STEPS = 5.0, 25  # of every number on the model card


def write_folder(folder: Path, vae: Any, text: Any, tokenizer: Any, unet: Any, tokenizer_files: Path) -> None:
    """Write fp16 safetensors in diffusers' layout; the folder is written beside its place and moved there whole.

    Args:
        folder: where the model goes; a README.md that is there stays.
        vae, text, tokenizer, unet: diffusers' and transformers' objects.
        tokenizer_files: folder of vocab.json and merges.txt.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline: Any = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(part, safe_serialization=True)
    make_portable(part)
    for name in ("vocab.json", "merges.txt"):  # older transformers read these instead of tokenizer.json
        shutil.copy(tokenizer_files / name, part / "tokenizer" / name)
    if (folder / "README.md").exists():
        shutil.copy(folder / "README.md", part / "README.md")
    for file in part.rglob("*.safetensors"):
        file.chmod(0o644)
    for file in part.rglob("config.json"):  # remove local paths (privacy)
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


class Parts:
    """Tokenizer, text encoder, UNet and autoencoder in fp32, and the sampler that the card's numbers are made with."""

    def __init__(self, tokenizer: Any, text: Any, unet: Any, vae: Any) -> None:
        self.tokenizer, self.text, self.unet, self.vae = tokenizer, text.eval(), unet.eval(), vae.eval()

    @classmethod
    def load(cls, folder: str | Path) -> Parts:
        """The parts of a diffusers folder in fp32, the UNet on the package's own kernels."""
        from ...model.model import load_model

        model = load_model(folder, dtype=torch.float32)
        return cls(model.tokenizer, model.text_encoder, model.unet, model.vae)

    def states(self, captions: Sequence[str]) -> Tensor:
        """The text encoder's states [N, T, C] of captions."""
        ids = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text(ids).last_hidden_state

    @torch.no_grad()
    def draw(
        self, captions: Sequence[str], seed: int = 0, guidance: float = GUIDANCE, steps: int = STEPS, bf16: bool = False
    ) -> NDArray[np.uint8]:
        """Sample with DDIM, trailing timesteps and classifier-free guidance.

        Args:
            captions: one a picture.
            seed: of the initial noise.
            guidance: scale of classifier-free guidance.
            steps: number of sampling steps.
            bf16: compute in bfloat16 where autocast does.

        Returns:
            uint8 [N, 64, 64, 3].
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return to_pictures(self.vae.decode(self._latents(captions, seed, guidance, steps)).sample)

    def _latents(self, captions: Sequence[str], seed: int, guidance: float, steps: int) -> Tensor:
        abar = torch.cat([alphas(), torch.ones(1)])  # index -1 is the clean end
        times = torch.arange(1000, 0, -1000 / steps).round().long() - 1
        both = torch.cat([self.states([""]).expand(len(captions), -1, -1), self.states(captions)])
        channels, size = self.unet.config["in_channels"], self.unet.config["sample_size"]
        x = torch.randn(len(captions), channels, size, size, generator=torch.Generator().manual_seed(seed))
        for t, after in zip(times, [*times[1:], torch.tensor(-1)], strict=True):
            without, given = self.unet(torch.cat([x, x]), t.expand(2 * len(x)), both).float().chunk(2)
            v = without + guidance * (given - without)
            a, b = abar[t], abar[after]
            clean = a.sqrt() * x - (1 - a).sqrt() * v
            direction = a.sqrt() * v + (1 - a).sqrt() * x
            x = b.sqrt() * clean + (1 - b).sqrt() * direction
        return x
