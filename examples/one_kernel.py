"""One kernel in another model: a plain PyTorch attention block, with its attention replaced by pcs_kernels.

python examples/one_kernel.py
"""

import torch
from torch import nn

import pcs_kernels


class Attention(nn.Module):
    """Cross-attention as most models write it."""

    def __init__(self, width: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(n, width, bias=False) for n in (width, text_width, text_width))

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.split(layer(y)) for layer, y in ((self.q, x), (self.k, text), (self.v, text)))
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def split(self, y: torch.Tensor) -> torch.Tensor:
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class WithKernel(Attention):
    """The same module with one line replaced; the attention map of any token comes with the output."""

    def forward(self, x: torch.Tensor, text: torch.Tensor, capture: torch.Tensor | None = None):
        q, k, v = (self.split(layer(y)) for layer, y in ((self.q, x), (self.k, text), (self.v, text)))
        out, maps = pcs_kernels.cross_attention(q, k, v, capture)
        return out.transpose(1, 2).flatten(2), maps


torch.manual_seed(0)
theirs = Attention(width=64, text_width=96, heads=4)
ours = WithKernel(width=64, text_width=96, heads=4)
ours.load_state_dict(theirs.state_dict())
x, text = torch.randn(2, 256, 64), torch.randn(2, 20, 96)  # 16 x 16 positions, 20 tokens

capture = torch.zeros(2, 1, 20)
capture[:, 0, 5] = 1.0  # the map of token 5
y, maps = ours(x, text, capture)
difference = float((y - theirs(x, text)).detach().abs().max())
average = float(maps.detach().mean())
print(f"largest difference {difference:.1e}; a map of token 5: {list(maps.shape)}, {average:.3f} on average")

gradients = [
    torch.autograd.grad(out.square().sum(), module.k.weight)[0]
    for module, out in ((ours, y), (theirs, theirs(x, text)))
]
print(f"largest difference of a gradient {float((gradients[0] - gradients[1]).abs().max()):.1e}")
