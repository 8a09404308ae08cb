"""What a training step needs in memory, and the fastest recomputation plans that fit a budget."""

from .planner import Plan as Plan
from .planner import plan as plan
