"""The section ``parallel``."""

from dataclasses import dataclass
from typing import Annotated

from bigtrain.config.bounds import Bound, OnlyIf
from bigtrain.config.choices import CpMethod, PpSchedule

AXES = ("tp", "cp", "ep", "pp")
"""Settings of the section that say how many ranks share something."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the computing of one model, besides the engine."""

    tp: Annotated[int, Bound(ge=1, le=1024)] = 1
    """Ranks that share every matrix and, between blocks, every sequence (tensor and sequence parallelism); within a node."""
    cp: Annotated[int, Bound(ge=1, le=1024)] = 1
    """Ranks that share every sequence: each has some of its tokens, which attend to all of them (context parallelism)."""
    cp_method: Annotated[CpMethod, OnlyIf("cp", not_in=(1,))] = CpMethod.gather
    """How: ``gather`` the keys and values of all tokens, or ``ulysses``, where a rank attends with some of the heads."""
    ep: Annotated[int, Bound(ge=1, le=1024)] = 1
    """Ranks, of those that load different samples, that share out the experts of a mixture; tokens travel to them."""
    pp: Annotated[int, Bound(ge=1, le=1024)] = 1
    """Ranks that have some blocks each, through which the micro-batches of a step go one after the other."""
    pp_schedule: Annotated[PpSchedule, OnlyIf("pp", not_in=(1,))] = PpSchedule.one_f_one_b
    """``one_f_one_b``: a rank is one stage; ``interleaved``: it is several, for shorter waits and more messages."""
    pp_stages_per_rank: Annotated[int, Bound(ge=2, le=64), OnlyIf("pp_schedule", is_in=("interleaved",))] = 2
    """Stages of a rank in an interleaved schedule."""

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pp * (self.pp_stages_per_rank if self.pp_schedule is PpSchedule.interleaved else 1)


def copies(parallel: ParallelConfig) -> int:
    """Return how many ranks load the same samples."""
    return parallel.tp * parallel.cp * parallel.pp


def shared(parallel: ParallelConfig) -> list[str]:
    """Return the settings by which ranks share something, as they are typed."""
    return [f"parallel.{name}={size}" for name in AXES if (size := getattr(parallel, name)) > 1]
