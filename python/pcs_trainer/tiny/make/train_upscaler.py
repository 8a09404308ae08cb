"""An up-scaler of the tiny world, 16 x 16 pixels to 64 x 64:  python -m pcs_trainer.tiny.make.train_upscaler --help

A small UNet on the embedded model's autoencoder and text encoder, trained to draw a picture's latents from the picture
reduced to a quarter of each side, with noise of a random low level on it. It resumes where it stopped. Its weights
are not in the package: benchmarks/super_resolution.py makes them when they are wanted.

Letters: N pictures of the training set, B of a batch.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.autoencoder import encode_images
from ...model.model import Model, load_model
from ...model.schedule import Schedule
from ...model.sources import TINY
from ...model.text import encode
from ...model.upscaler import reduced
from ...unet.unet import UNet
from ..training_set import training_captions, training_scene
from ..world import render
from .budget import Budget, Progress, load_checkpoint, save_checkpoint
from .networks import UNET as EMBEDDED
from .train_unet import EMPTY_SHARE, Average

say = partial(print, flush=True)
LEVELS = 50  # of noise on the small picture in training: a variance of up to 0.03, as diffusers' default of 20 is 0.006
CONFIG: dict[str, Any] = EMBEDDED | {
    "in_channels": 11,
    "block_out_channels": (32, 48),  # 0.68 million parameters: 150 samples a second on one core
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "only_cross_attention": (True, False),
    "use_linear_projection": True,
    "num_class_embeds": 64,
}
LOW_RES = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
LOW_RES |= {"num_train_timesteps": 1000, "prediction_type": "epsilon"}
RATE, BATCH, SAVE_EVERY = 1e-3, 32, 60.0  # the embedded model's rate; seconds of training that a kill may lose


class Samples:
    """The training set: latents [N, C, h, w], small pictures [N, 3, h, w], and the text states [N, T, width]."""

    def __init__(self, model: Model, count: int) -> None:
        scenes = [training_scene(i) for i in range(count)]
        pictures = [render(s) for s in scenes]
        self.latents = encode_images(model, pictures, batch=64).mean
        self.small = torch.stack([reduced(p, 4) for p in pictures])
        said = [training_captions(i, s)[0] for i, s in enumerate(scenes)]
        with torch.no_grad():
            parts = [encode(model, said[i : i + 256]).states for i in range(0, count, 256)]
            self.texts = torch.cat([part for part in parts if isinstance(part, Tensor)])
            empty = encode(model, [""]).states
        assert isinstance(empty, Tensor)
        self.empty = empty

    def draw(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, small pictures and text states of random samples, some of them with the empty text's."""
        pick = torch.randint(len(self.latents), (size,))
        texts = self.texts[pick]
        texts[torch.rand(size) < EMPTY_SHARE] = self.empty
        return self.latents[pick], self.small[pick], texts


def upscaler_loss(
    unet: UNet, schedule: Schedule, low: Schedule, latents: Tensor, small: Tensor, text: Tensor
) -> Tensor:
    """Mean squared error of the velocity; timesteps are spread evenly over the batch, levels of noise are random."""
    count = len(latents)
    t = ((torch.arange(count) + torch.rand(count)) * (len(schedule) / count)).long()
    level, noise = torch.randint(LEVELS, (count,)), torch.randn_like(latents)
    beside = low.add_noise(small, torch.randn_like(small), level)
    x = torch.cat([schedule.add_noise(latents, noise, t), beside], dim=1)
    said = unet(x, t, text, {"class_labels": level})
    assert isinstance(said, Tensor)
    return F.mse_loss(said, schedule.target(latents, noise, t))


def train_upscaler(cache: Path, minutes: float, pictures: int, seed: int = 0) -> UNet:
    """The averaged UNet after so many minutes, those of earlier runs included."""
    torch.manual_seed(seed)
    model = load_model("tiny", torch.float32)
    unet = UNet.from_config(CONFIG).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    average, step, spent = Average(unet.parameters()), 0, 0.0
    state = load_checkpoint(cache / "upscaler.ckpt")
    if state is not None:
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, step, spent = state["average"], state["step"], state["spent"]
    budget = Budget(minutes, spent)
    if not budget.over:
        torch.manual_seed(seed + step + 1)
        samples = Samples(model, pictures)
        say(f"{sum(p.numel() for p in unet.parameters()):,} parameters, {pictures} pictures")
        schedule, low = model.schedule, Schedule.from_config(LOW_RES)
        progress, saved = Progress("up-scaler", budget, 30.0, say), spent
        budget = progress.budget = Budget(minutes, spent)  # the pictures' time is not training
        while not budget.over:
            loss = upscaler_loss(unet, schedule, low, *samples.draw(BATCH))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = RATE * budget.factor(step)
            optimizer.step()
            average.update(step)
            step += 1
            budget.tick()
            progress.update(step, BATCH, loss=float(loss.detach()))
            if budget.spent - saved > SAVE_EVERY or budget.over:
                saved = budget.spent
                now = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values}
                save_checkpoint(now | {"step": step, "spent": budget.spent}, cache / "upscaler.ckpt")
    say(f"trained for {step} steps of {BATCH}")
    average.swap()
    return unet.eval()


def write_upscaler(folder: Path, unet: UNet) -> None:
    """The up-scaler as a folder in diffusers' layout, whole or not at all."""
    from safetensors.torch import save_file

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name in ("text_encoder", "tokenizer", "vae", "scheduler"):
        shutil.copytree(TINY / name, part / name)
    for name in ("unet", "low_res_scheduler"):
        (part / name).mkdir()
    config = {"_class_name": "UNet2DConditionModel"} | CONFIG
    (part / "unet" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: p.detach().contiguous() for name, p in unet.state_dict().items()}
    save_file(weights, part / "unet" / "diffusion_pytorch_model.safetensors")
    (part / "low_res_scheduler" / "scheduler_config.json").write_text(json.dumps(LOW_RES, indent=2) + "\n")
    index = {"_class_name": "StableDiffusionUpscalePipeline", "max_noise_level": LEVELS - 1}
    (part / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def main() -> None:
    """Train and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, type=Path, help="folder of the checkpoint and of the model, x4")
    parser.add_argument("--minutes", type=float, default=15, help="training time over all runs (default: 15)")
    parser.add_argument("--pictures", type=int, default=10_000, help="size of the training set (default: 10000)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    write_upscaler(options.cache / "x4", train_upscaler(options.cache, options.minutes, options.pictures))


if __name__ == "__main__":
    main()
