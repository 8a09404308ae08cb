"""LPIPS (arXiv 1801.03924), the perceptual distance of two pictures, by its authors' package where it is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # of pictures [N, 3, H, W] in [-1, 1]

MISSING = "DIV is measured by LPIPS, and the package lpips cannot be imported ({}). Fix: pip install lpips"


def load_lpips() -> Distance:
    """LPIPS on AlexNet, its authors' choice for measuring; ValueError says how to get what is missing.

    The package brings its own linear weights; torchvision fetches AlexNet once, unless torch's cache holds it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips 0.1.4 calls torchvision by arguments that it warns of since 0.13
            from lpips import LPIPS

            network: Distance = LPIPS(net="alex", verbose=False)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch ends in a RuntimeError
        raise ValueError(MISSING.format(error)) from None
    except OSError as error:  # urllib's and the files'
        raise ValueError(
            f"LPIPS's AlexNet is not in {torch.hub.get_dir()}/checkpoints and could not be fetched ({error}); put "
            "torchvision's alexnet file there, or leave DIV out"
        ) from None
    return network


@torch.no_grad()
def mean_distance(distance: Distance, pictures: Sequence[np.ndarray]) -> float | None:
    """Mean distance of every two of some pictures, uint8 [H, W, 3] of one size; None of less than two."""
    ready = [torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for picture in pictures]
    found = [float(distance(a, b)) for a, b in combinations(ready, 2)]
    return float(np.mean(found)) if found else None
