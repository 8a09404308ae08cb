"""Stage 1: the autoencoder, 64x64x3 <-> 16x16x8; then its latents are decorrelated, so that scaling_factor is 1.

Loss: L1 + 4 MSE + 0.5 L1 of the picture gradients + 5e-4 KL. Most of the time is spent on 32x32 crops (the network is
convolutional, so four crops teach more than one whole picture), the end on whole pictures.
"""

import numpy as np
import torch
import torch.nn.functional as F

from ..common import Budget, Progress, device, load_checkpoint, save_whole, to_tensor

WIDTHS, LATENT = (16, 48, 96), 8
FLOOR = 0.5  # the smallest standard deviation of a latent channel; the largest is 1
CROP, CROP_BATCH, WHOLE_BATCH, WHOLE_AFTER = 32, 32, 12, 0.7


def build_vae():
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


def gradients(x):
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def vae_loss(y, x, posterior):
    """Returns the loss and the plain squared error on [-1, 1]."""
    mse = F.mse_loss(y, x)
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x), strict=True))
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return F.l1_loss(y, x) + 4 * mse + 0.5 * edges + 5e-4 * kl, mse


def draw_batch(pictures, rng, whole):
    """Random whole pictures, or one random crop from each of more pictures."""
    pick = np.sort(rng.integers(0, len(pictures), WHOLE_BATCH if whole else CROP_BATCH))
    if whole:
        return to_tensor(pictures[pick])
    corners = rng.integers(0, pictures.shape[1] - CROP + 1, (len(pick), 2))
    crops = [pictures[i, a : a + CROP, b : b + CROP] for i, (a, b) in zip(pick, corners, strict=True)]
    return to_tensor(np.stack(crops))


def train_vae(pictures, cache, minutes, lr=2e-3, seed=0, report=print):
    """Train (or resume) for ``minutes`` in all; returns the autoencoder with whitened latents."""
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
        if budget.spent - saved > 60 or budget.over:
            saved = budget.spent
            save_whole(
                {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": budget.spent},
                file,
            )
    return whiten(vae.eval().cpu(), pictures)


@torch.no_grad()
def whiten(vae, pictures, count=2048):
    """Fold a PCA of the latents into quant_conv and its inverse into post_quant_conv: same pictures, no correlations.

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
def encode_set(vae, pictures, path, report=print):
    """The latent means of every picture, float16 (N, C, 16, 16), written once."""
    import os

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
