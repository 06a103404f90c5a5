"""Predict with a trained run: ``python launch/predict.py checkpoint=runs/cnn inputs=new.npz out=labels.jsonl``."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from bigtrain.cli import hydra_cli
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath


@dataclass(kw_only=True, slots=True)
class PredictConfig:
    checkpoint: LocalPath
    """Directory of the run, or of one of its checkpoints."""
    inputs: LocalPath
    """Directory of images, of which all are taken in the order of their names; or a file: ``.npz`` with an array per column, ``.jsonl`` with the columns or ``data.text_field``, ``.csv`` or ``.tsv`` with a header, ``.txt`` with a text a line. Labels in it are left alone."""
    out: LocalPath
    """File that is made, ``.jsonl`` or ``.csv``, with a line per input in their order; it must not exist."""
    top_k: Annotated[int, Bound(ge=1)] = 1
    """Labels of each input, likeliest first."""
    threshold: Annotated[float | None, Bound(ge=0, le=1)] = None
    """Of two labels, the probability from which on it is the second one."""
    batch_size: Annotated[int, Bound(ge=1, le=10**6)] = 32
    """Inputs of a rank in a forward pass."""
    part_rows: Annotated[int, Bound(ge=1)] = 1024
    """Inputs after which a part of the output is on the disk; killed and started again, only the rest is done."""


HELP = """\
Write what a trained network says of new inputs: labels with probabilities, or numbers.

  python launch/predict.py checkpoint=runs/cnn inputs=new.npz out=labels.jsonl top_k=3
  torchrun --nproc-per-node=8 launch/predict.py checkpoint=runs/table inputs=rows.csv out=values.csv
"""


def run(config: PredictConfig) -> None:
    from bigtrain.run.prediction import predict_file
    from bigtrain.tasks.answers import Wanted

    wanted = Wanted(top_k=config.top_k, threshold=config.threshold)
    paths = (Path(config.checkpoint), Path(config.inputs), Path(config.out))
    count = predict_file(*paths, wanted=wanted, batch_size=config.batch_size, part_rows=config.part_rows)
    if hydra_cli.rank() == 0:
        print(f"{config.out}: {count:,} predictions")


main = partial(hydra_cli.command, PredictConfig, run, HELP)
