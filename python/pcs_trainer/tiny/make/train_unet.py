"""Stage 3: text encoder and UNet together, from nothing, on cached latents.

Velocity prediction on a schedule that ends in almost pure noise (beta_end 0.02), AdamW, an average of the weights,
one caption in ten empty. Several processes of one thread each share the work: gradients are averaged once a step, so
that a busy core costs its own share and no more.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..captions import AFTERWARDS, DECORATED, WORDS
from ..tokenizer import MAX_TOKENS, RARE
from .budget import Budget, Progress, device, load_checkpoint, save_checkpoint
from .networks import alphas, build_own_unet, build_text_encoder, build_unet

EMPTY_SHARE = 0.1  # of the captions are empty, for classifier-free guidance
RARE_SHARE = 0.3  # of "patterned", "decorated" and "fancy" become a rare word: such words then mean an unusual look
PATTERNED_SHARE = 0.6  # of the samples come from pictures with a named pattern: the last thing that the model learns
TOKENISE_AT_ONCE = 4096
WARMUP_STEPS = 200
SAVE_EVERY = 90.0  # seconds of training that a kill may lose
REPORT_EVERY = 30.0  # seconds


class Average:
    """An exponential moving average of parameters whose memory grows from nothing to 1 / (1 - decay) steps."""

    EVERY = 4  # steps between updates: one pass over all weights costs as much as a sample

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.996) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters of `step` into the average, every EVERY steps."""
        if step % self.EVERY:
            return
        keep = min(self.decay**self.EVERY, (1 + step) / (10 * self.EVERY + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the current weights."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def tokenise(
    tokenizer: Any, captions: Sequence[Sequence[str]], cache: str | Path
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Token ids of every caption and of the empty one; written to the cache once.

    Returns:
        int16 [N, K, T] for N pictures of K captions each, and int16 [T].
    """
    file = Path(cache) / f"tokens-{len(captions)}.npy"
    if not file.exists():
        flat = [text for said in captions for text in said] + [""]
        blocks = (flat[i : i + TOKENISE_AT_ONCE] for i in range(0, len(flat), TOKENISE_AT_ONCE))
        ids = [
            tokenizer(block, padding="max_length", truncation=True, max_length=MAX_TOKENS).input_ids for block in blocks
        ]
        part = file.with_suffix(f".{os.getpid()}.npy")  # every worker may write it
        np.save(part, np.concatenate([np.array(block, np.int16) for block in ids]))
        os.replace(part, file)
    rows = np.load(file)
    return rows[:-1].reshape(len(captions), -1, MAX_TOKENS), rows[-1]


class Batches:
    """Random latents with one of their captions; a decorated object is sometimes called by a rare word instead.

    Args:
        latents: [N, C, h, w] of the training set.
        tokens: [N, K, T] of its captions.
        empty: [T] of the empty caption.
        tokenizer: what made them.
        seed: of what is drawn.
    """

    def __init__(
        self,
        latents: NDArray[np.float16],
        tokens: NDArray[np.int16],
        empty: NDArray[np.int16],
        tokenizer: Any,
        seed: int,
    ) -> None:
        self.latents, self.tokens, self.empty = latents, tokens, empty
        self.decorated = tokenizer.convert_tokens_to_ids([f"{w}</w>" for w in DECORATED])
        self.rare = np.array(tokenizer.convert_tokens_to_ids([f"{w}</w>" for w in RARE]))
        words = {w for p in AFTERWARDS for said in (*WORDS[p], AFTERWARDS[p]) for w in said.split()} - {"with", "a"}
        named = np.isin(tokens, tokenizer.convert_tokens_to_ids([f"{w}</w>" for w in sorted(words)]))
        self.patterned = np.flatnonzero(named.any((1, 2)))
        self.rng = np.random.default_rng(seed)

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """Latents [size, C, h, w] and token ids [size, T]."""
        rng = self.rng
        pick = rng.integers(0, len(self.latents), size)
        pick = np.sort(np.where(rng.random(size) < PATTERNED_SHARE, rng.choice(self.patterned, size), pick))
        z = torch.from_numpy(self.latents[pick].astype(np.float32))
        ids = self.tokens[pick, rng.integers(0, self.tokens.shape[1], size)].astype(np.int64)
        swap = np.isin(ids, self.decorated) & (rng.random((size, 1)) < RARE_SHARE)
        ids = np.where(swap, rng.choice(self.rare, (size, 1)), ids)
        ids[rng.random(size) < EMPTY_SHARE] = self.empty
        return z, torch.from_numpy(ids)


def velocity_loss(unet: nn.Module, text: Any, z: Tensor, ids: Tensor, abar: Tensor) -> Tensor:
    """Mean squared error of v = sqrt(abar) noise - sqrt(1 - abar) z, timesteps spread evenly over the batch.

    Args:
        unet: predicts v from noisy latents, timesteps and text states.
        text: text encoder.
        z: latents [B, C, h, w].
        ids: token ids [B, T].
        abar: `alphas()`.
    """
    t = ((torch.arange(len(z)) + torch.rand(len(z))) * (len(abar) / len(z))).long().clamp_max(len(abar) - 1)
    t = t[torch.randperm(len(z))]
    t = t.to(z.device)
    a = abar[t].view(-1, 1, 1, 1)
    noise = torch.randn_like(z)
    with torch.autocast(z.device.type, torch.bfloat16):
        states = text(ids).last_hidden_state
        v = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, states)
    return F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * z)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def share_gradients(parameters: Sequence[nn.Parameter], extra: Tensor) -> Tensor:
    """Average the gradients, and the numbers of `extra`, over all processes in one message; return those numbers."""
    if dist.get_world_size() == 1:
        return extra
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([extra, *(g.flatten() for g in gradients)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = len(extra)
    for g in gradients:
        g.copy_(flat[offset : offset + g.numel()].view_as(g))
        offset += g.numel()
    return flat[: len(extra)]


def in_order(text: nn.Module, unet: nn.Module) -> list[nn.Parameter]:
    """Every parameter, sorted by name, so that checkpoints do not depend on the order in which layers are made."""
    return [p for module in (text, unet) for _, p in sorted(module.named_parameters())]


@dataclass(frozen=True)
class Job:
    """What every process of the training is told."""

    cache: str
    tokenizer: str
    captions: str
    latents: str
    minutes: float
    batch: int
    threads: int
    lr: float
    flat_until: float
    seed: int


class State:
    """What trains and what a checkpoint holds of it: both networks, the optimizer, the average, and how far it is."""

    def __init__(self, text: nn.Module, unet: nn.Module, lr: float) -> None:
        from pcs_kernels.optim import AdamW8bit

        self.text, self.unet = text, unet
        self.parameters = in_order(text, unet)
        embedding = {id(p) for n, p in text.named_parameters() if "embedding" in n}
        plain = [p for p in self.parameters if p.ndim < 2 or id(p) in embedding]  # norms, biases, embeddings
        decayed = [p for p in self.parameters if not (p.ndim < 2 or id(p) in embedding)]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = AdamW8bit(groups, lr=lr, betas=(0.9, 0.99))
        self.average = Average(self.parameters)
        self.step, self.seen, self.spent = 0, 0, 0.0

    def load(self, file: Path) -> None:
        """Go on from a checkpoint, where there is one."""
        state = load_checkpoint(file)
        if state is None:
            return
        self.text.load_state_dict(state["text"])
        self.unet.load_state_dict(state["unet"])
        if state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])
        self.average.values = [v.to(p.device) for v, p in zip(state["average"], self.parameters, strict=True)]
        self.step, self.spent, self.seen = state["step"], state["spent"], state["seen"]

    def save(self, file: Path) -> None:
        """Write a checkpoint that `load` goes on from."""
        state = {
            "text": self.text.state_dict(),
            "unet": self.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "step": self.step,
            "spent": self.spent,
            "seen": self.seen,
        }
        save_checkpoint(state, file)


def _worker(rank: int, world: int, port: int, job: Job) -> None:
    """One process of the training: the same weights everywhere, its own samples."""
    torch.set_num_threads(job.threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(job.tokenizer)
    latents = np.load(job.latents, mmap_mode="r")
    tokens, empty = tokenise(tokenizer, json.loads(Path(job.captions).read_text()), job.cache)
    torch.manual_seed(job.seed)
    text, unet = build_text_encoder(tokenizer).train(), build_own_unet().train()
    _train_loop(rank, world, job, text, unet, Batches(latents, tokens, empty, tokenizer, 0))
    dist.destroy_process_group()


def _train_loop(rank: int, world: int, job: Job, text: nn.Module, unet: nn.Module, batches: Batches) -> None:
    where, file = device(), Path(job.cache) / "unet.ckpt"
    state = State(text.to(where), unet.to(where), job.lr)
    state.load(file)
    budget = Budget(job.minutes, state.spent, warmup_steps=WARMUP_STEPS, flat_until=job.flat_until)
    progress, saved = Progress("unet", budget, REPORT_EVERY, lambda line: print(line, flush=True)), state.spent
    batches.rng = np.random.default_rng([job.seed, rank, state.step])
    torch.manual_seed(job.seed + 1000 * state.step + rank)
    abar, parent = alphas().to(where), os.getppid()
    while True:
        z, ids = batches.draw(job.batch // world)
        loss = velocity_loss(unet, text, z.to(where), ids.to(where), abar)
        loss.backward()
        # The first process's clock decides for all: the others add nothing to that number.
        clock = torch.tensor([loss.item(), world * budget.spent if rank == 0 else 0.0])
        mean_loss, budget.spent = share_gradients(state.parameters, clock).tolist()
        torch.nn.utils.clip_grad_norm_(state.parameters, 1.0)
        rate = job.lr * budget.factor(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.average.update(state.step)
        state.step, state.seen, state.spent = state.step + 1, state.seen + job.batch, budget.spent
        if rank == 0:
            if budget.spent - saved > SAVE_EVERY or budget.over:
                saved = budget.spent
                state.save(file)
            progress.update(state.step, job.batch, loss=mean_loss, lr=rate)
        if budget.over or os.getppid() != parent:  # the end, or a launcher that was killed
            return
        budget.tick()


def train_unet(
    cache: str | Path,
    tokenizer: str | Path,
    captions: str | Path,
    latents: str | Path,
    minutes: float,
    batch: int = 64,
    workers: int = 2,
    threads: int = 1,
    lr: float = 1e-3,
    flat_until: float = 0.5,
    seed: int = 0,
) -> None:
    """Train UNet and text encoder, or resume them; a GPU, when one is at hand, does the work of one worker.

    Args:
        cache: folder of the checkpoint.
        tokenizer: folder of the tokenizer.
        captions: JSON file of the training set's captions.
        latents: file of its latents.
        minutes: training time, that of earlier runs included.
        batch: samples per step, over all workers.
        workers: processes that share the work; one stays in this process.
        threads: threads of each process.
        lr: learning rate after the warm-up.
        flat_until: share of the minutes up to which it stays there.
        seed: of the first weights and of the batches.
    """
    job = Job(str(cache), str(tokenizer), str(captions), str(latents), minutes, batch, threads, lr, flat_until, seed)
    if workers == 1 or torch.cuda.is_available():
        _worker(0, 1, free_port(), job)
    else:
        torch.multiprocessing.spawn(_worker, (workers, free_port(), job), nprocs=workers)


def trained_parts(cache: str | Path, tokenizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The averaged text encoder and UNet of the last checkpoint, and how far it had come (step, spent, seen)."""
    state = load_checkpoint(Path(cache) / "unet.ckpt")
    if state is None:
        raise FileNotFoundError(f"no UNet checkpoint in {cache}. Fix: run the unet stage first")
    text, unet = build_text_encoder(tokenizer).eval(), build_unet().eval()
    text.load_state_dict(state["text"])
    unet.load_state_dict(state["unet"])
    with torch.no_grad():
        for p, value in zip(in_order(text, unet), state["average"], strict=True):
            p.copy_(value)
    return text, unet, {k: state[k] for k in ("step", "spent", "seen")}
