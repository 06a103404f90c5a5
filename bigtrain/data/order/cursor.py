"""What the data side of a run continues from: a few numbers, the same on every rank.

Every step's samples are hashed together with the hash of the step before, so two runs with one hash after a step have
trained on the same samples in the same order.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


NO_SAMPLES = "0" * 16  # hash of a run that has consumed nothing


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place between two steps."""

    step: int = 0  # completed optimizer steps
    samples: int = 0  # samples consumed over all ranks
    digest: str = NO_SAMPLES  # hash of all sample ids consumed


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlace:
    """Where a data set that is tokenised while training stands."""

    window: int  # the window of samples that holds the last one before the last step
    first_sample: int  # samples of the data set before that window
    content: str  # hash of the window's tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DataState:
    """The data part of a checkpoint."""

    fingerprint: str  # what the samples are numbers of, and in which proportions they are drawn
    samples: int  # samples consumed over all ranks
    digest: str  # hash of their ids
    previous_samples: int  # samples consumed before the last step
    previous_digest: str  # hash of them
    counts: dict[str, int]  # samples consumed of each component
    fingerprints: dict[str, str]  # what the sample ids of each component are numbers of
    origin_samples: int = 0  # position at which the mixture as it is now began
    origin_counts: dict[str, int] = field(default_factory=dict)  # samples of each component consumed before
    skipped: list[list[int]] = field(default_factory=list)  # ranges (first, end) of positions that the run leaves out
    places: dict[str, WindowPlace] = field(default_factory=dict)  # of each component that is tokenised while training


def chain_digest(digest: str, sample_ids: "NDArray[np.int64]", content: str) -> str:
    """Return the hash after a step, 16 hexadecimal digits, of the hash before it and the ids of all its samples.

    ``content`` says what they are numbers of: other texts, or other ways to cut them, have the same numbers.
    """
    ids = sample_ids.astype("<i8", copy=False).tobytes()
    return hashlib.blake2b(bytes.fromhex(digest) + content.encode() + ids, digest_size=8).hexdigest()


def pieces(first: int, count: int, skipped: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return the ranges of positions of ``count`` samples after the first ``first`` of a run, ``skipped`` left out."""
    found = []
    for begin, end in skipped:
        if first < begin and count:
            taken = min(count, begin - first)
            found.append((first, first + taken))
            first, count = first + taken, count - taken
        if first >= begin:
            first += end - begin
    return [*found, (first, first + count)] if count else found


def extend(skipped: Sequence[Sequence[int]], first: int, end: int) -> list[list[int]]:
    """Return ``skipped`` and the samples that the run, leaving those out already, counts as ``[first, end)``."""
    return sorted([*map(list, skipped), *map(list, pieces(first, end - first, skipped))])
