"""The same weights, batch, noise and timesteps give the loss and gradients of diffusers' training arithmetic.

The peer's side is built from diffusers' own networks, scheduler and LoRA layers, as its example scripts put them
together; ours is the trainer's loss.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pcs_trainer import load_model
from pcs_trainer.model.sources import TINY
from pcs_trainer.tiny.subjects import photos
from pcs_trainer.training.trainer import Trainer
from trainer_cases import small_for


def started(method, **settings):
    model = load_model("tiny")
    pictures = [p.picture for p in photos(41, 3)]
    small = small_for(method, prior_images=3, prior_steps=2, batch=2, bank=8)
    run = Trainer(model, method, pictures, class_word="mug", **small | settings).objective()
    return run, run.batch(3, 0)


class Peer:
    """diffusers' UNet and scheduler, transformers' encoder, of the same folder."""

    def __init__(self):
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        self.unet = UNet2DConditionModel.from_pretrained(TINY, subfolder="unet").float()
        self.text = CLIPTextModel.from_pretrained(TINY, subfolder="text_encoder").float()
        self.tokenizer = CLIPTokenizer.from_pretrained(TINY, subfolder="tokenizer")
        self.scheduler = DDPMScheduler.from_pretrained(TINY, subfolder="scheduler")
        self.unet.requires_grad_(False)
        self.text.requires_grad_(False)

    def states(self, prompts):
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            prompts, truncation=True, padding="max_length", max_length=length, return_tensors="pt"
        ).input_ids
        return self.text(ids)[0]

    def errors(self, batch, states):
        """model_pred and target, as every script computes them."""
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.t)
        prediction = self.unet(noisy, batch.t, states, return_dict=False)[0]
        assert self.scheduler.config.prediction_type == "v_prediction"
        return prediction, self.scheduler.get_velocity(batch.latents, batch.noise, batch.t)


def close(ours, theirs, what, whole=0.0):
    """Within 1e-4 of a tensor's gradient, or of a thousandth of the whole one where a tensor's is next to nothing."""
    error = float((ours - theirs).norm() / theirs.norm().clamp_min(max(1e-3 * whole, 1e-12)))
    assert error < 1e-4, f"{what}: {error}"


def halves_loss(prediction, target, weight=1.0):
    """DreamBooth's script: chunk in two, mse of each, prior weight."""
    prediction, prior = torch.chunk(prediction, 2)
    target, prior_target = torch.chunk(target, 2)
    return F.mse_loss(prediction, target) + weight * F.mse_loss(prior, prior_target)


@pytest.mark.slow
def test_dreambooth():
    run, batch = started("dreambooth", prior_weight=1.0)
    loss, _ = run.loss(batch, 0)
    loss.backward()
    peer = Peer()
    peer.unet.requires_grad_(True)
    theirs = halves_loss(*peer.errors(batch, peer.states(batch.prompts)))
    theirs.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-4)
    gradients = dict(peer.unet.named_parameters())
    whole = float(torch.stack([p.grad.norm() for p in gradients.values()]).norm())
    for name, p in run.learner.parameters.items():
        close(p.grad, gradients[name.removeprefix("unet.")].grad, name, whole)


@pytest.mark.slow
def test_dreambooth_lora():
    from peft import LoraConfig

    run, batch = started("dreambooth_lora", rank=4, init="both_random")
    loss, _ = run.loss(batch, 0)
    loss.backward()
    peer = Peer()
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    peer.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    named = {n: p for n, p in peer.unet.named_parameters() if "lora_" in n}
    ours = run.learner.parameters
    assert len(named) == len(ours)

    def name_of(theirs):
        stem, half = theirs.split(".lora_")
        return f"unet.{stem}.{'down' if half.startswith('A') else 'up'}"

    with torch.no_grad():
        for name, p in named.items():
            p.copy_(ours[name_of(name)])
    theirs = halves_loss(*peer.errors(batch, peer.states(batch.prompts)))
    theirs.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-4)
    whole = float(torch.stack([p.grad.norm() for p in named.values()]).norm())
    for name, p in named.items():
        close(ours[name_of(name)].grad, p.grad, name, whole)


@pytest.mark.slow
def test_custom_diffusion():
    """Keys and values of the text with the first token detached, the masked loss, and the word's row."""
    run, batch = started("custom_diffusion", prior_weight=1.0, augment=True)
    assert batch.masks is not None and not bool((batch.masks == 1).all())
    loss, _ = run.loss(batch, 0)
    loss.backward()
    peer = Peer()
    word = run.s.token
    peer.tokenizer.add_tokens(word)
    peer.text.resize_token_embeddings(len(peer.tokenizer))
    table = peer.text.get_input_embeddings().weight
    row = peer.tokenizer.convert_tokens_to_ids(word)
    with torch.no_grad():
        table[row] = run.learner.words[word].rows[0][0]
    table.requires_grad_(True)
    for name, p in peer.unet.named_parameters():
        p.requires_grad_("attn2.to_k" in name or "attn2.to_v" in name)
    for name, module in peer.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda m, x, y: torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1))
    prediction, target = peer.errors(batch, peer.states(batch.prompts))
    prediction, prior = torch.chunk(prediction, 2)
    target, prior_target = torch.chunk(target, 2)
    mask = batch.masks[:2]
    error = F.mse_loss(prediction, target, reduction="none") * mask
    masked = (error.sum([1, 2, 3]) / (mask.sum([1, 2, 3]) * prediction.shape[1])).mean()
    theirs = masked + F.mse_loss(prior, prior_target)
    theirs.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-4)
    gradients = dict(peer.unet.named_parameters())
    for name, p in run.learner.parameters.items():
        if name.startswith("word."):
            close(p.grad[0], table.grad[row], name)
        else:
            close(p.grad, gradients[name.removeprefix("unet.")].grad, name)


def test_latents_are_the_autoencoders():
    """Mean, deviation and scale of the cached moments are what diffusers' encode gives."""
    from diffusers import AutoencoderKL

    run, _ = started("personalized_residuals")
    vae = AutoencoderKL.from_pretrained(TINY, subfolder="vae").float()
    pixels = np.stack([p.pixels for p in run.task.subjects[0].pictures])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    torch.testing.assert_close(
        run.data.bank.moments.mean, posterior.mean * vae.config.scaling_factor, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        run.data.bank.moments.std, posterior.std * vae.config.scaling_factor, rtol=1e-3, atol=1e-3
    )
