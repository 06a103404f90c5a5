"""Validate a run's newest checkpoint: ``python launch/validate.py checkpoint=runs/gpt_nano``."""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from bigtrain.cli import hydra_cli
from bigtrain.config import SetConfig
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath


@dataclass(kw_only=True, slots=True)
class ValidateConfig:
    checkpoint: LocalPath
    """Directory of the run, or of one of its checkpoints."""
    batches: Annotated[int | None, Bound(ge=1, le=10**6)] = None
    """Global batches of each set; by default as many as in the run's own validations, and all of other sets."""
    set: str = "validation"
    """``validation`` or ``test``; or one of their sets, such as ``test/news``."""
    data: SetConfig = field(default_factory=SetConfig)
    """Another set, of the kind that the run was trained on."""
    tp: Annotated[int, Bound(ge=1, le=1024)] = 1
    """Ranks that share every matrix (``parallel.tp``), for a model that does not fit one device in shards either."""
    json: bool = False
    """Print one JSON object, with the confusion matrix and the scores of each label."""


HELP = """\
Compute the loss and the metrics of a run on samples that it never trained on.

  python launch/validate.py checkpoint=runs/gpt_nano
  torchrun --nproc-per-node=8 launch/validate.py checkpoint=runs/gpt3_1b batches=100
  python launch/validate.py checkpoint=runs/classifier set=test
  python launch/validate.py checkpoint=runs/classifier data.path=other.jsonl json=true
"""
MOST_SHOWN_LABELS = 20


def run(config: ValidateConfig) -> None:
    from bigtrain.run.directory import label_names, locate
    from bigtrain.run.evaluation import validate_run

    part = None if config.data == SetConfig() else config.data
    path = Path(config.checkpoint)
    measured = validate_run(path, batches=config.batches, chosen=config.set, part=part, tp=config.tp)
    if hydra_cli.rank() != 0:
        return
    confusion, names = measured.confusion, label_names(locate(path)[0])
    if config.json:
        counts = {} if confusion is None else {"confusion": confusion.astype(int).tolist()}
        by_label = {"labels": names, "by_label": measured.by_label} if measured.by_label else {}
        print(json.dumps(measured.metrics | counts | by_label))
        return
    for name, value in measured.metrics.items():
        print(f"{name:<24} {f'{value:.4f}' if isinstance(value, float) else value}")
    if confusion is not None and len(confusion) <= MOST_SHOWN_LABELS:
        print(confusion_table(confusion.astype(int).tolist(), names))
    if measured.by_label:
        print(score_table(measured.by_label, names))


def score_table(by_label: dict[str, list[float]], names: list[str]) -> str:
    """Return the scores of each label as text."""
    names = names or [str(number) for number in range(len(by_label["f1"]))]
    width = max(map(len, (*names, "label")))
    rows = zip(names, *by_label.values(), strict=True)
    lines = [f"{'label':<{width}}" + "".join(f"  {score:>9}" for score in by_label)]
    lines += [f"{name:<{width}}" + "".join(f"  {value:>9.4f}" for value in values) for name, *values in rows]
    return "\n".join(["", *lines])


def confusion_table(counts: list[list[int]], names: list[str]) -> str:
    """Return a confusion matrix as text: a row per true label, a column per predicted one."""
    names = names or [str(number) for number in range(len(counts))]
    width = max(*map(len, names), *(len(str(count)) for row in counts for count in row))
    first = max(width, len("true"))
    lines = [["true", *names], *([name, *map(str, row)] for name, row in zip(names, counts, strict=True))]
    rows = (f"{head:<{first}}  {'  '.join(f'{cell:>{width}}' for cell in cells)}" for head, *cells in lines)
    return "\n".join(["", "predicted as", *rows])


main = partial(hydra_cli.command, ValidateConfig, run, HELP)
