"""Which tokens of a sample are hidden from the model: a pure function of (seed, place of the sample in the run).

So every epoch masks differently (dynamic masking, Liu et al., "RoBERTa", 2019), and any world size, micro-batch or resume
masks alike.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.order.permutation import derive_key, mix64
from bigtrain.tasks.base import IGNORE_INDEX

_CHOOSE, _REPLACE, _DRAW = 1, 2, 3  # purposes of the random numbers, which must not be the same ones


@dataclass(frozen=True, slots=True)
class Masking:
    """Masked language modelling (Devlin et al., "BERT", 2018)."""

    mask_id: int  # token that stands for a hidden one
    vocab_size: int  # random tokens are drawn below this
    share: float = 0.15  # expected share of the words that are predicted
    masked_share: float = 0.8  # share of these that become ``mask_id``
    random_share: float = 0.1  # share of these that become a random token; the others stay as they are
    seed: int = 0  # of the run

    def __call__(
        self, tokens_NT: NDArray[np.int64], words_NT: NDArray[np.int64], positions_N: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return inputs and targets, int64 ``(N, T)``; words, by number in ``words_NT`` or -1, are predicted whole."""
        drawn = np.where(words_NT >= 0, draw(self.seed, _CHOOSE, positions_N, words_NT), np.uint64(2**64 - 1))
        lowest = drawn.min(axis=1, keepdims=True, initial=2**64 - 1)
        is_target = (words_NT >= 0) & ((drawn < bound(self.share)) | (drawn == lowest))
        places = np.broadcast_to(np.arange(tokens_NT.shape[1]), tokens_NT.shape)
        fate = draw(self.seed, _REPLACE, positions_N, places)
        random_ids = draw(self.seed, _DRAW, positions_N, places) % np.uint64(self.vocab_size)
        hidden = np.where(fate < bound(self.masked_share), self.mask_id, tokens_NT)
        is_random = (fate >= bound(self.masked_share)) & (fate < bound(self.masked_share + self.random_share))
        hidden = np.where(is_random, random_ids.astype(np.int64), hidden)
        return np.where(is_target, hidden, tokens_NT), np.where(is_target, tokens_NT, IGNORE_INDEX)


def draw(seed: int, purpose: int, positions_N: NDArray[np.int64], numbers_NT: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return uniform 64-bit numbers ``(N, T)``, functions of (seed, purpose, place in the run, number)."""
    rows_N1 = mix64(positions_N.astype(np.uint64) + np.uint64(derive_key(seed, purpose)))[:, None]
    return mix64(rows_N1 ^ mix64(numbers_NT.astype(np.uint64)))


def number_words(tokens_NT: NDArray[np.int64], begins_word_V: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the number of each token's word within its sample, ``(N, T)``, by which ids begin a word."""
    return np.cumsum(begins_word_V[tokens_NT], axis=1)


def bound(share: float) -> np.uint64:
    """Return the number below which a uniform 64-bit number lies with this probability."""
    return np.uint64(min(int(share * 2**64), 2**64 - 1))
