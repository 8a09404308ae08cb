"""The embedded model's training set as files: rendered once to a memory-mapped file, read many times."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...files import written_text
from .. import world
from ..training_set import training_captions, training_scene

BLOCK = 500  # scenes that a process renders before it sends them: 6 MB of pictures


def _render_block(start: int, stop: int) -> tuple[int, NDArray[np.uint8], list[list[str]]]:
    scenes = [training_scene(i) for i in range(start, stop)]
    pictures = np.stack([world.render(s) for s in scenes])
    return start, pictures, [training_captions(i, s) for i, s in zip(range(start, stop), scenes, strict=True)]


def render_set(
    cache: str | Path, count: int, workers: int = 1, report: Callable[[str], object] = print
) -> tuple[NDArray[np.uint8], list[list[str]]]:
    """Render the first scenes of the training set where the cache does not hold them yet.

    Args:
        cache: folder of the two files.
        count: number of scenes.
        workers: processes that render.
        report: told of every block that is done.

    Returns:
        The pictures as a memory map [count, H, W, 3], and the captions of each.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    picture_file, caption_file = cache / f"pictures-{count}.npy", cache / f"captions-{count}.json"
    if not caption_file.exists():
        shape = (count, world.SIZE, world.SIZE, 3)
        pictures = np.lib.format.open_memmap(f"{picture_file}.part", mode="w+", dtype=np.uint8, shape=shape)
        said: list[list[str]] = [[] for _ in range(count)]
        starts = range(0, count, BLOCK)
        with ProcessPoolExecutor(workers) as pool:
            stops = [min(s + BLOCK, count) for s in starts]
            for start, block, words in pool.map(_render_block, starts, stops):
                pictures[start : start + len(block)] = block
                said[start : start + len(block)] = words
                report(f"rendered {start + len(block)} of {count}")
        pictures.flush()
        os.replace(f"{picture_file}.part", picture_file)
        written_text(caption_file, json.dumps(said))  # last: these captions say that the set is whole
    return np.load(picture_file, mmap_mode="r"), json.loads(caption_file.read_text())
