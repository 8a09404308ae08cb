"""Fused kernels for personalizing text-to-image diffusion models; torch is the only dependency.

Every function has a pure-torch reference, a Triton kernel and a native CPU kernel behind one call;
`python -m pcs_kernels` prints which of them this machine runs, and why not the others.
"""

from . import nn as nn
from . import optim as optim
from ._dispatch import BackendUnavailable as BackendUnavailable
from ._dispatch import backend as backend
from ._packed import forget_packed_weights as forget_packed_weights
from ._packed import packing as packing
from ._packed import weight_version as weight_version
from .ops.cross_attention import cross_attention as cross_attention
from .ops.frozen_conv import frozen_conv2d as frozen_conv2d
from .ops.frozen_conv import frozen_linear as frozen_linear
from .ops.geglu import geglu as geglu
from .ops.group_norm_silu import group_norm_silu as group_norm_silu
from .ops.int8_weight import Int8Weight as Int8Weight
from .ops.int8_weight import expand_weight as expand_weight
from .ops.int8_weight import quantize_weight as quantize_weight
from .ops.lowrank_residual import lowrank_residual as lowrank_residual
from .ops.self_attention import self_attention as self_attention
from .ops.trained_conv import trained_conv2d as trained_conv2d
from .ops.trained_conv import trained_linear as trained_linear
from .streaming import StreamedWeight as StreamedWeight
from .streaming import WeightRing as WeightRing

__version__ = "0.1.0"
