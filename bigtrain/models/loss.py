"""Cross-entropy summed over targets, computed in chunks that never hold all logits.

Shape suffixes: B batch, T tokens, D hidden width, V vocabulary, N = B * T, C tokens of one chunk, P the vocabulary
with padding.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigtrain.models.exchange import ALONE, Exchange
from bigtrain.models.sizes import chunk_tokens, num_padding_rows
from bigtrain.tasks.base import IGNORE_INDEX

_compile_once = functools.cache(torch.compile)


class Place(NamedTuple):
    """Which rows of the vocabulary a rank has."""

    exchange: Exchange = ALONE  # with the ranks that have the others
    first_row: int = 0
    vocab_size: int = 0  # rows of all ranks


WHOLE = Place()


def sum_cross_entropy(
    hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, *, compiled: bool = False, place: Place = WHOLE
) -> Tensor:
    """Return the cross-entropy in nats of a linear projection onto the vocabulary, summed over targets: an fp32 scalar.

    Targets that are ``IGNORE_INDEX`` do not count; ``compiled`` fuses what is not a matmul by ``torch.compile``. Where
    ``weight_VD`` are some of the rows, at ``place``, the loss is that of all, and the gradient of the hidden states this
    rank's addend.
    """
    wants_gradients = torch.is_grad_enabled() and (hidden_BTD.requires_grad or weight_VD.requires_grad)
    return _ChunkedCrossEntropy.apply(
        hidden_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), wants_gradients, compiled, place
    )


def sum_cross_entropy_of_logits(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Like :func:`sum_cross_entropy`, for models that return logits only."""
    logits_NV = logits_BTV.flatten(0, 1).float()
    return F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes loss and gradients together, chunk by chunk, so that no more than a chunk's logits exist.

    The gradient of the logits is softmax minus one-hot, which needs only a factor from the backward pass (the idea of
    Liger Kernel, Hsu et al. 2024, section 3.2). There are the usual three matmuls and no recomputation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        wants_gradients: bool,
        compiled: bool,
        place: Place,
    ) -> Tensor:
        device, dtype, num_real = hidden_ND.device, _product_dtype(hidden_ND), len(weight_VD)
        num_padding = num_padding_rows(num_real, device.type)
        weight_PD = F.pad(weight_VD.to(dtype), (0, 0, 0, num_padding)) if num_padding else weight_VD.to(dtype)
        num_ranks = place.exchange.size
        fused = compiled and dtype is not torch.float32  # fp32 needs no conversions, so torch's own kernels will do
        # All ranks exchange as often, whatever their rows: by the largest part, that of the last rank.
        most = len(weight_PD) if num_ranks == 1 else -(-place.vocab_size // num_ranks)
        chunk = chunk_tokens(most, device.type, fused=fused)
        # Compiled, it is two kernels that read and write the logits in their own dtype.
        gradient: Callable[[Tensor, Tensor], Tensor] = (
            _compile_once(_turn_into_gradient) if fused else _turn_into_gradient
        )
        if num_ranks > 1:
            gradient = functools.partial(_turn_rows_into_gradient, place=place, num_real=num_real)
        loss = torch.zeros((), device=device)
        # One buffer for all chunks: on a CPU, allocating takes longer than computing.
        buffer_CP = weight_PD.new_empty(min(chunk, len(hidden_ND)), len(weight_PD))
        hidden_grad_ND = torch.empty_like(hidden_ND) if wants_gradients else None
        weight_grad_PD = torch.zeros_like(weight_PD, dtype=torch.float32) if wants_gradients else None
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            hidden_CD, targets_C1 = hidden_ND[part].to(dtype), targets_N[part, None]
            logits_CP = torch.mm(hidden_CD, weight_PD.T, out=buffer_CP[: len(hidden_CD)])
            logits_CP[:, num_real:] = -math.inf
            if not wants_gradients and num_ranks == 1:
                loss += sum_cross_entropy_of_logits(logits_CP[None], targets_C1)
                continue
            loss += gradient(logits_CP, targets_C1)
            if not wants_gradients:
                continue
            counts_C1 = targets_C1 != IGNORE_INDEX
            hidden_grad_ND[part] = (logits_CP @ weight_PD) * counts_C1
            hidden_CD = hidden_CD * counts_C1
            if dtype is torch.float32:
                torch.addmm(weight_grad_PD, logits_CP.T, hidden_CD, out=weight_grad_PD)
            else:
                weight_grad_PD += logits_CP.T @ hidden_CD
        if wants_gradients:
            ctx.save_for_backward(hidden_grad_ND, weight_grad_PD[:num_real].to(weight_VD.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        return hidden_grad_ND.mul_(loss_grad), weight_grad_VD.mul_(loss_grad), None, None, None, None


def _product_dtype(x: Tensor) -> torch.dtype:
    device_type = x.device.type
    is_cast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_cast else x.dtype


def _turn_into_gradient(logits_CP: Tensor, targets_C1: Tensor) -> Tensor:
    """Overwrite logits by the gradient of their cross-entropy, still to be masked, and return its sum over targets."""
    counts_C1, targets_C1 = targets_C1 != IGNORE_INDEX, targets_C1.clamp(min=0)
    exact_CP = logits_CP.float()
    largest_C1, target_C1 = exact_CP.amax(-1, keepdim=True), exact_CP.gather(1, targets_C1)
    p_CP = exact_CP.softmax(-1) if torch.compiler.is_compiling() else torch.softmax(exact_CP, -1, out=exact_CP)
    # Via the largest term: the probability of the target itself can underflow.
    log_p_C1 = target_C1 - largest_C1 + p_CP.amax(-1, keepdim=True).log()
    if p_CP is not logits_CP:
        logits_CP.copy_(p_CP)
    # Subtract before rounding: in bf16, 0.999 would be 1.
    logits_CP.scatter_(1, targets_C1, (log_p_C1.exp() - 1).to(logits_CP.dtype))
    return -(log_p_C1 * counts_C1).sum()


def _turn_rows_into_gradient(logits_CP: Tensor, targets_C1: Tensor, *, place: Place, num_real: int) -> Tensor:
    """Do the same where this rank has some rows of the vocabulary: two small exchanges.

    With the largest logit m of all ranks and the sum z of all ``exp(logit - m)``, the target's log-probability is
    ``target - m - log z``; one rank has the target, and adds what the others lack.
    """
    counts_C1, rows_C1 = targets_C1 != IGNORE_INDEX, targets_C1 - place.first_row
    is_here_C1 = (rows_C1 >= 0) & (rows_C1 < num_real)
    rows_C1 = rows_C1.where(is_here_C1, 0)
    exact_CP = logits_CP.float()
    largest_C1 = place.exchange.maximum(exact_CP.amax(-1, keepdim=True))
    target_C1 = (exact_CP.gather(1, rows_C1) - largest_C1).where(is_here_C1, 0.0)
    e_CP = torch.exp(exact_CP.sub_(largest_C1), out=exact_CP)
    sums_C2 = place.exchange.total(torch.cat([e_CP.sum(-1, keepdim=True), target_C1], dim=1))
    log_p_C1 = sums_C2[:, 1:] - sums_C2[:, :1].log()
    p_CP = e_CP.div_(sums_C2[:, :1])
    gradient_C1 = (log_p_C1.exp() - 1).where(is_here_C1, p_CP.gather(1, rows_C1))
    if p_CP is not logits_CP:
        logits_CP.copy_(p_CP)
    logits_CP.scatter_(1, rows_C1, gradient_C1.to(logits_CP.dtype))
    return -(log_p_C1 * counts_C1).sum()
