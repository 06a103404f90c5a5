"""Columns that a network writes beside samples, for other runs to read.

Shape suffixes: B samples, T tokens, V vocabulary, K most likely tokens, D width, 2 answers of a pair.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from bigtrain.config import Scored
from bigtrain.errors import ConfigError
from bigtrain.tasks.base import IGNORE_INDEX

LOG_PROBABILITIES, NUM_TARGETS = "log_probabilities", "num_targets"
TOP_IDS, TOP_LOG_PROBABILITIES = "top_ids", "top_log_probabilities"
NOTHING = -1e4  # the logarithm of a probability that is 0, finite in fp16


def log_probabilities(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the log-probability of the targets that count in nats, summed over each sample: fp32 ``(B,)``."""
    logits_NV = logits_BTV.flatten(0, 1).float()
    nats_N = F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return -nats_N.view_as(targets_BT).sum(dim=1)


def with_rest(logits_BTV: Tensor, ids_BTK: Tensor) -> Tensor:
    """Return logits of some tokens and, last, of all others together: the logarithm of their sum, fp32 ``(B, T, K + 1)``."""
    logits_BTV = logits_BTV.float()
    rest_BT = logits_BTV.scatter(-1, ids_BTK, NOTHING).logsumexp(dim=-1)
    return torch.cat([logits_BTV.gather(-1, ids_BTK), rest_BT[..., None]], dim=-1)


def score(
    model: nn.Module, batch: Mapping[str, Tensor], what: Scored, *, top_k: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return columns by name, a row per sample of a batch, by a wrapped :class:`bigtrain.tasks.base.TaskModel`.

    ``log_probabilities``: fp32 ``(B,)``, of pairs ``(B, 2)``; see :func:`log_probabilities`; and ``num_targets``, int32,
    that they are the sums of. ``logits`` of a language
    model: ``top_ids``, int32 ``(B, T, K)``, and ``top_log_probabilities`` in ``dtype``, ``(B, T, K + 1)``, the last of
    which is that of all other tokens together; both 0 where no target counts. Of a classifier: ``logits`` as it returns
    them. ``embeddings``: its last hidden states, averaged over the tokens of each text, fp32 ``(B, D)``, of pairs
    ``(B, 2, D)``.
    """
    if "chosen" in batch:
        sides = [{"tokens": batch[name], "targets": batch[f"{name}_targets"]} for name in ("chosen", "rejected")]
        found = [score(model, side, what, top_k=top_k, dtype=dtype) for side in sides]
        return {name: torch.stack([part[name] for part in found], dim=1) for name in found[0]}
    is_language_model = "targets" in batch
    inputs = [tensor for name, tensor in batch.items() if name != "targets"]
    if is_language_model:
        inputs.insert(1, None)
    states: list[Tensor] = []
    hook = _last_states(model.network, states) if what is Scored.embeddings else contextlib.nullcontext()
    with hook:
        logits = model(*inputs, predicts=True)
    if what is Scored.embeddings:
        weights_BT = torch.ones(states[0].shape[:2], device=logits.device)
        if is_language_model:
            weights_BT *= batch["targets"] != IGNORE_INDEX
        elif "lengths" in batch:
            weights_BT *= torch.arange(weights_BT.shape[1], device=weights_BT.device) < batch["lengths"][:, None]
        weights_BT /= weights_BT.sum(dim=1, keepdim=True).clamp(min=1)
        return {"embeddings": torch.einsum("btd,bt->bd", states[0].float(), weights_BT)}
    if not is_language_model:
        return {"logits": logits.to(dtype)}
    if what is Scored.log_probabilities:
        num_targets_B = (batch["targets"] != IGNORE_INDEX).sum(dim=1).int()
        return {LOG_PROBABILITIES: log_probabilities(logits, batch["targets"]), NUM_TARGETS: num_targets_B}
    ids_BTK = logits.topk(min(top_k, logits.shape[-1])).indices
    counts_BT1 = (batch["targets"] != IGNORE_INDEX)[..., None]
    log_p_BTK = with_rest(logits, ids_BTK).log_softmax(dim=-1)
    return {
        TOP_IDS: ids_BTK.where(counts_BT1, 0).int(),
        TOP_LOG_PROBABILITIES: log_p_BTK.where(counts_BT1, 0).clamp(min=NOTHING).to(dtype),
    }


def _last_states(network: Any, states: list[Tensor]) -> RemovableHandle:
    """Add the last hidden states of a transformer, ``(B, T, D)``, to ``states`` in every forward pass from now on."""
    trunk = network.causal_lm.base_model if hasattr(network, "causal_lm") else getattr(network, "final_norm", None)
    if trunk is None:
        raise ConfigError(f"what=embeddings: {type(network).__name__} has no hidden states of tokens")
    return trunk.register_forward_hook(lambda _, __, out: states.append(out if isinstance(out, Tensor) else out[0]))
