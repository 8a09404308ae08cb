"""Batches to a concept: the loop, the losses, the optimizer step, and the proofs that a run trains."""

from .events import Event as Event
from .stop import Stop as Stop
from .trainer import Trainer as Trainer
from .trainer import trainable as trainable
