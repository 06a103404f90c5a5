"""Score a run on tasks of lm-evaluation-harness: ``bigtrain evaluate checkpoint=runs/gpt3_1b tasks=[arc_easy]``."""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

from bigtrain.cli import hydra_cli
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    checkpoint: LocalPath
    """Directory of a run, of one of its checkpoints, or of an export or another model of transformers."""
    tasks: list[str] = field(default_factory=list)
    """Tasks by the harness' names, such as ``[arc_easy,hellaswag]``; ``lm_eval ls tasks`` lists them."""
    tasks_directory: LocalPath | None = None
    """Directory with tasks of your own, in the harness' YAML."""
    limit: Annotated[int | None, Bound(ge=1)] = None
    """Documents of each task; by default all."""
    num_fewshot: Annotated[int | None, Bound(ge=0)] = None
    """Examples before each question; by default the task's own number."""
    json: bool = False
    """Print one JSON object."""


HELP = """\
Score a language model on tasks of EleutherAI's lm-evaluation-harness. A run is computed on all ranks that are started; an
export, or any other directory of transformers, in one process.

  bigtrain evaluate checkpoint=runs/gpt3_1b tasks=[arc_easy,hellaswag]
  torchrun --nproc-per-node=8 -m bigtrain evaluate checkpoint=runs/gpt3_1b tasks=[mmlu] num_fewshot=5
  bigtrain evaluate checkpoint=exported/ tasks=[my_task] tasks_directory=tasks/

The harness fetches the data of its tasks from the Hugging Face hub. In training, validation.lm_eval=[arc_easy] scores at
every validation.
"""


def run(config: EvaluateConfig) -> None:
    from bigtrain.config.packages import require
    from bigtrain.errors import ConfigError

    require("bigtrain evaluate", "lm_eval", "lm_eval")
    if not config.tasks:
        raise ConfigError("tasks=[...] names none; `lm_eval ls tasks` lists them, such as tasks=[arc_easy]")
    from bigtrain.run.harness import score_directory

    found = score_directory(
        Path(config.checkpoint),
        tasks=config.tasks,
        directory=config.tasks_directory,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
    )
    if hydra_cli.rank() != 0:
        return
    if config.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<40} {value:.4f}")


main = partial(hydra_cli.command, EvaluateConfig, run, HELP)
