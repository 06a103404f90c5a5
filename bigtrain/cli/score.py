"""Score the samples of a run: ``python launch/score.py +model=gpt_nano by=runs/teacher what=logits out=teacher``."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from bigtrain.cli import hydra_cli
from bigtrain.config import Scored, TrainConfig
from bigtrain.config.bounds import Bound, out_of_bounds
from bigtrain.config.convert import LocalPath
from bigtrain.errors import raise_problems


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


HELP = """\
Write what a model says of the samples of a run, a row for each, which the run reads with data.scores=<out>.

  python launch/score.py +model=gpt_nano by=runs/teacher what=logits top_k=64 out=scores/teacher
  torchrun --nproc-per-node=8 launch/score.py +model=hf model.name=./chat model.pretrained=true task=preference \\
      data=jsonl data.content=preference data.path=pairs.jsonl out=scores/reference

Settings of its own, with their defaults:
{settings}

All others are those of the training that will read the scores (python launch/train.py --help): they say which samples
are scored.
"""


OWN = ["out", "by", "what", "top_k", "fp16", "batch_size", "part_samples"]


def read(args: list[str]) -> ScoreConfig:
    """Return the run, with what is written beside its samples."""
    config = hydra_cli.compose_run(ScoreConfig, args)
    raise_problems(out_of_bounds(config))
    hydra_cli.check_machine(config)
    return config


def run(config: ScoreConfig) -> None:
    """Score and say where it is."""
    from bigtrain.run.scoring import Request, score_run

    request = Request(**{name: getattr(config, name) for name in OWN[2:]})
    count = score_run(hydra_cli.training_of(config), config.by, Path(config.out), request)
    if hydra_cli.rank() == 0:
        print(f"{config.out}: {count:,} samples")


main = partial(hydra_cli.command, ScoreConfig, run, HELP, reader=read, shown=OWN)
