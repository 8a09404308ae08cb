"""Stage 1: the autoencoder, 64x64x3 <-> 16x16x8; then its latents are decorrelated, so that scaling_factor is 1.

Loss: L1 + 4 MSE + 0.5 L1 of the picture gradients + 5e-4 KL. Most of the time is spent on 32x32 crops (the network is
convolutional, so four crops teach more than one whole picture), the end on whole pictures.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..common import to_tensor
from .budget import Budget, Progress, device, load_checkpoint, save_checkpoint

Bytes: TypeAlias = NDArray[np.uint8]

WIDTHS, LATENT = (16, 48, 96), 8
FLOOR = 0.5  # the smallest standard deviation of a latent channel; the largest is 1
# Crops of CROP pixels a side until WHOLE_AFTER of the budget, whole pictures after it.
CROP, CROP_BATCH, WHOLE_BATCH, WHOLE_AFTER = 32, 32, 12, 0.7
SAVE_EVERY = 60.0  # seconds of training that a kill may lose


def build_vae() -> Any:
    """diffusers' AutoencoderKL with first weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def vae_loss(y: Tensor, x: Tensor, posterior: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the plain squared error on [-1, 1].

    Args:
        y: reconstruction of x.
        x: pictures [B, 3, H, W].
        posterior: diffusers' distribution of their latents.
    """
    mse = F.mse_loss(y, x)
    (down, across), (x_down, x_across) = gradients(y), gradients(x)
    edges = F.l1_loss(down, x_down) + F.l1_loss(across, x_across)
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return F.l1_loss(y, x) + 4 * mse + 0.5 * edges + 5e-4 * kl, mse


def draw_batch(pictures: Bytes, rng: np.random.Generator, whole: bool) -> Tensor:
    """Random whole pictures, or one random crop from each of more pictures."""
    pick = np.sort(rng.integers(0, len(pictures), WHOLE_BATCH if whole else CROP_BATCH))
    if whole:
        return to_tensor(pictures[pick])
    corners = rng.integers(0, pictures.shape[1] - CROP + 1, (len(pick), 2))
    crops = [pictures[i, a : a + CROP, b : b + CROP] for i, (a, b) in zip(pick, corners, strict=True)]
    return to_tensor(np.stack(crops))


def train_vae(
    pictures: Bytes,
    cache: str | Path,
    minutes: float,
    lr: float = 2e-3,
    seed: int = 0,
    report: Callable[[str], object] = print,
) -> Any:
    """Train the autoencoder, or resume it.

    Args:
        pictures: the training set [N, H, W, 3].
        cache: folder of the checkpoint.
        minutes: training time, that of earlier runs included.
        lr: learning rate after the warm-up.
        seed: of the first weights and of the batches.
        report: told of the progress.

    Returns:
        diffusers' AutoencoderKL with whitened latents.
    """
    torch.manual_seed(seed)
    where, file = device(), f"{cache}/vae.ckpt"
    vae = build_vae().train().to(where)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    state = load_checkpoint(file)
    step, spent = 0, 0.0
    if state:
        vae.load_state_dict(state["model"])
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    budget, rng = Budget(minutes, spent), np.random.default_rng([seed, step])
    progress, saved = Progress("vae", budget, report=report), budget.spent
    while not budget.over:
        x = draw_batch(pictures, rng, budget.share > WHOLE_AFTER).to(where)
        with torch.autocast(where.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        loss, mse = vae_loss(y.float(), x, posterior)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * budget.factor(step)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        budget.tick()
        progress.update(step, len(x), loss=loss.item(), psnr=10 * np.log10(4 / mse.item()))
        if budget.spent - saved > SAVE_EVERY or budget.over:
            saved = budget.spent
            kept = {"model": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint({**kept, "step": step, "spent": budget.spent}, file)
    return whiten(vae.eval().cpu(), pictures)


@torch.no_grad()
def whiten(vae: Any, pictures: Bytes, count: int = 2048) -> Any:
    """Fold a PCA of `count` pictures' latents into quant_conv and its inverse into post_quant_conv; return the VAE.

    The reconstructions stay, the latents' channels lose their correlations.

    The first channel gets deviation 1; fainter ones keep some of their faintness (the fourth root of their share of the
    variance, at least FLOOR), so that fine detail is drawn last and does not compete with shape in the loss.
    """
    chosen = pictures[np.sort(np.random.default_rng(1).choice(len(pictures), min(count, len(pictures)), replace=False))]
    means, variances = [], []
    for block in np.array_split(chosen, max(1, len(chosen) // 64)):
        posterior = vae.encode(to_tensor(block)).latent_dist
        means.append(posterior.mean.double().permute(1, 0, 2, 3).flatten(1))
        variances.append(posterior.var.double().permute(1, 0, 2, 3).flatten(1))
    z, noise = torch.cat(means, 1), torch.cat(variances, 1).mean(1)
    mu = z.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh((z - mu) @ (z - mu).T / z.shape[1])
    deviation = (values / values.max()).pow(0.25).clamp_min(FLOOR)
    forward = (vectors * (deviation / values.sqrt())).T.flip(0)
    backward = torch.linalg.inv(forward)
    c = len(mu)
    into, out = vae.quant_conv, vae.post_quant_conv
    weight, bias = into.weight.double().flatten(1), into.bias.double()
    new_weight, new_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    new_weight[:c] = forward @ weight[:c]
    new_bias[:c] = forward @ (bias[:c] - mu[:, 0])
    # The rotated posterior is not diagonal; its average diagonal is kept as one constant per channel.
    new_bias[c:] = (forward**2 @ noise).log()
    into.weight.copy_(new_weight.view_as(into.weight))
    into.bias.copy_(new_bias)
    weight, bias = out.weight.double().flatten(1), out.bias.double()
    out.weight.copy_((weight @ backward).view_as(out.weight))
    out.bias.copy_(weight @ mu[:, 0] + bias)
    return vae


@torch.no_grad()
def encode_set(
    vae: Any, pictures: Bytes, path: str | Path, report: Callable[[str], object] = print
) -> NDArray[np.float16]:
    """Write the latent means of every picture, float16 [N, C, 16, 16], and return them as a memory map."""
    latents = np.lib.format.open_memmap(
        f"{path}.part", mode="w+", dtype=np.float16, shape=(len(pictures), LATENT, 16, 16)
    )
    where = device()
    vae.to(where)
    for start in range(0, len(pictures), 256):
        with torch.autocast(where.type, torch.bfloat16):
            block = vae.encode(to_tensor(pictures[start : start + 256]).to(where)).latent_dist.mean
        latents[start : start + 256] = block.float().cpu().numpy()
        if start % 12800 == 0:
            report(f"encoded {start} of {len(pictures)}")
    latents.flush()
    os.replace(f"{path}.part", path)
    return np.load(path, mmap_mode="r")
