"""DreamBooth (arXiv 2208.12242): a rare word is bound to the subject by training the whole UNet.

Trains   every tensor of the UNet, on request the text encoder's too; "dreambooth_lora": low-rank residuals W + B A on
         to_q, to_k, to_v and to_out.0 of all attention instead.
Loss     E |eps_hat(x_t, t, "a [V] [class]") - eps|^2 + lambda E |eps_hat(x'_t', t', "a [class]") - eps'|^2   (eq. 2)
         with pictures x' of the class that the frozen model drew, lambda = 1; each half has its own t and noise.
Default  800 steps of 1 + 1 pictures, 5e-6, AdamW, gradients clipped to norm 1; LoRA: rank 4, 1e-4, 500 steps.

stage="super_resolution" trains an up-scaler, a UNet that reads a small picture in further channels, with the noise
on that picture cut to `noise_level` (section 3.3): more of it blurs the subject's detail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import full_value, rank_and_world
from ..model.text import file_name
from ..unet.layers import Linear, LowRank, replace_data
from . import Learner, add_words, subject_rows, train_weights

if TYPE_CHECKING:
    from ..model.model import Model
    from ..settings import Settings

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def setup(model: Model, s: Settings) -> Learner:
    learner = Learner({}, lambda: {})
    if s.method == "dreambooth":
        whole_unet(model, learner)
    else:
        attention_residuals(model, s, learner)
    if s.train_text_encoder:
        whole_text_encoder(model, learner)
    add_words(learner, subject_rows(model, s), s.train_token)
    learner.tensors = lambda: {
        n: full_value(p.detach()).cpu().clone(memory_format=torch.contiguous_format)
        for n, p in learner.parameters.items()
        if not n.startswith("word.")
    }
    return learner


def whole_unet(model: Model, learner: Learner) -> None:
    """Every tensor, in place: what they were is read from the model's files again, and kept nowhere."""
    learner.whole = True
    for name, parameter in model.unet.named_parameters():
        if parameter.ndim == 4 and rank_and_world()[1] == 1:  # the memory in which a convolution's gradient comes
            replace_data(parameter, parameter.data.contiguous(memory_format=torch.channels_last))
        learner.parameters[f"unet.{name}"] = parameter.requires_grad_(True)
    learner.undo.append(lambda: model.release("unet"))


def whole_text_encoder(model: Model, learner: Learner) -> None:
    parts = ("text_encoder", "text_encoder_2")
    for part, encoder in zip(parts, model.text_encoders, strict=False):
        named = {f"{part}.{file_name(n)}": p for n, p in encoder.named_parameters()}
        train_weights(named, learner, masters=False)
    learner.text_trains = True


def attention_residuals(model: Model, s: Settings, learner: Learner) -> None:
    """down ~ N(0, 1 / rank), up = 0 on every projection of every attention."""
    generator = torch.Generator().manual_seed(s.seed)
    for name, layer in model.unet.named_modules():
        if isinstance(layer, Linear) and name.endswith(PROJECTIONS) and (".attn1." in name or ".attn2." in name):
            down, up = fresh_pair(layer, s.rank, s.init, generator)
            model.unet.attach(name, LowRank(down, up, key="learning"))
            learner.parameters |= {f"unet.{name}.down": down, f"unet.{name}.up": up}
    learner.undo.append(lambda: model.unet.detach("learning"))


def fresh_pair(layer: nn.Module, rank: int, init: str, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """A residual that starts as nothing (init "zero_up"), or both halves random and small ("both_random")."""
    weight = layer.weight
    c_out, c_in = weight.shape[:2]
    down = torch.randn(rank, c_in, generator=generator) * rank**-0.5
    up = torch.zeros(c_out, rank)
    if init == "both_random":
        up = torch.randn(c_out, rank, generator=generator) * 0.01 * c_in**-0.5
    return nn.Parameter(down.to(weight.device)), nn.Parameter(up.to(weight.device))


def small_picture(latents: Tensor, channels: int, level: float, generator: torch.Generator) -> Tensor:
    """What an up-scaler is told: the picture at a quarter of its size, enlarged, with noise of variance `level`."""
    small = F.interpolate(latents[:, :channels], scale_factor=0.25, mode="area")
    small = F.interpolate(small, size=latents.shape[2:], mode="bilinear", align_corners=False)
    noise = torch.randn(small.shape, generator=generator).to(small)
    return (1 - level) ** 0.5 * small + level**0.5 * noise
