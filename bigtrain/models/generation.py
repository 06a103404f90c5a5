"""Text generation, one sequence at a time: greedy or sampled, with a key-value cache.

Shape suffixes: V vocabulary.
"""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from bigtrain.errors import ConfigError
from bigtrain.models.hf.build import HFCausalLM
from bigtrain.models.own import Uncached
from bigtrain.models.transformer import Transformer

LanguageModel = Transformer | HFCausalLM | Uncached


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    eos_id: int | Collection[int] | None = None,
    heard: Callable[[int], object] = lambda token: None,
) -> list[int]:
    """Return a continuation of a prompt of one token or more, without the token that ends it.

    ``heard`` is called with each token as it is drawn. Ends after ``max_new_tokens``, at an ``eos_id``, or at ``model.max_positions``; there is no sliding window. Tokens
    are drawn on the CPU: greedily at temperature 0, from the ``top_k`` likeliest, from the fewest that then have at
    least ``top_p`` together (nucleus sampling, Holtzman et al. 2020). ConfigError: lists every invalid option, or the
    prompt.
    """
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    check_prompt(prompt_ids, model.vocab_size, model.max_positions)
    limit = len(prompt_ids) + max_new_tokens
    if model.max_positions is not None:
        limit = min(limit, model.max_positions)
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    ids = list(prompt_ids)
    cache, device = model.new_cache(limit), next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        while len(ids) < limit:
            unseen = ids if cache is None or len(ids) == len(prompt_ids) else ids[-1:]
            logits_V = model(torch.tensor([unseen], device=device), cache=cache)[0, -1]
            token = sample(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if token in ends:
                break
            ids.append(token)
            heard(token)
    finally:
        model.train(was_training)
    return ids[len(prompt_ids) :]


def sample(
    logits_V: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Draw one token; options as in :func:`generate`."""
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V = sampling_probabilities(logits_V, temperature=temperature, top_k=top_k, top_p=top_p)
    return int(torch.multinomial(probs_V, 1, generator=generator))


def sampling_probabilities(
    logits_V: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the probabilities that are sampled from, fp32 on the CPU, summing to 1."""
    logits_V = logits_V.detach().float().cpu()
    logits_V = (logits_V - logits_V.max()) / temperature  # at most 0: the smallest temperature cannot overflow
    # Sorted, so that exactly k tokens stay when several have the k-th probability.
    sorted_V, order_V = torch.sort(logits_V, descending=True, stable=True)
    if top_k is not None:
        sorted_V[top_k:] = -math.inf
    probs_V = sorted_V.softmax(-1)
    if top_p is not None:
        before_V = probs_V.cumsum(-1) - probs_V  # probability of all likelier tokens
        probs_V = probs_V.masked_fill(before_V >= top_p, 0.0)
    return torch.zeros_like(probs_V).scatter(0, order_V, probs_V / probs_V.sum())


def check_sampling(*, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise a ConfigError that lists every option out of range."""
    rules = [
        (max_new_tokens >= 1, f"max_new_tokens={max_new_tokens}: must be at least 1"),
        (0 <= temperature < math.inf, f"temperature={temperature}: must be 0 (greedy) or positive"),
        (top_k is None or top_k >= 1, f"top_k={top_k}: must be at least 1, or null for all tokens"),
        (top_p is None or 0 < top_p <= 1, f"top_p={top_p}: must be above 0 and at most 1, or null for all tokens"),
    ]
    problems = [message for holds, message in rules if not holds]
    if problems:
        raise ConfigError("\n".join(problems))


def check_prompt(prompt_ids: list[int], vocab_size: int, max_positions: int | None) -> None:
    """Raise a ConfigError if a model cannot continue a prompt."""
    if not prompt_ids:
        raise ConfigError("the prompt has no tokens, and the tokenizer begins texts with none; give some text")
    strangers = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if strangers:
        raise ConfigError(
            f"the prompt has token {strangers[0]}, but the model knows 0 to {vocab_size - 1}; "
            "use the tokenizer that the model was trained with"
        )
    if max_positions is not None and len(prompt_ids) >= max_positions:
        raise ConfigError(
            f"the prompt has {len(prompt_ids)} tokens and the model takes {max_positions} in all; "
            f"shorten it to {max_positions - 1} or fewer"
        )
