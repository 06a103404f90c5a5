"""The section ``parallel``."""

from dataclasses import dataclass
from typing import Annotated

from bigtrain.config.bounds import Bound, OnlyIf
from bigtrain.config.choices import CpMethod


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the computing of one model, besides the engine."""

    tp: Annotated[int, Bound(ge=1, le=1024)] = 1
    """Ranks that share every matrix and, between blocks, every sequence (tensor and sequence parallelism); within a node."""
    cp: Annotated[int, Bound(ge=1, le=1024)] = 1
    """Ranks that share every sequence: each has some of its tokens, which attend to all of them (context parallelism)."""
    cp_method: Annotated[CpMethod, OnlyIf("cp", not_in=(1,))] = CpMethod.gather
    """How: ``gather`` the keys and values of all tokens, or ``ulysses``, where a rank attends with some of the heads."""


def copies(parallel: ParallelConfig) -> int:
    """Return how many ranks load the same samples."""
    return parallel.tp * parallel.cp


def shared(parallel: ParallelConfig) -> list[str]:
    """Return the settings by which ranks share something, as they are typed."""
    return [f"parallel.{name}={size}" for name, size in (("tp", parallel.tp), ("cp", parallel.cp)) if size > 1]
