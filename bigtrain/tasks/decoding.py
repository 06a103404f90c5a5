"""Texts written by a decoder, token by token."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.distributed.collectives import all_reduce_sum


def write_greedily(
    network: Callable[..., Tensor], inputs: Sequence[Tensor], first_B: Tensor, *, num_tokens: int, eos_id: int
) -> Tensor:
    """Return the likeliest token at each place, int64 ``(B, num_tokens)``, ``eos_id`` from the end of each text on.

    ``network`` returns logits ``(B, T, V)`` of the encoder's inputs and the tokens so far, ``(B, T)``, which begin with
    ``first_B``. All ranks compute as often, until the texts of all have ended: parameters may be gathered in each pass.
    """
    tokens_BT = first_B[:, None]
    has_ended_B = torch.zeros_like(first_B, dtype=torch.bool)
    for _ in range(num_tokens):
        next_B = network(*inputs, tokens_BT)[:, -1].argmax(dim=-1).masked_fill(has_ended_B, eos_id)
        tokens_BT = torch.cat([tokens_BT, next_B[:, None]], dim=1)
        has_ended_B = has_ended_B | (next_B == eos_id)
        if _nobody_writes(~has_ended_B):
            break
    written_BT = tokens_BT[:, 1:]
    return torch.nn.functional.pad(written_BT, (0, num_tokens - written_BT.shape[1]), value=eos_id)


def _nobody_writes(writes_B: Tensor) -> bool:
    num_writing = writes_B.sum()
    return int(all_reduce_sum(num_writing) if dist.is_initialized() else num_writing) == 0
