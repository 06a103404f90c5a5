"""The training loss: cross-entropy summed over the targets that count.

Shape suffixes: B batch, T tokens, D hidden width, V vocabulary, N = B * T.
"""

import torch.nn.functional as F
from torch import Tensor

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
    return sum_cross_entropy_of_logits(F.linear(hidden_BTD, weight_VD), targets_BT)


def sum_cross_entropy_of_logits(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Like :func:`sum_cross_entropy`, for models that hand out logits only."""
    logits_NV = logits_BTV.flatten(0, 1).float()
    return F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
