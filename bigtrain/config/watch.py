"""The sections of the configuration about how a run is watched; see ``config/__init__.py``."""

from dataclasses import dataclass, field
from typing import Annotated

from bigtrain.config.bounds import Bound, OnlyIf


@dataclass(kw_only=True, slots=True)
class SupervisionConfig:
    """Hangs, slow ranks, and failures that come again."""

    hang_seconds: Annotated[float, Bound(ge=0, le=10**8)] = 300.0
    """A rank hangs when a phase of its step takes longer than this and than three times the longest of the phase's last 200; 0 switches the watchdog off."""
    first_hang_seconds: Annotated[float, Bound(le=10**8)] = 1800.0
    """The limit, at least ``hang_seconds``, for a phase that has been seen fewer than three times: starting, compiling, the first saves, a profile's export; and for a file that is fetched and of which nothing comes, for which ranks wait without being hung."""
    straggler_factor: Annotated[float, Bound(ge=0)] = 1.5
    """A rank is named when it is so many times slower, more than 1, than the median of the ranks; 0 switches that off."""
    max_failed_attempts: Annotated[int, Bound(ge=1)] = 3
    """After so many launches in a row that failed without a new checkpoint, a launcher's restart is refused."""


@dataclass(kw_only=True, slots=True)
class BadNumbersConfig:
    """Steps whose numbers are not to be trained on."""

    max_bad_steps: Annotated[int, Bound(ge=0)] = 3
    """Non-finite or spiking steps tolerated per 100 before rolling back; non-finite ones change no weight."""
    max_rollbacks: Annotated[int, Bound(ge=0)] = 3
    """Rollbacks before the run stops for good; each leaves out the samples of its bad steps."""
    spike_zscore: Annotated[float, Bound(ge=0)] = 0.0
    """A loss so many (robust) standard deviations above the median counts as bad too; 0 = off, 6 is usual."""
    spike_window_steps: Annotated[int, Bound(ge=8, le=10**6), OnlyIf("spike_zscore", not_in=(0,))] = 128
    """Steps of which the median and the deviation are taken; none counts as a spike before there are so many."""


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """A look inside some steps, into ``profile/`` of the run."""

    steps: Annotated[list[int], Bound(ge=1)] = field(default_factory=list)
    """``[first, last]``: optimizer steps that torch's profiler traces on rank 0; empty = none."""
    memory: bool = False
    """Record GPU allocations with their stacks and save them after those steps, or when memory runs out."""
