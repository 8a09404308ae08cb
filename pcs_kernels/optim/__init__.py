"""The optimizer: AdamW with 8-bit states, its step inside the backward, and the loss scale of float16."""

from .adamw8bit import AdamW8bit as AdamW8bit
from .in_backward import StepInBackward as StepInBackward
from .in_backward import step_in_backward as step_in_backward
from .in_backward import sum_of_squares as sum_of_squares
from .loss_scale import LossScale as LossScale
