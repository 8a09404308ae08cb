"""What was learned, apart from the model it was learned on: files, attaching, merging, blending, compression."""

from .blending import blend as blend
from .compression import compress as compress
from .concept import Concept as Concept
from .loading import load_concept as load_concept
from .merging import Merged as Merged
from .merging import merge as merge
