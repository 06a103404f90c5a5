"""The training loss: cross-entropy summed over the targets that count, without all logits at once.

Shape suffixes: B batch, T tokens, D hidden width, V vocabulary, N = B * T, C tokens of one chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigtrain.models.sizes import chunk_tokens

IGNORE_INDEX = -100
"""Target value of a position that does not count."""


def sum_cross_entropy(hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the summed cross-entropy of a linear projection of the hidden states onto the vocabulary.

    Args:
        hidden_BTD: final hidden states, in the activations' dtype.
        weight_VD: output projection.
        targets_BT: int64 token ids; ``IGNORE_INDEX`` where a position does not count.

    Returns:
        Sum over all counting positions, in nats: a scalar in fp32, 0 if none counts.
    """
    wants_gradients = torch.is_grad_enabled() and (hidden_BTD.requires_grad or weight_VD.requires_grad)
    hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk_tokens(len(weight_VD)), wants_gradients)


def sum_cross_entropy_of_logits(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Like :func:`sum_cross_entropy`, for models that hand out logits only."""
    logits_NV = logits_BTV.flatten(0, 1).float()
    return F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients together, chunk by chunk, so that a chunk's logits can be forgotten.

    The gradient of the logits is softmax minus one-hot, which needs nothing from the backward pass but a factor
    (the idea is that of Liger Kernel, Hsu et al. 2024, section 3.2). The three matrix products are those of the
    plain way; there is no recomputation.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, wants_gradients: bool
    ) -> Tensor:
        loss = torch.zeros((), device=hidden_ND.device)
        hidden_grad_ND = torch.empty_like(hidden_ND) if wants_gradients else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_gradients else None
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            hidden_CD, targets_C1 = hidden_ND[part], targets_N[part, None]
            product_CV = F.linear(hidden_CD, weight_VD)
            dtype = product_CV.dtype
            counts_C1 = targets_C1 != IGNORE_INDEX
            targets_C1 = targets_C1.clamp(min=0)
            log_p_CV = F.log_softmax(product_CV.float(), dim=-1)
            del product_CV
            loss -= (log_p_CV.gather(1, targets_C1) * counts_C1).sum()
            if not wants_gradients:
                continue
            logits_grad_CV = log_p_CV.exp_().scatter_add_(
                1, targets_C1, -torch.ones_like(targets_C1, dtype=log_p_CV.dtype)
            )
            logits_grad_CV = logits_grad_CV.mul_(counts_C1).to(dtype)
            hidden_grad_ND[part] = logits_grad_CV @ weight_VD
            weight_grad_VD += logits_grad_CV.T @ hidden_CD
        if wants_gradients:
            ctx.save_for_backward(hidden_grad_ND, weight_grad_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        return hidden_grad_ND.mul_(loss_grad), weight_grad_VD.mul_(loss_grad), None, None, None
