"""What a run leaves: the concept, its file, and the proof that the file is what was learned."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from torch import Tensor

from ..concept.attach import in_place, predict
from ..concept.concept import Concept
from ..data.prompts import own_words
from ..distributed import is_part
from ..methods.learner import Learner
from ..unet.config import family
from .proof import check_file
from .task import Prepared, Task


def learned(task: Task, data: Prepared, learner: Learner, step: int, finished: bool) -> Concept:
    """What has been learned so far, on the CPU, with how it was made.

    Args:
        task: what the run was asked to do.
        data: its photos and class images.
        learner: what trains, still on the model.
        step: how many steps were taken.
        finished: whether those were all.
    """
    s, model = task.settings, task.model
    meta = {
        "method": s.method,
        "token": s.token,
        "class_word": s.class_word,
        "identifier": s.identifier,
        "instance_prompt": task.prompt,
        "steps": str(step),
        "seed": str(s.seed),
        "learning_rate": f"{s.learning_rate:g}",
        "resolution": f"{data.size}x{data.size}",
        "hold_first": "1" if learner.hold_first else "0",
        "base_name": model.name,
        "prediction": model.schedule.prediction,
        "family": family(model.unet.settings),
        "settings": json.dumps(s.asdict()),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "finished": "1" if finished else "0",
        "subjects": json.dumps([[x.settings.token, x.settings.class_word] for x in task.subjects]),
        "names": json.dumps([own_words(x.settings) for x in task.subjects]),
    }
    return Concept(s.method, learner.tensors(), learner.kept_rows(), meta, data.base)


def memory_predicts(task: Task, learner: Learner) -> Tensor:
    """The model's prediction for fixed noise with what was learned still on it, by the same kernels as the file's."""
    if learner.trains_whole_network:
        for p in learner.parameters.values():
            if not is_part(p):  # what several processes share is put together for the kernels of weights that train
                p.requires_grad_(False)  # those round bfloat16 elsewhere than the kernels of frozen weights
    return predict(task.model, [], task.prompt, words=learner.rows, hold_first=learner.hold_first)


def base_predicts(task: Task, concept: Concept) -> Tensor:
    """The base model's prediction, by the same operations as with the concept: at strength 0."""
    return predict(task.model, [replace(concept, words={})], task.prompt, strength=0.0)


def file_proof(task: Task, in_memory: Tensor, base: Tensor, again: Concept, path: Path | None) -> str:
    """That what was read from the file (path None: what was learned) predicts what memory did; NotTrained if not."""
    model, prompt = task.model, task.prompt
    with in_place(model, again) as rest:
        from_file = predict(model, [rest], prompt)
    return check_file(in_memory, from_file, base, path or "the concept")
