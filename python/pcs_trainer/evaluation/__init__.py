"""How good a concept is: subject fidelity, prompt fidelity, diversity, and the image encoders that judge."""

from .retrieval import Retrieved as Retrieved
from .retrieval import retrieve as retrieve
from .scores import Scores as Scores
from .scores import evaluate as evaluate
