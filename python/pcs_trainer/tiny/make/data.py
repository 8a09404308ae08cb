"""The embedded model's training set as files: rendered once to a memory-mapped file, read many times."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from .. import world
from ..training_set import training_captions, training_scene

BLOCK = 500


def _render_block(start, stop):
    scenes = [training_scene(i) for i in range(start, stop)]
    pictures = np.stack([world.render(s) for s in scenes])
    return start, pictures, [training_captions(i, s) for i, s in zip(range(start, stop), scenes, strict=True)]


def render_set(cache, count, workers=1, report=print):
    """Pictures (uint8 memory map) and captions (list of lists) of the first ``count`` scenes, made if missing."""
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    picture_file, caption_file = cache / f"pictures-{count}.npy", cache / f"captions-{count}.json"
    if not caption_file.exists():
        shape = (count, world.SIZE, world.SIZE, 3)
        pictures = np.lib.format.open_memmap(f"{picture_file}.part", mode="w+", dtype=np.uint8, shape=shape)
        said = [None] * count
        starts = range(0, count, BLOCK)
        with ProcessPoolExecutor(workers) as pool:
            stops = [min(s + BLOCK, count) for s in starts]
            for start, block, words in pool.map(_render_block, starts, stops):
                pictures[start : start + len(block)] = block
                said[start : start + len(block)] = words
                report(f"rendered {start + len(block)} of {count}")
        pictures.flush()
        os.replace(f"{picture_file}.part", picture_file)
        Path(f"{caption_file}.part").write_text(json.dumps(said))
        os.replace(f"{caption_file}.part", caption_file)
    return np.load(picture_file, mmap_mode="r"), json.loads(caption_file.read_text())
