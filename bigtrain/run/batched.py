"""Texts continued and scored by a causal language model under any engine: rows are shared out over ranks and batched.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bigtrain.distributed.collectives import broadcast_json, gather_json
from bigtrain.engine.base import Engine
from bigtrain.log import get_logger
from bigtrain.models.generation import sample
from bigtrain.telemetry.text import format_duration

SAY_EVERY_SECONDS = 10.0

Row = TypeVar("Row")


def shared_out(
    engine: Engine,
    rows: Sequence[Row],
    answer: Callable[[list[Row]], list[Any]],
    *,
    length: Callable[[Row], int],
    batch_size: int,
) -> list[Any]:
    """Return the JSON-able answer to each row on every rank, though each rank computes a share of them.

    All ranks call ``answer`` as often, because they gather weights together. Rows of about the same ``length`` share a
    batch.
    """
    order = sorted(range(len(rows)), key=lambda place: -length(rows[place]))
    mesh, answers = engine.mesh, list[Any]()
    own = order[mesh.dp_rank :: mesh.dp_size]
    begun = said = time.monotonic()
    most = math.ceil(len(rows) / mesh.dp_size)
    for first in range(0, most, batch_size):
        batch = [rows[place] for place in own[first : first + batch_size]]
        answers += answer(batch or [rows[0]])[: len(batch)]
        if (now := time.monotonic()) - said > SAY_EVERY_SECONDS:
            said, share = now, min((first + batch_size) / most, 1)
            left = format_duration((now - begun) * (1 - share) / share)
            get_logger().info(f"{share:.0%} of {len(rows):,} texts, at most {left} left")
    pairs = broadcast_json([*itertools.chain.from_iterable(gather_json(list(zip(own, answers, strict=True))))])
    found = dict(pairs)
    return [found[place] for place in range(len(rows))]


@torch.no_grad()
def logits_of(engine: Engine, rows: Sequence[list[int]]) -> list[Tensor]:
    """Return the logits of each row of at least one token, ``(T, V)``; all ranks call this.

    Padding stands behind the tokens, where no causal model sees it.
    """
    engine.module.eval()
    tokens_BT = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(engine.device)
    tokens_BT = F.pad(tokens_BT, (0, -tokens_BT.shape[1] % engine.mesh.token_multiple))  # for all ranks
    logits_BTV = engine.module(tokens_BT, predicts=True)
    return [logits[: len(row)] for logits, row in zip(logits_BTV, rows, strict=True)]


def continued(
    engine: Engine,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    is_end: Callable[[list[int], list[int]], bool],
    generators: Sequence[torch.Generator] | None = None,
    **sampling: Any,
) -> list[list[int]]:
    """Return a continuation of each prompt, up to ``max_new_tokens`` or where ``is_end`` holds; all ranks call this.

    ``is_end`` is asked about a prompt and what was written after it. Every token costs a pass over all of its text: a
    network in shards keeps no cache of keys and values. ``sampling`` is as :func:`bigtrain.models.generation.sample`
    has it, with a generator for each prompt; by default the likeliest token.
    """
    sampling = {"temperature": 0, **sampling}
    sources = generators or [None] * len(prompts)
    found: list[list[int]] = [[] for _ in prompts]
    is_over = [False for _ in prompts]
    for _ in range(max_new_tokens):
        logits = logits_of(engine, [prompt + text for prompt, text in zip(prompts, found, strict=True)])
        drawn = [
            0 if over else sample(own[-1], generator=source, **sampling)
            for over, own, source in zip(is_over, logits, sources, strict=True)
        ]
        drawn = engine.mesh.of_first(torch.tensor(drawn, device=engine.device)).tolist()
        for place, text in enumerate(found):
            if not is_over[place]:
                text.append(drawn[place])
                is_over[place] = is_end(prompts[place], text)
        if not engine.mesh.total(torch.tensor([float(not all(is_over))])).item():
            break
    return found
