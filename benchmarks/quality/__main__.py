"""The quality benchmark's command: python -m benchmarks.quality, or python benchmarks/quality."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Python puts this folder first when it runs it; its modules must not hide others of the same name.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "python")]

from quality.measure import main

if __name__ == "__main__":
    sys.exit(main())
