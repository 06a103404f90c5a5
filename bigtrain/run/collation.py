"""What a task does to samples between the corpus and the network: a function of the samples and their places in the run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import ModelConfig, ModelKind, Noise, TaskKind, TrainConfig, are_records
from bigtrain.data.read.batch import Collation, Samples
from bigtrain.data.read.index import read_index
from bigtrain.data.read.tokenizer import load_tokenizer, mask_token_id, num_ids, special_ids, starts_word
from bigtrain.errors import ConfigError
from bigtrain.tasks.denoising import SpanCorruption, TextInfilling, num_spans_of
from bigtrain.tasks.gan import HALF, normal_noise
from bigtrain.tasks.masking import Masking, number_words

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def relabelled(names: list[str], wanted: list[str], *, are_several: bool) -> Collation:
    """Number the labels of samples as the training data does; negative ones, which do not count, stay."""
    numbers = np.array(list(map(wanted.index, names)))

    def renumber(samples: Samples, positions: NDArray[np.int64]) -> Samples:
        labels = samples["labels"]
        if are_several:
            renamed = np.zeros((len(labels), len(wanted)), dtype=labels.dtype)
            renamed[:, numbers] = labels
        else:
            renamed = np.where(labels < 0, labels, numbers[labels])
        return Samples({**samples, "labels": renamed})

    return Collation(renumber, f"labels {wanted}")


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


def build_collation(
    config: TrainConfig, tokenizer_directory: Path | None, facts: Mapping[str, Any]
) -> Collation | None:
    """Return what ``config.task`` does to samples, if anything; ConfigError if no token is left for hidden ones.

    ``facts`` are those of the data, such as mean and deviation of images.
    """
    match config.task.kind:
        case TaskKind.seq2seq if not are_records(config.data):
            first = first_token(config.model)
            return None if first is None else _beginning_with(first)
        case TaskKind.masked_lm:
            return _masked(config, _Ids.of(config, tokenizer_directory))
        case TaskKind.denoise:
            noise = _noise(config, _Ids.of(config, tokenizer_directory))
            return Collation(lambda samples, positions: Samples(noise(samples["tokens"], positions)), str(noise))
        case TaskKind.gan:
            return _with_noise(config, facts)
    return None


@dataclass(frozen=True, slots=True)
class _Ids:
    num_used: int
    mask_id: int | None
    eos_id: int
    special: list[int]
    starts_word_V: NDArray[np.bool_]
    find: Callable[[str], int | None]  # id of a token

    @classmethod
    def of(cls, config: TrainConfig, directory: Path | None) -> "_Ids":
        if directory is None:  # synthetic data: every id is a word
            size = config.model.vocab_size
            return cls(size - 1, size - 1, 0, [], np.ones(size, dtype=np.bool_), lambda _: None)
        tokenizer = load_tokenizer(directory)
        eos_id = read_index(directory, check_sizes=False).tokenizer.eos_id
        special, starts = special_ids(tokenizer), starts_word(tokenizer)
        mask_id = mask_token_id(tokenizer, directory)
        return cls(num_ids(tokenizer), mask_id, eos_id, special, starts, tokenizer.token_to_id)

    def mask(self, config: TrainConfig) -> int:
        vocab_size, given = config.model.vocab_size, config.task.mask_id
        if given is not None and given >= vocab_size:
            raise ConfigError(f"task.mask_id={given}: must be less than model.vocab_size={vocab_size}")
        if given is not None and given < self.num_used and given not in (self.mask_id, *self.special):
            raise ConfigError(
                f"task.mask_id={given}: is a token of the text, which could not be told from a hidden one; use a special "
                f"token ({', '.join(map(str, self.special[:8])) or 'there is none'}), or an id from {self.num_used} on"
            )
        mask_id = given if given is not None else self.num_used if self.mask_id is None else self.mask_id
        if mask_id >= vocab_size:
            raise ConfigError(
                f"task={config.task.kind}: the tokenizer has no mask token and uses all {self.num_used} rows of the "
                f"embedding; model.vocab_size={self.num_used + 1} or more has one for it, or name one with task.mask_id"
            )
        return mask_id

    def sentinels(self, config: TrainConfig, number: int) -> tuple[int, ...]:
        """Return T5's tokens ``<extra_id_0>``, ..., or the last ids of the vocabulary, from the last one down."""
        own = [self.find(f"<extra_id_{n}>") for n in range(number)]
        if None not in own:
            return tuple(own)
        if config.model.vocab_size < self.num_used + number:
            raise ConfigError(
                f"task=denoise: {number} gaps of a sample need as many tokens that stand for them, and the tokenizer has "
                f"no <extra_id_{own.index(None)}>; model.vocab_size={self.num_used + number} or more has rows for them"
            )
        return tuple(config.model.vocab_size - 1 - n for n in range(number))


def _beginning_with(token: int) -> Collation:
    """Let a decoder read another token first than the one that ends a text."""

    def begin(samples: Samples, positions: NDArray[np.int64]) -> Samples:
        samples["tokens"][:, 0] = token
        return samples

    return Collation(begin, f"first token {token}")


def _with_noise(config: TrainConfig, facts: Mapping[str, Any]) -> Collation:
    """Add noise to images, which are from -1 to 1 afterwards; those of records are so already."""
    size, seed = config.task.noise_dim, config.train.seed
    known = (np.array(facts.get(name, 1.0), dtype=np.float32) for name in ("mean", "deviation"))
    mean, deviation = (values.reshape(-1, 1, 1) for values in known)

    def add(samples: Samples, positions: NDArray[np.int64]) -> Samples:
        noise = normal_noise(positions, size, seed)
        if "mean" not in facts:
            return Samples({**samples, "noise": noise})
        pixels = (samples["pixels"] * deviation + mean) / np.float32(HALF) - 1
        return Samples({**samples, "pixels": pixels, "noise": noise})

    return Collation(add, f"noise {size} seed {seed}")


def _masked(config: TrainConfig, ids: _Ids) -> Collation:
    share, seed = config.task.mask_share, config.train.seed
    masking = Masking(mask_id=ids.mask(config), vocab_size=ids.num_used, share=share, seed=seed)
    is_special_V = np.zeros_like(ids.starts_word_V)
    is_special_V[ids.special] = True

    def hide(samples: Samples, positions: NDArray[np.int64]) -> Samples:
        tokens = samples["tokens"]
        words = np.where(is_special_V[tokens], -1, number_words(tokens, ids.starts_word_V))
        inputs, targets = masking(tokens, words, positions)
        return Samples(tokens=inputs, targets=targets)

    return Collation(hide, str(masking))


def _noise(config: TrainConfig, ids: _Ids) -> SpanCorruption | TextInfilling:
    task, first = config.task, first_token(config.model)
    given: dict[str, Any] = {"eos_id": ids.eos_id, "first_id": ids.eos_id if first is None else first}
    given |= {"share": task.mask_share, "seed": config.train.seed}
    if task.noise is Noise.infilling:
        return TextInfilling(mask_id=ids.mask(config), mean_span=task.mean_span, **given)
    num_spans = num_spans_of(config.data.sequence_length, task.mask_share, task.mean_span)
    return SpanCorruption(sentinels=ids.sentinels(config, num_spans), **given)
