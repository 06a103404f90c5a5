"""A text from another one, or from speech, by an encoder and a decoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtrain.tasks.answers import Wanted, write_greedily
from bigtrain.tasks.base import IGNORE_INDEX, Field, Objective
from bigtrain.tasks.causal_lm import perplexity
from bigtrain.tasks.inputs import require_lengths
from bigtrain.tasks.masked_lm import sums_of_tokens

SOURCE = {"source": Field(torch.int64, ("S",)), "source_lengths": Field(torch.int64, (), padding=1)}
"""A text; a sample without a token would attend to nothing."""
SPECTROGRAM = {"features": Field(torch.float32, ("F", "S"))}  # speech as Whisper takes it: F log-mel bins at S times


@dataclass(frozen=True, kw_only=True, slots=True)
class Seq2Seq(Objective):
    """Cross-entropy of the decoder's next token, which reads ``tokens``: its first, then targets but for the last."""

    hears: bool = False  # whether the encoder gets speech in place of text

    @property
    def fields(self) -> Mapping[str, Field]:
        return {
            **(SPECTROGRAM if self.hears else SOURCE),
            "tokens": Field(torch.int64, ("T",)),
            "targets": Field(torch.int64, ("T",), ignored=IGNORE_INDEX),
        }

    @property
    def sums(self) -> Mapping[str, tuple[int, ...]]:
        return {"correct": (), "targets": ()}

    def count(self, samples: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        require_lengths(samples)
        return np.count_nonzero(samples["targets"] != IGNORE_INDEX, axis=1)

    def __call__(self, network: nn.Module, *tensors: Tensor) -> Tensor:
        *inputs, targets_BT = tensors
        return sums_of_tokens(network, inputs, targets_BT)

    def answers(self, network: Callable[..., Tensor], *tensors: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
        """Return the ``text`` that is written of each source, at most as long as the tokens that are given."""
        *inputs, tokens_BT = tensors
        written_BT = write_greedily(
            network, inputs, tokens_BT[:, 0], num_tokens=tokens_BT.shape[1], eos_id=wanted.writing.eos_id
        )
        return [{"text": wanted.writing.decode(row)} for row in written_BT.tolist()]

    def metrics(self, loss: float, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        accuracy = float(sums["correct"]) / max(float(sums["targets"]), 1.0)
        return {"accuracy": accuracy, "perplexity": perplexity(loss)}
