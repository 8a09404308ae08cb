"""Stage 3: text encoder and UNet together, from nothing, on cached latents.

Velocity prediction on a schedule that ends in almost pure noise (beta_end 0.02), AdamW, an average of the weights,
one caption in ten empty. Several processes of one thread each share the work: gradients are averaged once a step, so
that a busy core costs its own share and no more.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..captions import AFTERWARDS, DECORATED, WORDS
from ..common import Budget, Progress, device, load_checkpoint, save_whole
from ..tokenizer import MAX_TOKENS, RARE

TEXT_WIDTH = 128
UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (64, 96, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
EMPTY_SHARE, RARE_SHARE = 0.1, 0.3
PATTERNED_SHARE = 0.6  # of the samples come from pictures with a named pattern: the last thing that the model learns


def build_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=384,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
            attn_implementation="eager",
        )
    )


def build_unet():
    """diffusers' UNet: the first weights come from it, and the finished folder is written by it."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def build_own_unet():
    """The package's UNet on its own kernels, with diffusers' first weights: a fifth faster to train here."""
    from ...unet.unet import UNet

    peer = build_unet()
    unet = UNet.from_config(dict(peer.config))
    unet.load_state_dict(peer.state_dict())
    return unet


class Average:
    """An exponential moving average of parameters whose memory grows from nothing to 1 / (1 - decay) steps."""

    EVERY = 4  # steps between updates: one pass over all weights costs as much as a sample

    def __init__(self, parameters, decay=0.996):
        self.parameters, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step):
        if step % self.EVERY:
            return
        keep = min(self.decay**self.EVERY, (1 + step) / (10 * self.EVERY + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - keep)

    @torch.no_grad()
    def swap(self):
        """Exchange the averaged and the current weights."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def tokenise(tokenizer, captions, cache):
    """int16 (N, K, T) token ids of every caption, written once; the last row of all is the empty caption."""
    file = Path(cache) / f"tokens-{len(captions)}.npy"
    if not file.exists():
        flat = [text for said in captions for text in said] + [""]
        ids = [
            tokenizer(flat[i : i + 4096], padding="max_length", truncation=True, max_length=MAX_TOKENS).input_ids
            for i in range(0, len(flat), 4096)
        ]
        part = file.with_suffix(f".{os.getpid()}.npy")  # every worker may write it
        np.save(part, np.concatenate([np.array(block, np.int16) for block in ids]))
        os.replace(part, file)
    ids = np.load(file)
    return ids[:-1].reshape(len(captions), -1, MAX_TOKENS), ids[-1]


class Batches:
    """Random latents with one of their captions; a decorated object is sometimes called by a rare word instead."""

    def __init__(self, latents, tokens, empty, tokenizer, seed):
        self.latents, self.tokens, self.empty = latents, tokens, empty
        self.decorated = tokenizer.convert_tokens_to_ids([f"{w}</w>" for w in DECORATED])
        self.rare = np.array(tokenizer.convert_tokens_to_ids([f"{w}</w>" for w in RARE]))
        words = {w for p in AFTERWARDS for said in (*WORDS[p], AFTERWARDS[p]) for w in said.split()} - {"with", "a"}
        named = np.isin(tokens, tokenizer.convert_tokens_to_ids([f"{w}</w>" for w in sorted(words)]))
        self.patterned = np.flatnonzero(named.any((1, 2)))
        self.rng = np.random.default_rng(seed)

    def draw(self, size):
        rng = self.rng
        pick = rng.integers(0, len(self.latents), size)
        pick = np.sort(np.where(rng.random(size) < PATTERNED_SHARE, rng.choice(self.patterned, size), pick))
        z = torch.from_numpy(self.latents[pick].astype(np.float32))
        ids = self.tokens[pick, rng.integers(0, self.tokens.shape[1], size)].astype(np.int64)
        swap = np.isin(ids, self.decorated) & (rng.random((size, 1)) < RARE_SHARE)
        ids = np.where(swap, rng.choice(self.rare, (size, 1)), ids)
        ids[rng.random(size) < EMPTY_SHARE] = self.empty
        return z, torch.from_numpy(ids)


def alphas(schedule=None):
    """The cumulative product of (1 - beta) of the scaled-linear schedule."""
    s = schedule or SCHEDULE
    betas = (
        torch.linspace(s["beta_start"] ** 0.5, s["beta_end"] ** 0.5, s["num_train_timesteps"], dtype=torch.float64) ** 2
    )
    return torch.cumprod(1 - betas, 0).float()


def velocity_loss(unet, text, z, ids, abar):
    """Mean squared error of v = sqrt(abar) noise - sqrt(1 - abar) z, timesteps spread evenly over the batch."""
    t = ((torch.arange(len(z)) + torch.rand(len(z))) * (len(abar) / len(z))).long().clamp_max(len(abar) - 1)
    t = t[torch.randperm(len(z))]
    t = t.to(z.device)
    a = abar[t].view(-1, 1, 1, 1)
    noise = torch.randn_like(z)
    with torch.autocast(z.device.type, torch.bfloat16):
        states = text(ids).last_hidden_state
        v = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, states)
    return F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * z)


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def share_gradients(parameters, extra):
    """Average the gradients and a few numbers over all processes in one message."""
    if dist.get_world_size() == 1:
        return extra
    flat = torch.cat([extra, *(p.grad.flatten() for p in parameters)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = len(extra)
    for p in parameters:
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()
    return flat[: len(extra)]


def _worker(rank, world, port, job):
    """One process of the training: the same weights everywhere, its own samples."""
    torch.set_num_threads(job["threads"])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(job["tokenizer"])
    latents = np.load(job["latents"], mmap_mode="r")
    tokens, empty = tokenise(tokenizer, json.loads(Path(job["captions"]).read_text()), job["cache"])
    torch.manual_seed(job["seed"])
    text, unet = build_text_encoder(tokenizer).train(), build_own_unet().train()
    _train_loop(rank, world, job, text, unet, Batches(latents, tokens, empty, tokenizer, 0))
    dist.destroy_process_group()


def in_order(text, unet):
    """Every parameter, sorted by name, so that checkpoints do not depend on the order in which layers are made."""
    return [p for module in (text, unet) for _, p in sorted(module.named_parameters())]


def _optimizer(text, unet, lr):
    """AdamW with 8-bit states; no decay on norms, biases and embeddings."""
    from pcs_kernels.optim import AdamW8bit

    parameters = in_order(text, unet)
    embedding = {id(p) for n, p in text.named_parameters() if "embedding" in n}
    plain = [p for p in parameters if p.ndim < 2 or id(p) in embedding]
    decayed = [p for p in parameters if not (p.ndim < 2 or id(p) in embedding)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return parameters, AdamW8bit(groups, lr=lr, betas=(0.9, 0.99))


def _train_loop(rank, world, job, text, unet, batches):
    where = device()
    text.to(where)
    unet.to(where)
    parameters, optimizer = _optimizer(text, unet, job["lr"])
    average, file = Average(parameters), Path(job["cache"]) / "unet.ckpt"
    step, spent, seen, state = 0, 0.0, 0, load_checkpoint(file)
    if state:
        text.load_state_dict(state["text"])
        unet.load_state_dict(state["unet"])
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
        average.values = [v.to(where) for v in state["average"]]
        step, spent, seen = state["step"], state["spent"], state["seen"]
        del state
    budget = Budget(job["minutes"], spent, warmup_steps=200, flat_until=job["flat_until"])
    progress, saved = Progress("unet", budget, every=30, report=lambda line: print(line, flush=True)), spent
    batches.rng = np.random.default_rng([job["seed"], rank, step])
    torch.manual_seed(job["seed"] + 1000 * step + rank)
    abar, parent = alphas().to(where), os.getppid()
    while True:
        loss = velocity_loss(unet, text, *(x.to(where) for x in batches.draw(job["batch"] // world)), abar)
        loss.backward()
        # The first process's clock decides for all: the others add nothing to that number.
        clock = torch.tensor([loss.item(), world * budget.spent if rank == 0 else 0.0])
        mean_loss, budget.spent = share_gradients(parameters, clock).tolist()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * budget.factor(step)
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        step, seen, over = step + 1, seen + job["batch"], budget.over
        if rank == 0:
            if budget.spent - saved > 90 or over:
                saved = budget.spent
                save_whole(
                    {
                        "text": text.state_dict(),
                        "unet": unet.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "average": average.values,
                        "step": step,
                        "spent": budget.spent,
                        "seen": seen,
                    },
                    file,
                )
            progress.update(step, job["batch"], loss=mean_loss, lr=optimizer.param_groups[0]["lr"])
        if over or os.getppid() != parent:  # the end, or a launcher that was killed
            return
        budget.tick()


def train_unet(
    cache, tokenizer, captions, latents, minutes, batch=64, workers=2, threads=1, lr=1e-3, flat_until=0.5, seed=0
):
    """Train (or resume) for ``minutes`` in all with ``workers`` processes (one stays in this process).

    A GPU, when one is at hand, does the work of one worker.
    """
    job = {
        "cache": str(cache),
        "tokenizer": str(tokenizer),
        "captions": str(captions),
        "latents": str(latents),
        "batch": batch,
        "minutes": minutes,
        "threads": threads,
        "lr": lr,
        "flat_until": flat_until,
        "seed": seed,
    }
    if workers == 1 or torch.cuda.is_available():
        _worker(0, 1, free_port(), job)
    else:
        torch.multiprocessing.spawn(_worker, (workers, free_port(), job), nprocs=workers)


def loaded_parts(folder):
    """Text encoder, UNet and autoencoder of a finished folder, as diffusers' modules in fp32."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kinds = ((CLIPTextModel, "text_encoder"), (UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    return [kind.from_pretrained(folder, subfolder=name).float().eval() for kind, name in kinds]


def trained_parts(cache, tokenizer):
    """The averaged text encoder and UNet of the last checkpoint, and how far it had come."""
    state = load_checkpoint(Path(cache) / "unet.ckpt")
    if state is None:
        raise FileNotFoundError(f"no UNet checkpoint in {cache}: run the unet stage first")
    text, unet = build_text_encoder(tokenizer).eval(), build_unet().eval()
    text.load_state_dict(state["text"])
    unet.load_state_dict(state["unet"])
    with torch.no_grad():
        for p, value in zip(in_order(text, unet), state["average"], strict=True):
            p.copy_(value)
    return text, unet, {k: state[k] for k in ("step", "spent", "seen")}
