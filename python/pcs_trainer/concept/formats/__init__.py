"""Other programs' files: what they load of a concept, and concepts read from what they wrote."""

from .reading import import_concept as import_concept
from .report import Report as Report
from .writing import export as export
