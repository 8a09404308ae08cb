"""The trainer: what to learn, from which pictures, by which method. `run.py` does it and proves that it was done."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pcs_kernels

from ..concept.concept import Concept
from ..data.batches import Subject
from ..data.pictures import load_pictures
from ..data.prompts import choose_token
from ..distributed import join, rank_and_world
from ..errors import out_of_memory
from ..methods import settings_for
from ..methods.learner import Learner
from ..methods.start import is_taken, learner_for
from ..model.model import Model, load_model, refuse_on_the_cpu
from ..settings import Settings
from ..unet.int8 import distance_from_file
from ..unet.layers import replace_data
from .begun import as_it_began
from .checkpoint import begins_anew, begun_with
from .events import Event
from .float16 import float16_networks
from .graph import own_stream
from .objective import Objective, compute_dtype
from .proof import PROOF_SIDE, compare_gradients
from .run import Run
from .task import Say, Task, prepare


def _silent(*_args: Any, **_data: Any) -> None:
    """Nobody is told."""


class Trainer:
    """Learn a subject from a few pictures.

    Args:
        model: a Model, or what `load_model` takes.
        method: a name in `pcs_trainer.methods.TITLES`.
        images: a folder, or a list of files, PIL pictures or uint8 arrays.
        class_word: one word for what the pictures show, such as "dog".
        token: the word that will name the subject; "" lets the method choose one.
        out: the folder for checkpoints, log, samples and the concept; None keeps everything in memory.
        masks: a folder of masks of the pictures' names; without it a "-mask" file beside a picture is used.
        concepts: dicts with images, class_word and token, and prior_folder where each has class images of its own:
            several subjects that are learned together.
        overrides: any of the method's settings.
    """

    def __init__(
        self,
        model: Model | str | Path,
        method: str = "personalized_residuals",
        images: Any = None,
        class_word: str = "",
        token: str = "",
        *,
        out: str | Path | None = None,
        masks: str | Path | None = None,
        concepts: list[dict[str, Any]] | None = None,
        **overrides: Any,
    ) -> None:
        given = _asked_for(images, class_word, token, concepts)
        if out is not None and not isinstance(out, (str, Path)):
            raise ValueError(f"out must be the path of a folder, or None, not {out!r}")
        self.model = load_model(model) if isinstance(model, (str, Path)) else model
        rank, _ = join()
        folder = None if out is None else _writable(Path(out)) if rank == 0 else Path(out)
        subjects = [self._subject(method, one, masks, overrides, number) for number, one in enumerate(given)]
        tokens = [subject.settings.token for subject in subjects]
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"the concepts share the token {tokens[0]!r}: give each a token of its own")
        self._asked = [{*overrides, *(name for name, value in one.items() if value)} for one in given]
        self.task = Task(self.model, subjects[0].settings, tuple(subjects), folder)
        refused = self.task.method.one_subject(self.settings) if len(subjects) > 1 else None
        if refused:
            raise ValueError(refused)
        self._learner: Learner | None = None

    @property
    def settings(self) -> Settings:
        """The first subject's settings, with the token that was chosen: they decide the run."""
        return self.task.settings

    @property
    def out(self) -> Path | None:
        """The folder of checkpoints, log, samples and the concept."""
        return self.task.out

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """What is learned: its pictures, and the settings with its own class word and token."""
        return self.task.subjects

    def _subject(self, method: str, one: dict[str, Any], masks: Any, overrides: dict[str, Any], number: int) -> Subject:
        chosen = {"class_word": one.get("class_word") or "", "token": one.get("token") or ""} | overrides
        if one.get("prior_folder"):
            chosen["prior_folder"] = str(one["prior_folder"])
        s = settings_for(self.model, method, **chosen)
        if not s.class_word.strip() and s.identifier != "plain":
            raise ValueError("class_word is missing: one word for what the pictures show, such as 'dog' or 'mug'")
        s = replace(s, seed=s.seed + number)  # each has a rare word of its own, to be called by or to start from
        pictures = load_pictures(one["images"], one.get("masks") or masks)
        self._hold_model(s)  # before a token is chosen: a checkpoint file's tokenizers come after its UNet
        return Subject(pictures, choose_token(self.model, s))

    @property
    def learner(self) -> Learner:
        """What trains, put on the model when first asked for."""
        if self._learner is None:
            self._hold_model(self.settings)
            self._learner = learner_for(self.model, [subject.settings for subject in self.subjects])
            if self._learner.text_trains and self.settings.offload:
                self.model.stay("text_encoders")
                self._learner.come_to(self.model.device)  # it was put on encoders that were waiting
        return self._learner

    def _hold_model(self, s: Settings) -> None:
        """Weights as the settings want them held, and networks where they want them; not under another training."""
        if "unet" in self.model.loaded and is_taken(self.model):
            return
        refuse_on_the_cpu(self.model.device, states=s.states)
        self.model.hold(s.weights, s.resident)
        self.model.offload(s.offload)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every tensor that trains, by the name that the concept file gives it."""
        return self.learner.parameters

    def objective(self, say: Say = _silent) -> Objective:
        """The loss of this training: pictures as latents, what trains on the model, frozen texts encoded."""
        if self._learner is None:
            self._hold_model(self.settings)  # another Trainer on the same model may have wanted it otherwise
        # Class images are the frozen model's, also where `trainable()` has put what trains on the model already.
        with self._learner.base() if self._learner else nullcontext():
            data = prepare(self.task, say)
        learner = self.learner
        if learner.trains_whole_network and rank_and_world()[1] == 1:
            _channels_last(self.model.unet)
        self.model.unet.set_plan(self.settings.plan)
        return Objective(self.task, data, learner)

    def train(
        self,
        on_event: Callable[[Event], Any] | None = None,
        should_stop: Callable[[], bool] | None = None,
        resume: bool = False,
    ) -> Concept:
        """Run all steps.

        Args:
            on_event: called with every Event: steps, warnings, proofs, previews, files.
            should_stop: asked between steps; the run is saved and ends where it answers True. No signal is taken here:
                Ctrl-C raises KeyboardInterrupt at once, and the last checkpoint is what is kept. With
                `pcs_trainer.training.Stop`, `with Stop() as stop: trainer.train(should_stop=stop)`, Ctrl-C and SIGTERM
                end the run after the running step.
            resume: go on from the last checkpoint in `out`; a run that ended before its first one begins anew.

        Returns:
            what was learned; also in `out`.

        Raises:
            TrainingStopped: three steps in a row were not finite; the error holds the last good concept.
            NotTrained: a proof failed.
            NotSaved: the concept could not be written (a full disk); the error holds it.
        """
        # Of several processes one tells.
        tell = _silent if on_event is None or rank_and_world()[0] != 0 else on_event

        def say(kind: str, **data: Any) -> None:
            tell(Event(kind, 0, self.settings.steps, data))

        try:
            with pcs_kernels.packing(self.settings.packing):
                anew = resume and begins_anew(self.out)
                if resume:
                    self._take_up(say)
                objective = self.objective(say)
                if self.settings.check_backend and (anew or not resume):
                    self._check_gradients(objective, say)
                with own_stream(objective.device):
                    return Run(objective, tell, _never if should_stop is None else should_stop).train(resume)
        finally:
            if self._learner is not None:
                self._learner.restore()
                self._learner = None

    def _take_up(self, say: Say) -> None:
        """Give the run the settings that it began with, where the caller asked for none."""
        was, before = begun_with(self.out), self.subjects
        subjects = tuple(
            replace(subject, settings=as_it_began(subject.settings, asked, was, number))
            for number, (subject, asked) in enumerate(zip(before, self._asked, strict=True))
        )
        if [subject.settings for subject in subjects] == [subject.settings for subject in before]:
            return
        old, new = before[0].settings.asdict(), subjects[0].settings.asdict()
        changed = ", ".join(f"{name} {value!r}" for name, value in new.items() if value != old[name])
        say("start", text=f"goes on with what the run began with: {changed or 'its words'}")
        if self._learner is not None:
            self._learner.restore()
            self._learner = None
        self.task = replace(self.task, settings=subjects[0].settings, subjects=subjects)
        self._hold_model(self.settings)

    def _check_gradients(self, objective: Objective, say: Say) -> None:
        """The proof before step 1; a machine without the memory for it is told so, and trains."""
        exact = compute_dtype(self.model.unet) == torch.float32
        whole = objective.batch(0, 0)
        batch = whole.smallest(PROOF_SIDE)
        halves, share = float16_networks(self.learner), 1.0
        if halves:  # gradients as small as the training's own, whose loss is the mean over more values
            share = batch.latents.numel() / whole.latents.numel() / self.settings.accumulate
        try:
            loss = partial(objective.loss, batch, 0)
            text = compare_gradients(self.learner.parameters, lambda: loss()[0] * share, exact, halves)
            distance = distance_from_file(self.model.unet, loss)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            say("warning", text="gradients were not compared with the reference: out of memory")
        else:
            say("proof", text=text)
            if distance is not None:
                text = f"predictions with weights in 8 bits are {distance:.1%} from those of the model's files"
                say("proof", text=text)
        pcs_kernels.forget_packed_weights()  # packed for the shapes of this batch; a step packs for its own


def _asked_for(images: Any, class_word: str, token: str, concepts: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """One dict a subject; ValueError where its pictures are missing."""
    if concepts is None:
        if images is None:
            raise ValueError("images is missing: give a folder of pictures, or a list of them")
        return [{"images": images, "class_word": class_word, "token": token}]
    if not isinstance(concepts, (list, tuple)) or not all(isinstance(one, dict) for one in concepts) or not concepts:
        raise ValueError("concepts must be a list of dicts with images, class_word and token, one for each subject")
    for number, one in enumerate(concepts):
        if one.get("images") is None:
            raise ValueError(f"concepts[{number}] has no images: give a folder of pictures, or a list of them")
    return list(concepts)


def trainable(
    model: Model, method: str, class_word: str = "dog", token: str = "", **overrides: Any
) -> dict[str, nn.Parameter]:
    """What a method trains on a model; works on the meta device and needs no picture.

    Returns:
        the parameters by the names that the concept file gives them.
    """
    chosen = settings_for(model, method, class_word=class_word, token=token, **overrides)
    learner = learner_for(model, [choose_token(model, chosen)])
    found = learner.parameters
    learner.restore()
    return found


def _channels_last(unet: nn.Module) -> None:
    """Convolution weights in the layout in which their gradients come: otherwise each step re-orders all of them.

    The others are copied too: a single view of a mapped file would keep the file's pages in memory beside the copies.
    """
    for parameter in unet.parameters():
        layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        replace_data(parameter, parameter.data.clone(memory_format=layout))


def _never() -> bool:
    return False


def _writable(out: Path) -> Path:
    """The folder exists and takes a file, or one sentence now and not after the training."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:  # it has no name: nothing stays, whatever happens
            probe.write(b"x")
    except OSError as error:
        raise ValueError(f"the out folder {out} cannot be written to ({error.strerror}); choose another") from None
    return out
