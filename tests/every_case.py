"""By default the tests run one case of each path through the code. With PCS_EVERY_CASE=1 (`make test-all`) they run
every method, dtype, shape and card: what differs between those cases is data."""

import os

EVERY_CASE = bool(os.environ.get("PCS_EVERY_CASE"))


def cases(default, more) -> list:
    """The default's, and with PCS_EVERY_CASE the others too."""
    return [*default, *(more if EVERY_CASE else ())]
