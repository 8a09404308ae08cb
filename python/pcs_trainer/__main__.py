"""python -m pcs_trainer: the `pcs` command."""

import sys

from .cli import main

sys.exit(main())
