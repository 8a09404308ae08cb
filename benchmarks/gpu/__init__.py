"""Everything that a GPU is asked, in sections that each keep what they have: `python -m benchmarks.gpu`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A bare machine has the repository and no installation of it.
sys.path[:0] = [str(part) for part in (ROOT, ROOT / "python") if str(part) not in sys.path]
