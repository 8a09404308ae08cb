"""Concepts to pictures: samplers, localized attention-guided sampling (LAG), captured attention maps."""

from .drawing import sample as sample
from .lag import Lag as Lag
from .lag import Maps as Maps
