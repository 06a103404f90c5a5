"""What a network says of samples without targets, as plain data, one mapping a sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.distributed.collectives import all_reduce_sum
from bigtrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Writing:
    """How tokens that a decoder writes become text."""

    eos_id: int  # token that ends a text
    decode: Callable[[list[int]], str]  # returns the text of ids up to the end


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """How answers are written; see :class:`bigtrain.cli.predict.PredictConfig`."""

    top_k: int = 1
    threshold: float | None = None
    label_names: tuple[str, ...] = ()
    writing: Writing | None = field(default=None, repr=False)

    def name(self, label: int) -> str | int:
        return self.label_names[label] if self.label_names else label


@runtime_checkable
class Predicts(Protocol):
    def answers(self, network: Callable[..., Any], *inputs: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
        """Return plain data, a mapping for each sample, of what the objective's fields without ``ignored`` hold."""


def label_answers(logits_BC: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
    """Return the likeliest label of each sample, or the ``top_k``, with probabilities; thresholds are of two."""
    num_labels = logits_BC.shape[-1]
    if wanted.threshold is not None and num_labels != 2:
        raise ConfigError(f"threshold={wanted.threshold}: the likeliest of {num_labels} labels is taken; it is for two")
    probabilities_BC = torch.softmax(logits_BC.double(), dim=-1)
    if wanted.threshold is None:
        chosen_BK = probabilities_BC.argsort(dim=-1, descending=True, stable=True)[:, : max(wanted.top_k, 1)]
    else:
        chosen_BK = (probabilities_BC[:, 1:] >= wanted.threshold).long()
    found_BK = probabilities_BC.gather(-1, chosen_BK)
    rows = zip(chosen_BK.tolist(), found_BK.tolist(), strict=True)
    if wanted.top_k > 1 and wanted.threshold is None:
        return [{"labels": [wanted.name(label) for label in row], "probabilities": found} for row, found in rows]
    return [{"label": wanted.name(row[0]), "probability": found[0]} for row, found in rows]


def several_label_answers(logits_BC: Tensor, wanted: Wanted) -> list[dict[str, Any]]:
    """Return the labels of each sample whose probability is ``threshold`` or more, else 0.5; or the ``top_k`` likeliest."""
    probabilities_BC = torch.sigmoid(logits_BC.double())
    threshold = 0.5 if wanted.threshold is None else wanted.threshold
    answers = []
    for row in probabilities_BC.tolist():
        order = sorted(range(len(row)), key=lambda label: -row[label])
        chosen = order[: wanted.top_k] if wanted.top_k > 1 else [label for label in order if row[label] >= threshold]
        answers.append({"labels": list(map(wanted.name, chosen)), "probabilities": [row[label] for label in chosen]})
    return answers


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
        num_writing = (~has_ended_B).sum()
        if not (all_reduce_sum(num_writing) if dist.is_initialized() else num_writing):
            break
    written_BT = tokens_BT[:, 1:]
    return torch.nn.functional.pad(written_BT, (0, num_tokens - written_BT.shape[1]), value=eos_id)
