"""The loop of a run: step after step, a guard against bad numbers, checkpoints, previews. It knows no method."""

from __future__ import annotations

import gc
import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import pcs_kernels

from ..concept import grammar
from ..concept.concept import Concept
from ..concept.loading import load_concept
from ..distributed import any_process, fill, full_value, is_part, rank_and_world, shard
from ..errors import NotSaved, TrainingStopped
from ..files import free_bytes, written_text
from ..run_folder import BEGUN, checkpoints, run_checkpoints, step_of
from ..unet.layers import replace_data
from ..units import bytes_text
from .checkpoint import begins_anew, begun_with, check_same_run, read_checkpoint, write_checkpoint
from .device_step import DeviceStep, Made
from .events import Event
from .float16 import said_of_float16
from .late import Late
from .log import Log
from .objective import Objective
from .optimizer import VERDICT, Stepper
from .previews import preview_images
from .probe import Probe
from .proof import Movement
from .result import base_predicts, file_proof, learned, memory_predicts

Found = TypeVar("Found")

PROOF_STEP = 20  # by then an optimizer has moved whatever trains, and little time is lost where it has not
BAD_STEPS = 3  # in a row end a run: one is a bad batch, three are the learning rate


class Run:
    """One training from its first step, or from a checkpoint, to its concept.

    Args:
        objective: the loss, the data and what trains, all ready.
        tell: called with every Event.
        should_stop: asked between steps.
    """

    def __init__(self, objective: Objective, tell: Callable[[Event], Any], should_stop: Callable[[], bool]) -> None:
        self.objective, self.task, self.learner = objective, objective.task, objective.learner
        self.model, self.s = self.task.model, self.task.settings
        first = rank_and_world()[0] == 0  # of several processes one writes
        self.out = self.task.out if first else None
        self.tell, self.should_stop = tell, should_stop
        self.step = 0
        self.name = uuid.uuid4().hex  # tells this run's checkpoints from an earlier one's in the same folder
        self.kept_step = 0  # the last that a checkpoint was written of
        self.stopped = False
        self.skipped_in_a_row = 0
        if self.learner.trains_whole_network and rank_and_world()[1] > 1:
            self.learner.take_parts(shard(self.model.unet, self.learner.weights))
        self.probe = Probe(objective) if self.s.probe_every else None
        self.movement: Movement | None = None
        self.shown_to_train = False
        self.taken = 0  # steps of this process that changed something
        self.prompts: set[str] = set()  # of every step so far that changed something
        self.late = Late(objective.device)
        self.stepper = Stepper(self.learner, self.s)  # last: `train` takes its hooks off the model again
        self.device_step = DeviceStep(objective, self.stepper, self.warn)

    def warn(self, text: str) -> None:
        """Tell a warning."""
        self.say("warning", text=text)

    def say(self, kind: str, **data: Any) -> None:
        """Tell an event of this step."""
        self.tell(Event(kind, self.step, self.s.steps, data))

    def train(self, resume: bool = False) -> Concept:
        """All steps, and the concept; resume: go on from the last checkpoint in `out`."""
        try:
            if resume:
                self.resume()
            if self.step == 0 and self.out is not None:
                self.begin(self.out)
            self.all_steps()
            if self.task.out is not None:
                self.checkpoint()
            return self.finish()
        finally:
            self.stepper.close()

    def all_steps(self) -> None:
        """Step after step to the end or to a stop, with the proof that all of it trains as soon as that shows."""
        scale = self.stepper.scale
        if scale is not None:
            self.say("start", text=said_of_float16(float(scale.value), self.model.unet.conv_in.weight.device.type))
        # A resumed run proves itself again where it has the steps for it: in a few, a small learning rate moves little.
        # One step proves nothing: the first half of a residual has no gradient while the second is zero.
        first, left = self.step, self.s.steps - self.step
        if left >= PROOF_STEP or (first == 0 and left > 1):
            self.movement = Movement(self.stepper.values, self.objective.frozen())
        with Log(self.out, self.s, self.step, self.warn) as log:
            while self.step < self.s.steps and not any_process(bool(self.should_stop())):
                self.one_step(log)
                self.prove()
                self.housekeeping(log)
            self.late.read(all_of_them=True)
        self.stopped = self.step < self.s.steps
        if first == 0 and self.movement is not None:
            self.look_back(self.movement)
        self.movement = None  # it holds the trained parameters

    def prove(self) -> None:
        """Say once that all of it trains; NotTrained where it does not. Steps that were skipped do not count."""
        due = self.taken >= PROOF_STEP or (self.step == self.s.steps and self.taken > 1)
        if self.movement is None or self.shown_to_train or not due:
            return
        self.shown_to_train = True
        unasked = {*self.learner.unreached(self.prompts), *self.learner.indifferent}
        self.say("proof", text=self.movement.check(self.stepper.has_seen, unasked))

    def look_back(self, movement: Movement) -> None:
        """Warn of what a whole run has not trained."""
        unreached = self.learner.unreached(self.prompts)
        if unreached:
            self.warn(f"no picture of this run reached {', '.join(unreached)}: they are as they began")
        unasked = {*unreached, *self.learner.indifferent}
        stuck = movement.stuck(name for name in movement.unmoved() if name not in unasked)
        if stuck:
            self.warn(f"{', '.join(stuck)} did not change a bit in {self.step} steps: the learning rate is too small")

    def one_step(self, log: Log) -> None:
        """One optimizer step over all micro-batches; what came of it is heard of in `stepped`."""
        made = self.device_step(self.step)
        self.step = made.step
        rates = {} if self.movement is None else self.stepper.rates_now()
        eager = made.numbers[:0] if made.eager is None else made.eager
        self.late.ask(torch.cat([made.numbers, eager]), partial(self.stepped, log, made, rates, len(eager)))
        self.late.read(all_of_them=self.something_due())

    def stepped(self, log: Log, made: Made, rates: dict[str, float], checked: int, numbers: list[float]) -> None:
        """Take note of a step that the device has finished: tell of it, or that it was skipped."""
        if checked:
            self.device_step.check_replay(numbers[:-checked], numbers[-checked:])
        names = sorted({n for b in made.batches for n in b.names})
        if self.stepper.follow(numbers[:VERDICT], made.before):
            self.skipped_in_a_row = 0
            self.taken += 1
            self.prompts.update(prompt for b in made.batches for prompt in b.prompts)
            if self.movement is not None:
                self.movement.stepped(rates)
            losses = self.device_step.losses(numbers)
            self.tell(Event("step", made.step, self.s.steps, log.step(made.step, losses, made.rate)))
            return
        self.skipped_in_a_row += not self.stepper.overflowed  # the scale is being found: not the learning rate's fault
        text = f"step {made.step} was skipped: {self.stepper.reason} on {', '.join(names[:6])}"
        self.tell(Event("warning", made.step, self.s.steps, {"text": text}))
        if self.skipped_in_a_row == BAD_STEPS:
            self.give_up(names)

    def give_up(self, names: list[str]) -> None:
        """Back to the last good state, saved, and one sentence (TrainingStopped)."""
        self.late.forget()
        from_step = self.stepper.restore_good()
        sentence = (
            f"three steps in a row were not finite (the last on {', '.join(names[:6])}); the learning rate "
            f"{self.s.learning_rate:g} may be too high"
        )
        if from_step is None:
            raise TrainingStopped(f"{sentence}; no good state came before")
        self.step, self.stopped = from_step, True
        self.warn(f"{sentence}; going back to step {from_step}")
        raise TrainingStopped(sentence, self.finish())

    def is_due(self, every: int) -> bool:
        """Whether something that is done from time to time is done after this step."""
        return bool(every) and self.step % every == 0

    def something_due(self) -> bool:
        """Whether this step's outcome must be known before the next one."""
        s = self.s
        return self.step == s.steps or any(map(self.is_due, (s.probe_every, s.checkpoint_every, s.preview_every)))

    def housekeeping(self, log: Log) -> None:
        """What is due after this step: the probe, a checkpoint, a preview."""
        s = self.s
        if self.probe is not None and (self.is_due(s.probe_every) or self.step == s.steps):
            held_out, drift = self.with_room(self.probe.measure)
            log.probe(self.step, held_out, drift)
            since = f"loss on held-out noise {held_out:.4f} ({self.probe.at_first:.4f} at first)"
            self.say("probe", text=f"{since}, the class drifted by {drift:.1%}", held_out=held_out, drift=drift)
        if self.task.out is not None and self.is_due(s.checkpoint_every):
            self.checkpoint()
        if self.is_due(s.preview_every) and s.preview_prompts:
            self.preview()

    def with_room(self, work: Callable[[], Found]) -> Found:
        """Do some work between steps; where it finds no memory beside a recorded step, without that."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if not self.device_step.forget():
                raise
        gc.collect()
        torch.cuda.empty_cache()
        return work()

    def preview(self) -> None:
        """Pictures from where the run stands; whatever goes wrong here does not end it."""
        before = set(self.model.loaded)
        pcs_kernels.forget_packed_weights()
        if self.model.turns.on:
            self.device_step.forget()  # the UNet comes back to another place than a recorded step knows
        try:
            random = torch.get_rng_state()
            with torch.no_grad():
                drawn = self.with_room(partial(preview_images, self.objective, list(self.s.preview_prompts)))
            torch.set_rng_state(random)
            paths = []
            if self.out is not None:
                folder = self.out / "samples"
                folder.mkdir(parents=True, exist_ok=True)
                for i, image in enumerate(drawn):
                    paths.append(folder / f"step-{self.step:05d}-{i}.png")
                    image.save(paths[-1])
            self.say("preview", path=", ".join(map(str, paths)), images=drawn)
        except Exception as error:
            self.warn(f"the preview failed ({' '.join(str(error).split())}); training goes on")
        finally:
            self.model.release(*({"vae", "text_encoders"} - before))
            if self.model.turns.on:
                self.model.turns.bring_back(self.model)
            pcs_kernels.forget_packed_weights()  # packed for the shapes of a drawing; a step packs for its own

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that goes on from it."""
        data, subjects = self.objective.data, self.task.subjects
        s = self.s.asdict() | {"subjects": [[x.settings.class_word, x.settings.token] for x in subjects]}
        s["processes"] = rank_and_world()[1]
        starts = [x.settings.init_word for x in subjects]  # each subject's; the settings are the first one's
        base = {"base": data.base, "base_name": self.model.name, "run": self.name}
        return base | {"data": data.digest, "settings": s, "starts": starts}

    def begin(self, out: Path) -> None:
        """Write what the run begins with, for a resume before the first checkpoint, and which run is the last here."""
        self.check_room(out)
        if checkpoints(out):
            self.warn(f"{out} holds checkpoints of an earlier run: they are removed when this one writes its first")
        try:
            written_text(out / BEGUN, json.dumps(self.identity(), indent=1, default=str))
        except OSError as error:
            with suppress(OSError):
                (out / BEGUN).unlink()  # an earlier run's: it would say that this one's checkpoints are not the last
            self.warn(f"{out / BEGUN} could not be written ({error.strerror}); training goes on")

    def check_room(self, out: Path) -> None:
        """Whether the disk holds what will be learned (OSError), and a checkpoint beside it (a warning)."""
        learned = sum(p.numel() * p.element_size() for p in self.learner.parameters.values())
        free = free_bytes(out)
        if free < learned:
            raise OSError(
                f"the disk of {out} has {bytes_text(free)} left, and what is learned takes {bytes_text(learned)}; free "
                "some space or choose another folder"
            )
        if free < 2 * learned:
            self.warn(f"the disk of {out} has {bytes_text(free)} left: the concept's file fits, and no checkpoint does")

    def checkpoint(self) -> None:
        """Write where the run stands; a full disk is a warning, not the end."""
        if self.kept_step == self.step > 0:
            return  # a whole one is not replaced: killed between the old one and the new, a run would have neither
        tensors = {}
        for name, p in self.learner.parameters.items():
            value = full_value(p.detach())  # one at a time: the whole network need not fit on a device
            if self.out is not None:
                tensors[name] = value if not is_part(p) else value.cpu()
        state = self.identity() | {"step": self.step, "optimizer": self.stepper.state_dict()}
        failed = False
        try:
            if self.out is not None:  # else another process writes, and this one has given its parts
                path = write_checkpoint(self.out, self.step, tensors, state, self.s.keep)
                self.say("checkpoint", path=str(path))
        except OSError as error:
            failed = True
            self.warn(f"{error}; training goes on")
        if not any_process(failed):  # all try again together
            self.kept_step = self.step

    def resume(self) -> None:
        """Take the state of the last checkpoint in `out`; ValueError where it is of another run.

        A run that was ended before its first checkpoint stays at step 0.
        """
        out = self.task.out
        now = json.loads(json.dumps(self.identity(), default=str))
        older = self.objective.data.older_digest
        anew = begins_anew(out)
        assert out is not None  # else it has said so
        if anew:
            was = begun_with(out)
            if was:
                check_same_run(out / BEGUN, was, now, type(self.s), older)
            whose = " of its last run" if checkpoints(out) else ""
            self.say(
                "start", text=f"{out} has no checkpoint{whose}: its run ended before the first one and begins anew"
            )
            return
        found = run_checkpoints(out)
        tensors, state = read_checkpoint(found[-1])
        check_same_run(found[-1], state, now, type(self.s), older)
        for name, p in self.learner.parameters.items():
            if grammar.is_word(name) and p.shape != tensors[name].shape:  # an older version gave the word other rows
                replace_data(p, torch.empty_like(tensors[name], dtype=p.dtype, device=p.device))
            fill(p, tensors[name])
        self.stepper.load_state_dict(state["optimizer"])
        self.step = self.kept_step = int(state["step"])
        self.name = state.get("run") or ""
        self.say("start", text=f"goes on from {found[-1].name}")

    def finish(self) -> Concept:
        """The concept, saved, and its file shown to predict what memory predicts."""
        self.stepper.close()
        self.device_step.forget()
        pcs_kernels.forget_packed_weights()
        with pcs_kernels.packing("none"):  # three predictions, each with weights of its own
            return self.proven()

    def proven(self) -> Concept:
        """The concept off the model and saved, and what its file predicts."""
        whole = self.learner.trains_whole_network
        in_memory = memory_predicts(self.task, self.learner)
        concept = learned(self.task, self.objective.data, self.learner, self.step, not self.stopped)
        self.learner.restore()
        pcs_kernels.forget_packed_weights()  # with it go the pages of what has trained
        path = None if self.out is None else self.saved(concept, self.out / "concept.safetensors")
        if path is not None:
            self.say("saved", path=str(path))
        base = None
        if whole and path is not None:  # one network at a time: the base's, then the file's pages in place of a copy
            concept = replace(concept, tensors={})
            base = base_predicts(self.task, concept) if self.step > 0 else None
            self.model.release("unet")
            pcs_kernels.forget_packed_weights()
        again = concept if path is None else load_concept(path)
        if self.step > 0:
            base = base_predicts(self.task, again) if base is None else base
            self.say("proof", text=file_proof(self.task, in_memory, base, again, path))
        concept = again if whole else concept
        self.say("stopped" if self.stopped else "done", text=f"{self.step} steps of {self.s.method}")
        return concept

    def saved(self, concept: Concept, path: Path) -> Path:
        """The concept's file; NotSaved says what is kept where it cannot be written."""
        try:
            return concept.save(path)
        except OSError as error:
            found = run_checkpoints(path.parent)
            step = step_of(found[-1]) if found else None
            if step is None:
                kept = "no checkpoint could be kept either, so nothing of it is on the disk"
            elif step == self.step:
                kept = f"{found[-1].name} holds all {step} steps: --resume, train(resume=True), writes the concept then"
            else:
                kept = f"--resume, train(resume=True), goes on from step {step} then, the last that could be kept"
            raise NotSaved(f"{error}; {kept}", concept) from error
