"""What tells base models apart, and one state of a network's weights from another."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..unet.int8 import layer_in_8_bits, original, own_parameters
from ..unet.unet import UNet

TENSORS, VALUES = 8, 4  # 32 weights from all depths: a header of 300 characters, and no fine-tune leaves all of them
SMALLEST = 64  # of a tensor that is read; biases and norms are left out, as many fine-tunes leave those as they were
# bfloat16 keeps 8 bits: a rounded weight is off by at most 1/256 (0.4 %), and both models may have been rounded.
TOLERANCE = 0.01
FLOOR = 1e-6  # near zero a relative limit would ask for equal bits

# Kept by network, not on it: a fine-tune that trains it in place goes on saying which model it began with.
_known: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class HasUNet(Protocol):
    """A Model, as far as it is asked here."""

    @property
    def unet(self) -> UNet:
        """The denoising network."""


def fingerprint(model: HasUNet) -> str:
    """A hash of the UNet's configuration and 32 of its weights, as the model was when first asked.

    Compare two with `same_base`: the same model in another precision has another string.
    """
    return fingerprint_of(model.unet)


def fingerprint_of(unet: UNet) -> str:
    """`fingerprint` of the model that has this UNet. Weights in 8 bits are read as they were in its file."""
    if unet not in _known:
        settings = json.dumps(_hashed(unet.settings), sort_keys=True, default=str)
        named = sorted((n, p) for n, p in own_parameters(unet) if p.numel() >= SMALLEST and p.dim() > 1)
        chosen = [_as_it_was(unet, n, p) for n, p in named[:: max(1, len(named) // TENSORS)]][:TENSORS]
        values = [float(p.flatten()[k * (p.numel() // VALUES)]) for p in chosen for k in range(VALUES)]
        digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        _known[unet] = digest + ":" + ",".join(f"{v:.6g}" for v in values)
    return _known[unet]


def _as_it_was(unet: UNet, name: str, p: nn.Parameter) -> Tensor:
    layer = layer_in_8_bits(unet, name)
    return p.detach() if layer is None else original(layer, unet.conv_in.weight)


def weights_mark(network: nn.Module) -> str:
    """A hash of four values of every tensor of a network as it is now: the key of what is kept of its output.

    Unlike a fingerprint it is exact: what another precision gives has another key.
    """
    content = hashlib.sha256()
    for name, p in sorted(network.named_parameters()):
        at = torch.arange(min(VALUES, p.numel()), device=p.device) * max(1, p.numel() // VALUES)
        values = p.detach()[torch.unravel_index(at, p.shape)].float().tolist()  # `flatten` would copy channels-last
        content.update(f"{name} {list(p.shape)} {p.dtype} {values}".encode())
    return content.hexdigest()[:16]


def _hashed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that its hash is made of."""
    kept = dict(settings)
    if not any(kept["only_cross_attention"]):
        del kept["only_cross_attention"]  # fingerprints in concept files are older than this setting
    return kept


def same_base(a: str, b: str) -> bool:
    """Whether two fingerprints are of one model, whatever the precision of either."""
    (config_a, _, values_a), (config_b, _, values_b) = a.partition(":"), b.partition(":")
    if config_a != config_b:
        return False
    pairs = [(float(x), float(y)) for x, y in zip(values_a.split(","), values_b.split(","), strict=False)]
    return all(abs(x - y) <= TOLERANCE * max(abs(x), abs(y), FLOOR) for x, y in pairs)
