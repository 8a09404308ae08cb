"""What the embedded model was trained on: scene and captions of every number, made anew when they are asked for.

A scene depends on its number alone, so that the set can be extended, shared and rebuilt.
"""

import numpy as np

from . import captions, world
from .subjects import subject

# Disjoint ranges of seeds: what the model saw, what the judge saw, what neither saw.
TRAIN_SEEDS, JUDGE_SEEDS, TEST_SEEDS = 100_000_000, 200_000_000, 300_000_000
SUBJECT_SHARE = 0.12  # one scene in eight: the model has to know that objects exist whose look has no name
CAPTIONS_EACH = 4  # each picture is seen about twelve times in training, so not always with the same words
CAPTION_STREAM = 5  # a random stream apart from the scene's, which then does not depend on the number of captions


def training_scene(index: int, base: int = TRAIN_SEEDS, held_out: bool = False) -> world.Scene:
    """Scene number `index`: mostly objects with names, some subjects that have none (each seen once).

    Args:
        index: number of the scene in the set.
        base: first seed of the set's range.
        held_out: draw only triples of class, colour and background that are kept from training.
    """
    rng = np.random.default_rng([base, index])
    seed = base + index
    if rng.random() < SUBJECT_SHARE:
        one = subject(seed)
        return world.with_look(world.scene(seed, kind=one.kind, style="photo"), one.look)
    return world.scene(seed, held_out=held_out)


def training_captions(index: int, scene: world.Scene, base: int = TRAIN_SEEDS) -> list[str]:
    """The CAPTIONS_EACH captions of scene number `index`."""
    rng = np.random.default_rng([base, index, CAPTION_STREAM])
    return [captions.training_caption(scene, rng).text for _ in range(CAPTIONS_EACH)]
