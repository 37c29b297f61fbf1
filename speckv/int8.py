"""Linear maps held in int8: a drafter that reads half as much is twice as fast, and what it drafts is verified anyway.

The target's own weights are never touched.
"""

import torch
from torch import nn
from torch.nn import functional as F

from speckv.kernels import linear_int8

# The op is made for the few rows of a draft; with as many as in a prompt, PyTorch's matrix product is as fast although
# 16-bit weights have to be made for it first (measured with AVX-512; equal from 96 to 192 rows).
MANY_ROWS = 128


class Int8Linear(nn.Module):
    """x @ weight^T + bias for a weight [N, K] that is rounded to int8 row by row, symmetrically.

    dtype is the one that weight had; x [..., K] may have any floating one, and so has the result [..., N].
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        weight = weight.detach()
        self.dtype = weight.dtype
        # A row of zeros stays one.
        scale = weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight.float() / scale.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] < MANY_ROWS:
            out = linear_int8(rows, self.weight, self.scale)
            out = out if self.bias is None else out + self.bias
        else:
            weight = self.weight.to(x.dtype) * self.scale.to(x.dtype).unsqueeze(1)
            out = F.linear(rows, weight, self.bias)
        return out.view(*x.shape[:-1], self.scale.shape[0])


def linear(x, weight, bias=None):
    """F.linear for a weight in floating point, or an Int8Linear, which has its own bias."""
    return weight(x) if isinstance(weight, Int8Linear) else F.linear(x, weight, bias)


def replace_linears(module) -> None:
    """Hold every nn.Linear inside module in int8 from now on."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, Int8Linear(child.weight, child.bias))
        else:
            replace_linears(child)
