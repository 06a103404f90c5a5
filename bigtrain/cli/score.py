"""Score the samples of a run: ``python launch/score.py +model=gpt_nano by=runs/teacher what=logits out=teacher``."""

from functools import partial

from bigtrain.cli import hydra_cli
from bigtrain.config.bounds import out_of_bounds
from bigtrain.config.score import ScoreConfig
from bigtrain.errors import raise_problems

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


def read(args: list[str]) -> ScoreConfig:
    """Return the run, with what is written beside its samples."""
    config = hydra_cli.compose_run(ScoreConfig, args)
    raise_problems(out_of_bounds(config))
    hydra_cli.check_machine(config)
    return config


def run(config: ScoreConfig) -> None:
    from bigtrain.run.scoring import score_samples

    count = score_samples(config)
    if hydra_cli.rank() == 0:
        print(f"{config.out}: {count:,} samples")


SHOWN = ["out", "by", "what", "top_k", "fp16", "batch_size", "part_samples"]
main = partial(hydra_cli.command, ScoreConfig, run, HELP, reader=read, shown=SHOWN)
