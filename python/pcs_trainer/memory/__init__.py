"""What a training step and a whole run need in memory, and the fastest recomputation plans that fit a budget."""

from .planner import Plan as Plan
from .planner import plan as plan
from .whole_run import RunPlan as RunPlan
from .whole_run import plan_run as plan_run
