"""Set the smallest weights of a run to 0: ``python launch/prune.py run=runs/gpt_nano sparsity=0.5 out=runs/pruned``."""

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from bigtrain.cli import hydra_cli
from bigtrain.cli.report import PICTURES
from bigtrain.config.bounds import Bound
from bigtrain.config.convert import LocalPath
from bigtrain.config.packages import require
from bigtrain.errors import ConfigError

if TYPE_CHECKING:
    from bigtrain.run.pruning import Pruned

TWO_OF_FOUR = "2:4"


@dataclass(kw_only=True, slots=True)
class PruneConfig:
    run: LocalPath
    """Directory of a run (its newest checkpoint that verifies is taken), or of one of its checkpoints."""
    sparsity: Annotated[list[float], Bound(gt=0, lt=1)] = field(default_factory=list)
    """Share of the numbers of each matrix that become 0, the smallest ones: one, or several to compare."""
    pattern: str | None = None
    """In its place ``2:4``: the two smallest of every four inputs, as the sparse products of GPUs want it."""
    targets: list[str] = field(default_factory=list)
    """Names of matrices, with ``*`` and ``?``; by default those of the blocks, without blocks all but the head. Embeddings are left alone."""
    out: LocalPath | None = None
    """With one amount the run to be made, which must not exist; with several a picture (.svg, .png, .pdf), if one is wanted."""


HELP = """\
Set the smallest weights of a run to 0, say what that costs on held-out data, and write a run that begins with them.

  python launch/prune.py run=runs/gpt_nano sparsity=[0.3,0.5,0.7,0.9] out=sparsity.svg
  python launch/prune.py run=runs/gpt_nano sparsity=0.5 out=runs/half
  torchrun --nproc-per-node=8 launch/prune.py run=runs/llama3_1b pattern=2:4 out=runs/two_of_four

Trained on, with the zeros kept; an export has them too:

  python launch/train.py +model=gpt_nano +recipe=pruned checkpoint.resume=runs/half run.name=tuned
"""


def read(args: list[str]) -> PruneConfig:
    """Return the configuration; one number is a list of one."""
    config = hydra_cli.read(PruneConfig, [re.sub(r"^sparsity=([^\[].*)", r"sparsity=[\1]", arg) for arg in args])
    suffix = Path(config.out or "").suffix
    if (len(config.sparsity) > 0) == (config.pattern is not None) or config.pattern not in (None, TWO_OF_FOUR):
        raise ConfigError(f"how much? sparsity=0.5, sparsity=[0.3,0.5,0.7] to compare, or pattern={TWO_OF_FOUR}")
    if len(config.sparsity) < 2 and config.out is None:
        raise ConfigError("out: missing; name the run to be made, such as out=runs/pruned")
    if len(config.sparsity) > 1 and config.out:
        if suffix not in PICTURES:
            raise ConfigError(f"out={config.out}: of several sparsities a picture is made: {', '.join(PICTURES)}")
        require(f"out={config.out}", "matplotlib", "report")
    return config


def run(config: PruneConfig) -> None:
    from bigtrain.run.pruning import prune

    amounts: list[float | str] = [*sorted(config.sparsity), *filter(None, [config.pattern])]
    is_curve, out = len(amounts) > 1, Path(config.out) if config.out else None
    found = prune(Path(config.run), amounts, targets=config.targets, out=None if is_curve else out)
    if hydra_cli.rank() != 0:
        return
    print(table(found))
    if is_curve and out:
        from bigtrain.telemetry.figures import curve_figure, drawing

        points = [(float(item.amount), item.metrics["loss"]) for item in found if item.metrics]
        with drawing():
            curve_figure(points, "share of each matrix that is 0", "loss before fine-tuning").savefig(out, dpi=160)
    if out:
        print(f"written     {out}")


def table(found: "list[Pruned]") -> str:
    """Return a line for each amount: zeros in all weights, and the metrics of a validation."""
    names = list(found[0].metrics)
    lines = [f"{'sparsity':>8}  {'of all weights':>14}" + "".join(f"  {name:>12}" for name in names)]
    for item in found:
        metrics = "".join(f"  {item.metrics[name]:>12.4f}" for name in names)
        lines.append(f"{item.amount:>8}  {item.zeros:>14.1%}{metrics}")
    return "\n".join(lines)


main = partial(hydra_cli.command, PruneConfig, run, HELP, reader=read)
