"""python -m pcs_trainer: the `pcs` command."""

import sys

from .cli.entry import main

sys.exit(main())
