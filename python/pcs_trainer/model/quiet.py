"""Other libraries without their chatter: it says nothing of the model that is loaded. Their errors still show."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """No notes and no bars of these libraries while they are imported and read files; all is as it was afterwards.

    Also a decorator. diffusers and transformers import bitsandbytes where it is installed, which then tells of kernels
    that it did not find.

    Args:
        libraries: diffusers, transformers, or both.
    """
    before = [(log := logging.getLogger("bitsandbytes"), log.level)]
    log.setLevel(logging.ERROR)
    barred = []
    try:
        for name in libraries:
            own = import_module(f"{name}.utils.logging")  # the import sets its logger's level: after it, not before
            log = logging.getLogger(name)
            before.append((log, log.level))
            log.setLevel(max(log.level, logging.ERROR))
            if own.is_progress_bar_enabled():
                barred.append(own)
                own.disable_progress_bar()
                if name == "transformers":
                    _keep_download_bars()
        yield
    finally:
        for own in barred:
            own.enable_progress_bar()
        for log, level in before:
            log.setLevel(level)


def _keep_download_bars() -> None:
    """transformers switches the hub's bars off with its own."""
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()
