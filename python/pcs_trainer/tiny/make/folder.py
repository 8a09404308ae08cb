"""Writes the trained parts as a folder that diffusers' StableDiffusionPipeline reads, and draws with such parts."""

import json
import shutil
from pathlib import Path

import torch

from ..common import to_pictures
from .train_unet import SCHEDULE, alphas

GUIDANCE, STEPS = 5.0, 25


def write_folder(folder, vae, text, tokenizer, unet, tokenizer_files):
    """fp16 safetensors in diffusers' layout; the folder is written beside its place and moved there whole."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
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
    for name in ("vocab.json", "merges.txt"):  # older transformers read these instead of tokenizer.json
        shutil.copy(Path(tokenizer_files) / name, part / "tokenizer" / name)
    if (folder / "README.md").exists():
        shutil.copy(folder / "README.md", part / "README.md")
    for file in part.rglob("*.safetensors"):
        file.chmod(0o644)
    for file in part.rglob("config.json"):  # where the parts were read from is nobody's business
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


class Parts:
    """Tokenizer, text encoder, UNet and autoencoder in fp32, ready to draw."""

    def __init__(self, tokenizer, text, unet, vae):
        self.tokenizer, self.text, self.unet, self.vae = tokenizer, text.eval(), unet.eval(), vae.eval()

    @classmethod
    def load(cls, folder):
        """The parts of a diffusers folder in fp32, the UNet on the package's own kernels."""
        from ...model.model import load_model

        model = load_model(folder, dtype=torch.float32)
        return cls(model.tokenizer, model.text_encoder, model.unet, model.vae)

    def states(self, captions):
        ids = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text(ids).last_hidden_state

    @torch.no_grad()
    def draw(self, captions, seed=0, guidance=GUIDANCE, steps=STEPS, noise=None, bf16=False):
        """DDIM with trailing timesteps and classifier-free guidance; uint8 (N, 64, 64, 3)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            latents = self.draw_latents(captions, seed, guidance, steps, noise)
            return to_pictures(self.vae.decode(latents).sample)

    def draw_latents(self, captions, seed, guidance, steps, noise):
        abar = torch.cat([alphas(), torch.ones(1)])  # index -1 is the clean end
        times = torch.arange(1000, 0, -1000 / steps).round().long() - 1
        both = torch.cat([self.states([""]).expand(len(captions), -1, -1), self.states(captions)])
        if noise is None:
            size = self.unet.config["sample_size"]
            noise = torch.randn(
                len(captions),
                self.unet.config["in_channels"],
                size,
                size,
                generator=torch.Generator().manual_seed(seed),
            )
        x = noise
        for t, after in zip(times, [*times[1:], torch.tensor(-1)], strict=True):
            without, given = self.unet(torch.cat([x, x]), t.expand(2 * len(x)), both).float().chunk(2)
            v = without + guidance * (given - without)
            a, b = abar[t], abar[after]
            clean = a.sqrt() * x - (1 - a).sqrt() * v
            direction = a.sqrt() * v + (1 - a).sqrt() * x
            x = b.sqrt() * clean + (1 - b).sqrt() * direction
        return x
