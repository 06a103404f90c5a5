"""What ``bigtrain score`` is told."""

from dataclasses import dataclass
from typing import Annotated

from bigtrain.config import TrainConfig
from bigtrain.config.bounds import Bound
from bigtrain.config.check import RESUME_WORDS
from bigtrain.config.choices import Scored
from bigtrain.config.convert import LocalPath


@dataclass(kw_only=True, slots=True)
class ScoreConfig(TrainConfig):
    """A run that will read scores, what scores its samples, and what of them is written."""

    out: LocalPath
    """Directory that is made; it must not exist."""
    by: LocalPath | None = None
    """What scores: a run, one of its checkpoints, or a published model (directory or hub id); by default what the run begins with, without adapters."""
    what: Scored | None = None
    """``log_probabilities`` of the targets that count, summed over each text; ``logits``, of language models the largest ones; ``embeddings``, the mean of the last hidden states; by default what the task reads."""
    top_k: Annotated[int, Bound(ge=1, le=10**6)] = 32
    """Tokens at each place whose logits are written."""
    fp16: bool = False
    """Write logits in half of the space."""
    batch_size: Annotated[int, Bound(ge=1, le=10**6)] = 8
    """Samples of a rank in a forward pass."""
    part_samples: Annotated[int, Bound(ge=1)] = 1024
    """Samples after which a part of the output is on the disk; killed and started again, only the rest is done."""

    @property
    def scorer(self) -> str | None:
        """What scores; None if it is the model that a run begins with, with its initial values."""
        resume = self.checkpoint.resume
        return self.by or (None if resume in RESUME_WORDS else resume)
