"""What ``bigtrain sweep`` is told beside the settings of its trials."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from bigtrain.config import TrainConfig
from bigtrain.config.bounds import Bound, OnlyIf

Sampler = StrEnum("Sampler", "grid random tpe")


@dataclass(kw_only=True, slots=True)
class SweepSettings:
    """Which trials are run, and how."""

    name: str = "sweep"
    """Directory below ``run.root`` that holds the trials, each a run of its own."""
    sampler: Sampler = Sampler.grid
    """``grid``: every combination of the values; ``random``: values drawn by the seed and the trial's number; ``tpe``: by Optuna's tree-structured Parzen estimator, which learns from finished trials."""
    trials: Annotated[int, Bound(ge=1, le=10**5), OnlyIf("sampler", not_in=("grid",))] = 16
    """Number of trials; a larger one adds to a sweep that is there."""
    seed: Annotated[int, Bound(ge=0, le=2**31), OnlyIf("sampler", not_in=("grid",))] = 0
    """Seed of what is drawn; trials have the run's own ``train.seed``."""
    halving: Annotated[int | None, Bound(ge=2, le=1000)] = None
    """Successive halving: all trials begin, and at each rung the best one of so many goes on; ``train.steps`` is the last rung."""
    first_steps: Annotated[int | None, Bound(ge=1), OnlyIf("halving", not_in=(None,))] = None
    """First rung; by default the one that leaves a single trial for the last."""
    parallel: Annotated[int | None, Bound(ge=1, le=10_000)] = None
    """Trials at once; by default as many as memory and cores allow, of GPUs one for each; with ``launcher`` 1."""
    launcher: str | None = None
    """What stands in front of ``bigtrain train``, such as ``torchrun --standalone --nproc-per-node=8 -m`` or ``srun --nodes=1 --gpus=8``; by default this Python, for one process."""


@dataclass(kw_only=True, slots=True)
class SweepConfig(TrainConfig):
    """A run, and what of it is varied."""

    sweep: SweepSettings = field(default_factory=SweepSettings)


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting that is varied: over ``values``, or, without any, from ``low`` to ``high``."""

    key: str  # as typed, with its plus sign
    values: tuple[str, ...] = ()  # as typed
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_whole: bool = False  # numbers without a fraction

    @property
    def name(self) -> str:
        return self.key.lstrip("+")

    def at(self, share: float) -> str:
        """Return the value at a place of the axis, of which ``share`` in [0, 1) lies below."""
        if self.values:
            return self.values[int(share * len(self.values))]
        if self.is_whole:
            return str(int(self.low + share * (self.high - self.low + 1)))
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        number = low + share * (high - low)
        return f"{math.exp(number) if self.is_log else number:.4g}"
