"""What was learned, apart from the model it was learned on: files, attaching, merging, blending, compression."""

from .concept import Concept as Concept
from .concept import load_concept as load_concept
from .merging import blend as blend
from .merging import compress as compress
from .merging import merge as merge
