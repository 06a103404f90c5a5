"""What a task does to samples between the corpus and the network: a function of the samples and their places in the run."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import ModelConfig, ModelKind, TaskKind, TrainConfig, are_records
from bigtrain.data.read.batch import Collate, Samples
from bigtrain.data.read.tokenizer import load_tokenizer, mask_token_id, num_ids, special_ids, starts_word
from bigtrain.errors import ConfigError
from bigtrain.tasks.masking import Masking, number_words

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class MaskedTokens:
    """Hides whole words of samples of tokens; see :class:`bigtrain.tasks.masking.Masking`."""

    def __init__(self, masking: Masking, starts_word_V: NDArray[np.bool_], special: list[int]) -> None:
        self.masking = masking
        self._starts_word_V = starts_word_V
        self._is_special_V = np.zeros_like(starts_word_V)
        self._is_special_V[special] = True

    def __call__(self, samples: Samples, positions: NDArray[np.int64]) -> Samples:
        """Return inputs and targets."""
        tokens = samples["tokens"]
        words = np.where(self._is_special_V[tokens], -1, number_words(tokens, self._starts_word_V))
        inputs, targets = self.masking(tokens, words, positions)
        return Samples(tokens=inputs, targets=targets)

    def __str__(self) -> str:
        """Return what decides the masks, for the digest of the data."""
        return str(self.masking)


class FirstToken:
    """Lets a decoder read another token first than the one that ends a text."""

    def __init__(self, token: int) -> None:
        self._token = token

    def __call__(self, samples: Samples, positions: NDArray[np.int64]) -> Samples:
        """Return the samples, changed in place."""
        samples["tokens"][:, 0] = self._token
        return samples

    def __str__(self) -> str:
        """Return what is read first, for the digest of the data."""
        return f"first token {self._token}"


class Relabelled:
    """Numbers the labels of samples as the training data does."""

    def __init__(self, names: list[str], wanted: list[str], *, are_several: bool) -> None:
        self._numbers, self._size = np.array(list(map(wanted.index, names))), len(wanted)
        self._are_several = are_several

    def __call__(self, samples: Samples, positions: NDArray[np.int64]) -> Samples:
        """Return the samples with other labels; negative ones, which do not count, stay."""
        labels = samples["labels"]
        if self._are_several:
            renamed = np.zeros((len(labels), self._size), dtype=labels.dtype)
            renamed[:, self._numbers] = labels
        else:
            renamed = np.where(labels < 0, labels, self._numbers[labels])
        return Samples({**samples, "labels": renamed})


def first_token(model: ModelConfig) -> int | None:
    """Return the token that a decoder of transformers reads first; None if that is left to the data."""
    if model.kind is not ModelKind.hf:
        return None
    from bigtrain.models.hf.build import read_hf_config

    return getattr(read_hf_config(model.name), "decoder_start_token_id", None)


def mask_id_of(config: TrainConfig, tokenizer: "Tokenizer", directory: Path) -> int:
    """Return the token that stands for a hidden one: the setting's, the tokenizer's, or the one behind all others."""
    if config.task.mask_id is not None:
        return config.task.mask_id
    own = mask_token_id(tokenizer, directory)
    return num_ids(tokenizer) if own is None else own


def build_collation(config: TrainConfig, tokenizer_directory: Path | None) -> Collate | None:
    """Return what ``config.task`` does to samples, if anything.

    ConfigError: no token is left to stand for a hidden one.
    """
    if config.task.kind == TaskKind.seq2seq.name and not are_records(config.data):
        first = first_token(config.model)
        return None if first is None else FirstToken(first)
    if config.task.kind != TaskKind.masked_lm.name:
        return None
    vocab_size, given = config.model.vocab_size, config.task.mask_id
    if tokenizer_directory is None:  # synthetic data: every id is a word
        num_used, special, starts = vocab_size - 1, [], np.ones(vocab_size, dtype=np.bool_)
        mask_id = num_used if given is None else given
    else:
        tokenizer = load_tokenizer(tokenizer_directory)
        num_used, special, starts = num_ids(tokenizer), special_ids(tokenizer), starts_word(tokenizer)
        mask_id = mask_id_of(config, tokenizer, tokenizer_directory)
    if given is not None and given >= vocab_size:
        raise ConfigError(f"task.mask_id={given}: must be less than model.vocab_size={vocab_size}")
    if mask_id >= vocab_size:
        raise ConfigError(
            f"task=masked_lm: the tokenizer has no mask token and uses all {num_used} rows of the embedding; "
            f"model.vocab_size={num_used + 1} or more has one for it, or name one with task.mask_id"
        )
    masking = Masking(mask_id=mask_id, vocab_size=num_used, share=config.task.mask_share, seed=config.train.seed)
    return MaskedTokens(masking, starts, special)
