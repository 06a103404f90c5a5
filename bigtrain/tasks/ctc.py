"""A text from audio without an alignment of the two: connectionist temporal classification."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.config import Inputs
from bigtrain.tasks.answers import Wanted
from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective
from bigtrain.tasks.inputs import input_fields, require_lengths


class CTC(Objective):
    """Negative log-likelihood of a text by CTC (Graves et al. 2006) with blank 0; of one that is too long, 0."""

    fields: Mapping[str, Field] = {
        **input_fields(Inputs.audio),
        "targets": Field(torch.int64, ("T",), ignored=IGNORE_INDEX),
    }

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        require_lengths(samples)
        return np.count_nonzero(samples["targets"] != IGNORE_INDEX, axis=1)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        """Return the summed loss in nats; the network returns logits ``(B, N, V)`` of frames and how many count ``(B,)``."""
        *inputs, targets_BT = tensors
        logits_BNV, frames_B = network(*inputs)
        counted_BT = targets_BT != IGNORE_INDEX
        log_probs_NBV = logits_BNV.float().log_softmax(dim=-1).transpose(0, 1)
        lengths_B = counted_BT.sum(dim=1)
        texts_BT = targets_BT.where(counted_BT, 1)
        losses_B = F.ctc_loss(
            log_probs_NBV, texts_BT, frames_B.clamp(min=1), lengths_B, reduction="none", zero_infinity=True
        )
        return losses_B.where(lengths_B > 0, 0).sum()

    def answers(self, network: Callable[..., Any], *inputs: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
        """Return the ``text`` of the likeliest token of each frame: repeated ones once, without blanks."""
        logits_BNV, frames_B = network(*inputs)
        rows = zip(logits_BNV.argmax(dim=-1), frames_B.tolist(), strict=True)
        written = (torch.unique_consecutive(row[:frames]).tolist() for row, frames in rows)
        return [{"text": wanted.writing.decode([token for token in row if token])} for row in written]
