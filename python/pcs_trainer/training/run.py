"""One run of the trainer: prepare, step after step, and proof at each end. It knows no method."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..concept.concept import Concept, load_concept, predict
from ..data.batches import Batch, data_digest, draw_batch, prior_bank, seeded, subject_bank
from ..data.prompts import class_prompt, subject_prompt
from ..distributed import any_process, fill, first_alone, full_value, rank_and_world, shard
from ..errors import TrainingStopped
from ..methods import module_of
from ..methods.dreambooth import small_picture
from ..model.autoencoder import own_size
from ..model.fingerprint import fingerprint
from ..model.text import Text, encode
from ..unet.config import family
from .checkpoint import check_same_run, checkpoints, read_checkpoint, write_checkpoint
from .events import Event
from .log import Log
from .losses import drawn_timesteps, picture_losses, snr_weights
from .optimizer import Stepper
from .probe import Probe
from .proof import Movement, check_file, compare_gradients
from .stop import Stop

if TYPE_CHECKING:
    from .trainer import Trainer

PROOF_STEP = 20


class Run:
    """One call of Trainer.train: the state that it needs and nothing after it."""

    def __init__(self, trainer: Trainer, tell: Callable[[Event], Any], should_stop: Callable[[], bool]) -> None:
        self.trainer, self.model, self.s = trainer, trainer.model, trainer.settings
        first = rank_and_world()[0] == 0  # of several processes one writes and tells
        self.out = trainer.out if first else None
        self.tell, self.should_stop = tell if first else lambda event: None, should_stop
        self.method = module_of(self.s.method)
        self.step = 0
        self.skipped_in_a_row = 0
        self._texts: dict[str, Text] = {}

    def say(self, kind: str, **data: Any) -> None:
        self.tell(Event(kind, self.step, self.s.steps, data))

    def train(self, resume: bool) -> Concept:
        self.prepare()
        learner = self.learner = self.trainer.learner
        self.model.unet.set_plan(self.s.plan)
        if not learner.text_trains:
            self.freeze_text()
        if self.s.check_backend and not resume:
            exact = _compute_dtype(self.model.unet) == torch.float32
            first = lambda: self.loss(self.batch(0, 0))[0]  # noqa: E731
            self.say("proof", text=compare_gradients(learner.parameters, first, exact))
        if learner.whole and rank_and_world()[1] > 1:
            learner.parameters |= shard(self.model.unet, learner.parameters)
        self.stepper = Stepper(learner.parameters, self.s)
        self.probe = Probe(self) if self.s.probe_every else None
        if resume:
            self.resume()
        movement = Movement(learner.parameters, self.frozen()) if self.step == 0 else None
        with Stop(self.should_stop) as stop, Log(self.out, self.s, self.step) as log:
            while self.step < self.s.steps and not any_process(stop()):
                self.one_step(log)
                if movement is not None and self.step == min(PROOF_STEP, self.s.steps):
                    self.say("proof", text=movement.check(learner.seldom))
                self.housekeeping(log)
        self.stopped = self.step < self.s.steps
        unreached = movement.unmoved() if movement is not None and learner.seldom else []
        if unreached:
            self.say("warning", text=f"no picture of this run reached {', '.join(unreached)}: they are as they began")
        if self.trainer.out is not None:
            self.checkpoint()
        return self.finish()

    def prepare(self) -> None:
        """Pictures to latents; then the autoencoder leaves memory."""
        s, model = self.s, self.model
        if s.stage == "base" and model.unet.settings["in_channels"] != model.vae.config.latent_channels:
            raise ValueError(
                f"{model.name} has a UNet of {model.unet.settings['in_channels']} input channels; methods train on "
                "text-to-image models, or on up-scalers with method='dreambooth', stage='super_resolution'"
            )
        size = s.resolution or min(own_size(model))
        self.size = size
        for subject in self.trainer.subjects:
            for text in [*(f"skipped: {reason}" for reason in subject.loaded.skipped), *subject.loaded.notes]:
                self.say("warning", text=text)
        self.bank, self.names = subject_bank(model, self.trainer.subjects, s, size)
        with first_alone():
            self.prior = prior_bank(model, self.trainer.subjects, s, size, lambda text: self.say("start", text=text))
        self.latent = self.bank.moments.mean.shape[-1]
        model.release("vae")
        self.digest = data_digest(self.trainer.subjects, self.prior)
        self.base = fingerprint(model)
        captions = self.method.bank(model, s) if s.preservation_weight and hasattr(self.method, "bank") else []
        self.captions = captions
        count = sum(len(subject.pictures) for subject in self.trainer.subjects)
        self.say("start", text=f"{s.method}: {count} pictures at {size} pixels, {subject_prompt(s)!r}, {s.steps} steps")

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        trained = {id(p) for p in self.learner.parameters.values()}
        for part in ("unet", "text_encoders"):
            if part in self.model.loaded:
                modules = [self.model.unet] if part == "unet" else self.model.text_encoders
                for module in modules:
                    yield from ((f"{part}.{n}", p) for n, p in module.named_parameters() if id(p) not in trained)

    def freeze_text(self) -> None:
        """The states of every prompt, once; then the text encoders leave memory."""
        classes = [class_prompt(subject.settings) for subject in self.trainer.subjects]
        prompts = sorted({*self.bank.prompts, *(self.prior.prompts if self.prior else []), *classes})
        with torch.no_grad():
            for prompt in prompts:
                self._texts[prompt] = encode(self.model, [prompt], self.learner.words, self.learner.hold_first)
        self.model.release("text_encoders")

    def text(self, prompts: list[str]) -> Text:
        """The text of a batch; a prompt that is said twice is encoded once."""
        if self._texts:
            parts = [self._texts[p] for p in prompts]
            pooled = None if parts[0].pooled is None else torch.cat([p.pooled for p in parts])  # type: ignore[misc]
            return Text(torch.cat([p.states for p in parts]), pooled, [])  # type: ignore[misc]
        unique = list(dict.fromkeys(prompts))
        text = encode(self.model, unique, self.learner.words, self.learner.hold_first)
        index = torch.tensor([unique.index(p) for p in prompts])
        states = text.states
        states = {n: x[index] for n, x in states.items()} if isinstance(states, dict) else states[index]
        return Text(states, None if text.pooled is None else text.pooled[index], [])

    def batch(self, step: int, micro: int) -> Batch:
        law = lambda n, g: drawn_timesteps(self.model.schedule, self.s.timesteps, n, g)  # noqa: E731
        return draw_batch(self.bank, self.prior, self.names, self.s, step, micro, rank_and_world(), law)

    def predicted(self, batch: Batch, step: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """(prediction, its target, masks) of a batch; `step` seeds the noise on an up-scaler's small picture."""
        s, unet, schedule = self.s, self.model.unet, self.model.schedule
        like = unet.conv_in.weight
        x, noise = batch.latents.to(like.device), batch.noise.to(like.device)
        t = batch.t.to(like.device)
        text = self.text(batch.prompts).to(torch.empty(0, dtype=_compute_dtype(unet), device=like.device))
        kv = unet.text_kv(text.states)
        if hasattr(self.method, "without_first_gradient"):
            kv = self.method.without_first_gradient(kv)
        noisy, added = schedule.add_noise(x, noise, t), text.added(self.size, self.size)
        if s.stage == "super_resolution":
            noisy, added = self.with_small_picture(noisy, batch, added, step)
        prediction = unet(noisy.to(_compute_dtype(unet)), t, kv, added)
        return prediction, schedule.target(x, noise, t), None if batch.masks is None else batch.masks.to(like.device)

    def loss(self, batch: Batch, extra: int | None = None) -> tuple[Tensor, dict[str, float]]:
        """The loss of one micro-batch, and its parts for the log."""
        s = self.s
        each = picture_losses(*self.predicted(batch, self.step))
        if s.snr_gamma:
            each = each * snr_weights(self.model.schedule, batch.t.to(each.device), s.snr_gamma)
        subject, prior = each[: batch.subjects].mean(), each[batch.subjects :]
        total, parts = subject, {"subject": float(subject.detach())}
        if len(prior):
            total = total + s.prior_weight * prior.mean()
            parts["prior"] = float(prior.detach().mean())
        if self.captions:
            kept = self.method.extra_loss(self.model, s, self.captions, seeded(s.seed, 3, self.step, extra or 0))
            total, parts["preservation"] = total + kept, float(kept.detach())
        return total, parts | {"loss": float(total.detach())}

    def with_small_picture(
        self, noisy: Tensor, batch: Batch, added: Any, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """An up-scaler's further input channels, and the noise level it is told."""
        more = self.model.unet.settings["in_channels"] - noisy.shape[1]
        if not 0 < more <= noisy.shape[1]:
            raise ValueError(f"{self.model.name} is no up-scaler: its UNet has no input channels for a small picture")
        small = small_picture(batch.latents.to(noisy), more, self.s.noise_level, seeded(self.s.seed, 4, step))
        added = dict(added or {})
        if self.model.unet.class_embedding is not None:
            added["class_labels"] = torch.zeros(len(noisy), dtype=torch.long, device=noisy.device)
        return torch.cat([noisy, small], dim=1), added

    def one_step(self, log: Log) -> None:
        """One optimizer step over all micro-batches, or a skipped one where a number is not finite."""
        batches = [self.batch(self.step, micro) for micro in range(self.s.accumulate)]
        told: list[dict[str, float]] = []

        def losses(micro: int) -> Callable[[], Tensor]:
            def compute() -> Tensor:
                loss, parts = self.loss(batches[micro], micro)
                told.append(parts)
                return loss / self.s.accumulate

            return compute

        good = self.stepper.step([losses(i) for i in range(self.s.accumulate)], self.step)
        names = sorted({n for b in batches for n in b.names})
        self.step += 1
        if good:
            self.skipped_in_a_row = 0
            if hasattr(self.method, "after_step"):
                self.method.after_step(self.model, self.learner.words)
            self.say("step", **log.step(self.step, told[-self.s.accumulate :], self.stepper.rate))
            return
        self.skipped_in_a_row += 1
        self.say("warning", text=f"step {self.step} was skipped: {self.stepper.reason} on {', '.join(names[:6])}")
        if self.skipped_in_a_row == 3:
            self.give_up(names)

    def give_up(self, names: list[str]) -> None:
        """Three bad steps in a row: back to the last good state, saved, and one sentence."""
        from_step = self.stepper.restore_good()
        sentence = (
            f"three steps in a row were not finite (the last on {', '.join(names[:6])}); the learning rate "
            f"{self.s.learning_rate:g} may be too high"
        )
        if from_step is None:
            raise TrainingStopped(f"{sentence}; no good state came before")
        self.step, self.stopped = from_step, True
        self.say("warning", text=f"{sentence}; going back to step {from_step}")
        raise TrainingStopped(sentence, self.finish())

    def housekeeping(self, log: Log) -> None:
        s = self.s
        if self.probe is not None and (self.step % s.probe_every == 0 or self.step == s.steps):
            held_out, drift = self.probe.measure()
            log.probe(self.step, held_out, drift)
            since = f"loss on held-out noise {held_out:.4f} ({self.probe.at_first:.4f} at first)"
            self.say("probe", text=f"{since}, the class drifted by {drift:.1%}", held_out=held_out, drift=drift)
        if self.trainer.out is not None and s.checkpoint_every and self.step % s.checkpoint_every == 0:
            self.checkpoint()
        if s.preview_every and self.step % s.preview_every == 0 and s.preview_prompts:
            self.preview()

    def preview(self) -> None:
        """Pictures from where the run stands; whatever goes wrong here does not end it."""
        from ..sampling.drawing import sample

        try:
            random = torch.get_rng_state()
            with torch.no_grad():
                drawn = sample(
                    self.model, list(self.s.preview_prompts), words=self.learner.words, seed=self.s.seed,
                    hold_first=self.learner.hold_first, size=self.size,
                )  # fmt: skip
            torch.set_rng_state(random)
            folder = (self.out or Path()) / "samples"
            if self.out is not None:
                folder.mkdir(parents=True, exist_ok=True)
            paths = []
            for i, image in enumerate(drawn):
                if self.out is not None:
                    path = folder / f"step-{self.step:05d}-{i}.png"
                    image.save(path)
                    paths.append(str(path))
            self.say("preview", path=", ".join(paths), images=drawn)
        except Exception as error:
            self.say("warning", text=f"the preview failed ({' '.join(str(error).split())}); training goes on")
        finally:
            self.model.release("vae")

    def identity(self) -> dict[str, Any]:
        s = self.s.asdict() | {"subjects": [[x.settings.class_word, x.settings.token] for x in self.trainer.subjects]}
        s["processes"] = rank_and_world()[1]
        return {"base": self.base, "base_name": self.model.name, "data": self.digest, "settings": s}

    def checkpoint(self) -> None:
        tensors = {}
        for name, p in self.learner.parameters.items():
            value = full_value(p.detach())  # one at a time: the whole network need not fit on a device
            if self.out is not None:
                tensors[name] = value.cpu()
        state = self.identity() | {"step": self.step, "optimizer": self.stepper.state_dict()}
        if self.out is None:
            return  # another process writes; this one has given its parts
        try:
            path = write_checkpoint(self.out, self.step, tensors, state, self.s.keep)  # type: ignore[arg-type]
            self.say("checkpoint", path=str(path))
        except OSError as error:
            self.say("warning", text=f"{error}; training goes on")

    def resume(self) -> None:
        out = self.trainer.out
        found = checkpoints(out) if out is not None else []
        if not found:
            where = f"{out} has no whole checkpoint" if out is not None else "no out folder was given"
            raise ValueError(f"there is nothing to resume: {where}")
        tensors, state = read_checkpoint(found[-1])
        now = json.loads(json.dumps(self.identity(), default=str))
        check_same_run(found[-1], state, now)
        for name, p in self.learner.parameters.items():
            fill(p, tensors[name])
        self.stepper.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        self.say("start", text=f"goes on from {found[-1].name}")

    def concept(self) -> Concept:
        """What has been learned so far, on the CPU."""
        s, learner = self.s, self.learner
        words = {w: [r.detach().clone().cpu() for r in rows] for w, rows in learner.words.items() if "<aug-" not in w}
        meta = {
            "method": s.method, "token": s.token, "class_word": s.class_word, "identifier": s.identifier,
            "instance_prompt": subject_prompt(s), "steps": str(self.step), "seed": str(s.seed),
            "learning_rate": f"{s.learning_rate:g}", "resolution": f"{self.size}x{self.size}",
            "hold_first": "1" if learner.hold_first else "0", "base_name": self.model.name,
            "prediction": self.model.schedule.prediction, "family": family(self.model.unet.settings),
            "settings": json.dumps(s.asdict()), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "finished": "0" if self.stopped else "1",
            "subjects": json.dumps([[x.settings.token, x.settings.class_word] for x in self.trainer.subjects]),
        }  # fmt: skip
        return Concept(s.method, {n: t.cpu() for n, t in learner.tensors().items()}, words, meta, self.base)

    def finish(self) -> Concept:
        """The concept, saved, and its file shown to predict what memory predicts."""
        prompt = subject_prompt(self.s)
        learned = predict(self.model, [], prompt, words=self.learner.words, hold_first=self.learner.hold_first)
        concept = self.concept()
        self.learner.restore()
        if self.out is not None:
            path = concept.save(self.out / "concept.safetensors")
            self.say("saved", path=str(path))
        else:
            path = Path("the concept")
        again = load_concept(path) if self.out is not None else concept
        base = predict(self.model, [replace(again, words={})], prompt, strength=0.0)
        if self.step > 0:
            self.say("proof", text=check_file(learned, predict(self.model, [again], prompt), base, path))
        self.say("stopped" if self.stopped else "done", text=f"{self.step} steps of {self.s.method}")
        return concept


def _compute_dtype(unet: nn.Module) -> torch.dtype:
    """What the UNet computes in: its norms' dtype (trained projections may be float32 masters)."""
    return unet.conv_norm_out.weight.dtype
