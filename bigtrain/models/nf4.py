"""Frozen linear layers in 4 bits, for adapters beside them: NF4 (Dettmers et al. 2023, QLoRA, section 3, appendix E).

Each row is cut into blocks of 64 weights, which share a scale in bf16: 4.25 bits a weight. A row depends on no other
one, so any engine that shards rows has the weights of one process.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.models.init import InitialValue

BLOCK = 64
_CHUNK_ELEMENTS = 2**18  # that are quantised at a time
_MARK = "nf4_"
CODES, SCALES = f"{_MARK}codes", f"{_MARK}scales"
# fmt: off
_LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], device="cpu")
# fmt: on
_PAIRS = torch.cartesian_prod(_LEVELS, _LEVELS)  # what a byte stands for


def is_nf4(name: str) -> bool:
    """Return whether a parameter is a part of weights in 4 bits."""
    return f".{_MARK}" in name


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 rows ``(R, C)`` as codes, uint8 ``(R, 32 * N)``, and scales, bf16 ``(R, N)``, of ``N`` blocks each."""
    blocks = F.pad(rows, (0, -rows.shape[1] % BLOCK)).view(len(rows), -1, BLOCK)
    scales = blocks.abs().amax(-1).bfloat16()
    relative = blocks / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(relative, (_LEVELS[1:] + _LEVELS[:-1]) / 2, out_int32=True).view(len(rows), -1, 2)
    return (16 * codes[..., 0] + codes[..., 1]).to(torch.uint8), scales


def dequantise(codes: Tensor, scales: Tensor, num_columns: int) -> Tensor:
    """Return the weights, fp32 ``(R, num_columns)``, that :func:`quantise` has stored."""
    blocks = F.embedding(codes.int(), _PAIRS.to(codes.device)).view(*scales.shape, BLOCK)
    return blocks.mul_(scales[..., None]).view(len(codes), -1)[:, :num_columns]


class _Product(torch.autograd.Function):
    """A product with weights in 4 bits, of which the backward pass keeps no other copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, shape: torch.Size, is_transposed: bool) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape, ctx.is_transposed = shape, is_transposed
        weight = dequantise(codes, scales, shape[1]).to(x.dtype)
        return x @ weight if is_transposed else F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        weight = dequantise(codes, scales, ctx.shape[1]).to(grads[0].dtype)
        return grads[0] @ (weight.T if ctx.is_transposed else weight), None, None, None, None


class NF4Linear(nn.Module):
    """A frozen linear layer in 4 bits in place of ``layer``, an ``nn.Linear`` or a transposed ``Conv1D``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        matrix = layer.get_parameter("weight")
        self.shape, self.is_transposed = matrix.shape, not isinstance(layer, nn.Linear)
        num_blocks = -(-self.shape[1] // BLOCK)
        codes = matrix.new_empty((len(matrix), num_blocks * BLOCK // 2), dtype=torch.uint8)
        scales = matrix.new_empty((len(matrix), num_blocks), dtype=torch.bfloat16)
        self.register_parameter(CODES, nn.Parameter(codes, requires_grad=False))
        self.register_parameter(SCALES, nn.Parameter(scales, requires_grad=False))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        product = _Product.apply(x, self.nf4_codes, self.nf4_scales, self.shape, self.is_transposed)
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True, slots=True)
class Quantised:
    """The codes or scales of a matrix's initial value; an :class:`bigtrain.models.init.InitialValue`."""

    matrix: InitialValue
    shape: torch.Size
    part: str  # :data:`CODES` or :data:`SCALES`

    def fill(self, start: int, out: Tensor) -> None:
        num_blocks, columns = -(-self.shape[1] // BLOCK), self.shape[1]
        width = num_blocks if self.part == SCALES else num_blocks * BLOCK // 2
        for chunk in out.split(width * max(_CHUNK_ELEMENTS // columns, 1)):
            first, last = start // width, -(-(start + len(chunk)) // width)
            rows = torch.empty((last - first) * columns, device="cpu")
            self.matrix.fill(first * columns, rows)
            codes, scales = quantise(rows.view(-1, columns))
            part = scales if self.part == SCALES else codes
            chunk.copy_(part.flatten()[start - first * width :][: len(chunk)])
            start += len(chunk)
