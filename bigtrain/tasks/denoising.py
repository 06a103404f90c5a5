"""Texts with gaps that an encoder with a decoder fills: a pure function of (seed, place of the sample in the run)."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigtrain.tasks.masking import bound, draw

_HIDDEN, _KEPT, _LENGTHS, _PLACES = 11, 12, 13, 14  # purposes of the random numbers


@dataclass(frozen=True, slots=True)
class SpanCorruption:
    """T5 (Raffel et al., "Exploring the Limits of Transfer Learning", 2020): a sentinel stands for each hidden span.

    The target is each sentinel with the tokens it stands for. All samples have as many hidden tokens in as many spans.
    """

    sentinels: tuple[int, ...]  # token that stands for each span, as many as there are spans
    eos_id: int  # ends source and target
    first_id: int  # what the decoder reads first
    share: float = 0.15  # share of the tokens that are hidden
    seed: int = 0  # of the run

    def __call__(self, tokens_NT: NDArray[np.int64], positions_N: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        num_samples, num_tokens = tokens_NT.shape
        num_hidden, num_spans = num_hidden_tokens(num_tokens, self.share), len(self.sentinels)
        hidden_NK = self._lengths(_HIDDEN, positions_N, num_hidden, num_spans)
        kept_NK = self._lengths(_KEPT, positions_N, num_tokens - num_hidden, num_spans)
        lengths = np.stack([kept_NK, hidden_NK], axis=2).reshape(num_samples, -1)  # in turn, what is kept first
        begins_NT = np.zeros_like(tokens_NT)
        np.put_along_axis(begins_NT, np.cumsum(lengths, axis=1) - lengths, 1, axis=1)
        span_NT = np.cumsum(begins_NT, axis=1) - 1
        is_hidden, is_begin = span_NT % 2 == 1, begins_NT == 1
        sentinels_NT = np.array(self.sentinels)[span_NT // 2]
        source = np.where(is_hidden, sentinels_NT, tokens_NT)[~is_hidden | is_begin].reshape(num_samples, -1)
        targets = np.where(is_hidden, tokens_NT, sentinels_NT)[is_hidden | is_begin].reshape(num_samples, -1)
        source = _ended(source, self.eos_id)
        lengths_N = np.full(num_samples, source.shape[1])
        return _pair(source, lengths_N, _ended(targets, self.eos_id), self.first_id)

    def _lengths(self, purpose: int, positions_N: NDArray[np.int64], total: int, parts: int) -> NDArray[np.int64]:
        """Return ``parts`` lengths ``(N, parts)`` from 1 on, whose sum is ``total``, all of them equally likely."""
        drawn = draw(self.seed, purpose, positions_N, np.arange(1, total)[None])
        cuts = np.sort(np.argsort(drawn, axis=1, kind="stable")[:, : parts - 1], axis=1) + 1
        ends = ((0, 0), (1, 0)), ((0, 0), (0, 1))
        return np.diff(np.pad(np.pad(cuts, ends[0]), ends[1], constant_values=total)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class TextInfilling:
    """BART (Lewis et al., "BART", 2020): a mask stands for each hidden span, which may be empty; the target is the text.

    The last token of a text makes room for the one that ends it.
    """

    mask_id: int  # token that stands for a span
    eos_id: int  # ends source and target
    first_id: int  # what the decoder reads first
    share: float = 0.3  # share of the tokens that are hidden
    mean_span: float = 3.0  # of the lengths of spans, which are those of a Poisson distribution
    seed: int = 0  # of the run

    def __call__(self, tokens_NT: NDArray[np.int64], positions_N: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        texts = tokens_NT[:, :-1]
        num_tokens = texts.shape[1]
        num_hidden = num_hidden_tokens(num_tokens, self.share)
        drawn_NM = draw(self.seed, _LENGTHS, positions_N, np.arange(num_hidden)[None])
        ends_NM = np.minimum(np.cumsum(np.searchsorted(self._lengths(), drawn_NM, side="right"), axis=1), num_hidden)
        ends_NM[:, -1] = num_hidden
        places = draw(self.seed, _PLACES, positions_N, np.arange(num_tokens)[None])
        source, lengths_N = np.zeros_like(tokens_NT), np.zeros(len(texts), dtype=np.int64)
        for row, (text, ends, order) in enumerate(zip(texts, ends_NM, places, strict=True)):
            ends = ends[: np.searchsorted(ends, num_hidden) + 1]
            gapped = self._gapped(text, np.diff(ends, prepend=0), order)
            source[row, : len(gapped)], source[row, len(gapped)] = gapped, self.eos_id
            lengths_N[row] = len(gapped) + 1
        return _pair(source, lengths_N, _ended(texts, self.eos_id), self.first_id)

    def _gapped(
        self, text: NDArray[np.int64], spans: NDArray[np.int64], order: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """Return a text with masks for spans of these lengths, in this order, at places that the numbers choose."""
        size = len(text) - int(spans.sum()) + len(spans)
        is_mask = np.zeros(size, dtype=np.bool_)
        is_mask[np.argsort(order[:size], kind="stable")[: len(spans)]] = True
        advances = np.ones(size, dtype=np.int64)  # tokens of the text that each place stands for
        advances[is_mask] = spans
        gapped = text[np.minimum(np.cumsum(advances) - advances, len(text) - 1)]
        gapped[is_mask] = self.mask_id
        return gapped

    def _lengths(self) -> NDArray[np.uint64]:
        """Return bounds of a uniform 64-bit number; as many as are not above it are the length of a span."""
        terms = [math.exp(-self.mean_span) * self.mean_span**k / math.factorial(k) for k in range(64)]
        return np.array([bound(min(share, 1.0)) for share in np.cumsum(terms).tolist()], dtype=np.uint64)


def num_hidden_tokens(num_tokens: int, share: float) -> int:
    """Return how many tokens of a sample are hidden: at least one, and not all."""
    return min(max(round(num_tokens * share), 1), num_tokens - 1)


def num_spans_of(num_tokens: int, share: float, mean_span: float) -> int:
    """Return in how many spans :class:`SpanCorruption` hides tokens."""
    num_hidden = num_hidden_tokens(num_tokens, share)
    return min(max(round(num_hidden / mean_span), 1), num_hidden, num_tokens - num_hidden)


def _ended(rows: NDArray[np.int64], eos_id: int) -> NDArray[np.int64]:
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=eos_id)


def _pair(
    source: NDArray[np.int64], lengths_N: NDArray[np.int64], targets: NDArray[np.int64], first_id: int
) -> dict[str, NDArray[np.int64]]:
    tokens = np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=first_id)
    return {"source": source, "source_lengths": lengths_N, "tokens": tokens, "targets": targets}
