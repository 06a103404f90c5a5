"""How long a run is: in steps, epochs or tokens, of which exactly one decides."""

import dataclasses
import math
from collections.abc import Collection, Iterator

from bigtrain.config import TrainConfig, TrainingConfig, component_data, is_live
from bigtrain.errors import ConfigError

LENGTHS = ("steps", "epochs", "tokens")


def with_typed_length(train: TrainingConfig, typed: Collection[str]) -> TrainingConfig:
    """Return the section with the length that was typed alone, whatever a preset says; several are refused."""
    chosen = [name for name in LENGTHS if f"train.{name}" in typed and getattr(train, name) is not None]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(f'train.{name}' for name in chosen)}: one of them says how long the run is")
    if not chosen:
        return train
    return dataclasses.replace(train, **{name: None for name in LENGTHS[1:] if name != chosen[0]})


def length_problems(config: TrainConfig) -> Iterator[str]:
    """Yield what speaks against counting in epochs."""
    if config.train.epochs is None:
        return
    if config.train.tokens is not None:
        yield "train.epochs and train.tokens: one of them says how long the run is"
    if config.data.mixture:
        of_each = "give train.steps or train.tokens, and max_epochs of each"
        yield f"train.epochs: of which component of data.mixture? {of_each}"
    if any(map(is_live, component_data(config.data).values())):
        yield "train.epochs: how long one is on the fly is not known before; give train.steps or train.tokens"


def beyond_the_end(config: TrainConfig) -> Iterator[str]:
    """Yield a warning for what begins after the last step."""
    steps, warmup, profiled = config.train.steps, config.scheduler.warmup_steps, config.profile.steps
    if profiled and profiled[0] > steps:
        yield f"profile.steps={profiled} is ignored: train.steps={steps}"
    if warmup > steps:
        never = f"scheduler.warmup_steps={warmup} is longer than train.steps={steps}"
        yield f"optimizer.lr={config.optimizer.lr} is never reached: {never}"
    if rest := steps % config.sync.every_steps:
        part = f"the last {rest} of train.steps={steps}" if rest < steps else f"none of train.steps={steps}"
        fate = (
            "are not averaged and lost to validation and export" if rest < steps else "is averaged: nothing is learned"
        )
        yield f"{part} {fate}; use a multiple of sync.every_steps={config.sync.every_steps}"


def steps_to_train(
    train: TrainingConfig, *, num_samples: int, sequence_length: int | None, step: int, samples: int
) -> int:
    """Return ``train.steps`` of a length in epochs or tokens, in whole batches, of a run that is at ``step``."""
    if train.epochs is not None:
        total = train.epochs * num_samples
    elif sequence_length:
        total = train.tokens / sequence_length
    else:
        raise ConfigError("train.tokens: these samples are no sequences of tokens; give train.epochs or train.steps")
    return max(step + math.ceil(round((total - samples) / train.global_batch_size, 6)), step, 1)
