"""What tells one data set from another: a checkpoint goes on from the pictures that it was made from alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from .batches import Bank, Subject


def data_digest(subjects: Sequence[Subject], prior: Bank | None) -> str:
    """A hash of what the user gave, and of the class images' prompts.

    Latents and drawn class images have no part in it: another backend gives them other last bits, and what decides
    them is among the settings and the base model that a checkpoint holds as well.
    """
    parts = [picture.digest for subject in subjects for picture in subject.pictures]
    if prior is not None:
        parts += [*prior.given, "\n".join(prior.prompts)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def older_digest(subjects: Sequence[Subject], prior: Bank | None) -> str:
    """The hash in checkpoints of version 0.1.0, which held the latents of class images."""
    content = hashlib.sha256()
    for subject in subjects:
        for picture in subject.pictures:
            content.update(picture.digest.encode())
    if prior is not None:
        content.update(np.ascontiguousarray(prior.moments.mean.numpy()).tobytes())
        content.update("\n".join(prior.prompts).encode())
    return content.hexdigest()[:32]
