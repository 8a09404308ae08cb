"""The network: a hand-written UNet of the Stable Diffusion family on the ops of pcs_kernels."""

from .layers import LowRank as LowRank
from .unet import UNet as UNet
