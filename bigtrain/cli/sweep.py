"""Vary settings of a training run: ``bigtrain sweep +model=gpt_nano optimizer.lr=1e-3,2e-3``; ``--help`` says more."""

import dataclasses
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.cli import hydra_cli, own_parts
from bigtrain.config import parts
from bigtrain.config.check import check, fit_micro_batch
from bigtrain.config.convert import key_types
from bigtrain.config.packages import require
from bigtrain.config.sweep import Axis, Sampler, SweepConfig
from bigtrain.errors import EXIT_FINISHED, EXIT_NO_RESTART, ConfigError, raise_problems
from bigtrain.processes import RankInfo, num_usable_cpus

if TYPE_CHECKING:
    from bigtrain.run.sweep import Sweep

_MOST_TRIALS = 10_000

HELP = """\
Train with several values of some settings, each combination a run of its own below runs/<sweep.name>, and rank them by
validation.metric.

  bigtrain sweep +model=gpt_nano optimizer.lr=1e-3,2e-3,4e-3 validation.every_steps=100
  bigtrain sweep +model=cnn_digits +experiment=digits_cnn 'optimizer.lr=tag(log,interval(1e-4,1e-2))' \\
      'model.settings.dense_dim=choice(32,64)' validation.every_steps=125 sweep.sampler=random sweep.halving=2
  bigtrain sweep +model=gpt3_1b 'optimizer.lr=interval(1e-4,1e-3)' sweep.sampler=tpe sweep.parallel=4 \\
      sweep.launcher='srun --nodes=1 --gpus=8 torchrun --standalone --nproc-per-node=8 -m'

Values are a,b,c or choice(a,b,c), range(first,end,step), interval(low,high), on a logarithmic scale
tag(log,interval(low,high)); of settings of text choice(a,b) alone. The same command again goes on where it was.

Settings of its own, with their defaults:
{settings}

All others are those of training (bigtrain train --help). Exit codes: 0, 2 something to change in the command, 3 no trial
has a result, 75 stopped and resumable.
"""


def read(args: list[str]) -> tuple[SweepConfig, list[str], list[Axis]]:
    """Return the first trial's configuration, what all trials share as typed, and what is varied; all trials checked."""
    axes, shared = [], []
    for arg in args:
        axis = axis_of(arg)
        axes += [axis] if axis else []
        shared += [] if axis else [arg]
    first = hydra_cli.compose_run(SweepConfig, [*shared, *(f"{axis.key}={axis.at(0)}" for axis in axes)])
    raise_problems(_problems(first, axes))
    if first.sweep.sampler is Sampler.tpe:
        require("sweep.sampler=tpe", "optuna", "sweep")
    training = [arg for arg in shared if not arg.startswith(("sweep.", "run.root="))]
    for typed in _corners(axes):
        config = fit_micro_batch(hydra_cli.compose_run(SweepConfig, [*shared, *typed]), 1)
        raise_problems(f"{' '.join(typed)}: {problem}" for problem in check(config, world_size=1, local_world_size=1))
    hydra_cli.check_machine(hydra_cli.training_of(first))
    return first, training, axes


def axis_of(arg: str) -> Axis | None:
    """Return what a setting varies, None if it has one value; ConfigError for what is no list of values or interval."""
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep

    from bigtrain.cli import overrides

    key, kinds = arg.partition("=")[0], key_types(SweepConfig)
    override = next((found for found in overrides.parsed([arg]) if found.is_sweep_override()), None)
    found, kind = override and override.value(), kinds.get(key.lstrip("+"))
    if override is None or (isinstance(found, ChoiceSweep) and found.simple_form and kind in (str, str | None)):
        return None
    if key.startswith(("sweep.", "run.")):
        raise ConfigError(f"{arg}: one value, please; a sweep goes one way, and names its runs itself")
    if isinstance(found, IntervalSweep):
        low, high, is_log = float(found.start or 0), float(found.end or 0), "log" in found.tags
        if not low < high or (is_log and low <= 0):
            raise ConfigError(f"{arg}: the first number must be less than the second{' and more than 0' * is_log}")
        return Axis(key, low=low, high=high, is_log=is_log, is_whole=kind in (int, int | None))
    if isinstance(found, RangeSweep):
        return Axis(key, tuple(map(str, found.range())))
    if not isinstance(found, ChoiceSweep):
        raise ConfigError(f"{arg}: write {key}=a,b,c, choice(a,b,c), range(first,end,step) or interval(low,high)")
    pairs = zip(found.list, override.sweep_string_iterator(), strict=True)
    values = (f"'{item}'" if isinstance(item, str) and "\\" in text else text for item, text in pairs)
    return Axis(key, tuple(dict.fromkeys(values)))


def _corners(axes: list[Axis]) -> Iterator[list[str]]:
    """Yield settings of trials in which every value occurs, and the ends of every interval."""
    ends = [axis.values or (axis.at(0), axis.at(1 - 1e-9)) for axis in axes]
    for number in range(max(map(len, ends))):
        yield [f"{axis.key}={values[number % len(values)]}" for axis, values in zip(axes, ends, strict=True)]


def _problems(config: SweepConfig, axes: list[Axis]) -> Iterator[str]:
    settings, keys = config.sweep, [axis.name for axis in axes]
    if RankInfo.from_env().world_size > 1:
        yield "bigtrain sweep is one process that starts others: for several ranks a trial, sweep.launcher='torchrun ... -m'"
    if not axes:
        yield "a sweep needs several values of a setting, such as optimizer.lr=1e-3,2e-3"
    yield from (
        f"{key}: given twice; write all of its values once" for key in sorted({k for k in keys if keys.count(k) > 1})
    )
    if not config.validation.every_steps:
        yield "validation.every_steps=0: trials are compared by their validations; set how often they are"
    if config.run.name not in (None, config.model.name):
        yield f"run.name={config.run.name}: trials have names of their own, and their directory is sweep.name"
    if settings.sampler is Sampler.grid and (between := [axis.name for axis in axes if not axis.values]):
        yield f"{', '.join(between)}: a grid needs values, as choice(a,b,c); an interval needs sweep.sampler=random or tpe"
    combinations = math.prod(len(axis.values) for axis in axes) if all(axis.values for axis in axes) else math.inf
    if settings.sampler is Sampler.grid and combinations > _MOST_TRIALS:
        yield f"a grid of {combinations:,} trials, of {_MOST_TRIALS:,} at most; name fewer values, or sweep.sampler=random"
    if settings.sampler is Sampler.random and combinations <= settings.trials:
        yield f"sweep.sampler=random would draw {combinations} combinations {settings.trials} times; sweep.sampler=grid has all"
    if not settings.halving:
        return
    if settings.sampler is Sampler.tpe:
        yield "sweep.sampler=tpe learns from finished trials, of which halving has none when it begins; leave one of them out"
    if config.train.is_open or any(
        key.startswith("train.") and key[6:] in ("steps", "epochs", "tokens") for key in keys
    ):
        yield "sweep.halving: rungs are shares of one train.steps; give that, in place of epochs, tokens or several values"


def run(job: tuple[SweepConfig, list[str], list[Axis]]) -> int:
    """Run the trials, write ``sweep.html``, and print the ranking and the best command."""
    from bigtrain.run.sweep import Launcher, run_sweep

    config, training, axes = job
    sweep = begin(config, training, axes)
    places = _places(config)
    imports = [f"{own_parts.IMPORT}={typed}" for typed in parts.imports()]
    with Launcher(sweep, imports, places) as launch:
        run_sweep(sweep, launch, parallel=len(places), report=partial(write_page, sweep))
    return tell(sweep)


def begin(config: SweepConfig, training: list[str], axes: list[Axis]) -> "Sweep":
    """Return the sweep with the trials that it has on record."""
    from bigtrain import log
    from bigtrain.run import sweep as sweeps
    from bigtrain.run.recovery import begin_standing

    log.setup(0)
    standing = begin_standing(config, None)
    settings, steps = config.sweep, 0 if config.train.is_open else config.train.steps
    sweep = sweeps.Sweep(
        Path(config.run.root, settings.name),
        training,
        axes,
        settings,
        standing.metric,
        standing.less_is_better,
        [steps],
    )
    sweep.rungs = sweeps.rungs_of(steps, sweep.num_trials, settings, config.validation.every_steps)
    sweeps.read_state(sweep)
    return sweep


def tell(sweep: "Sweep") -> int:
    from bigtrain.run.sweep import samples_of

    for place, trial in enumerate(sweep.best_first(), 1):
        result = f"failed: {trial.failure}" if trial.failure else f"{trial.value:.5g} after step {trial.steps}"
        print(f"{place:>4}  {sweep.metric} {result}  {' '.join(trial.typed)}")
    done, whole = samples_of(sweep)
    print(
        f"\n{done:,} of the {whole:,.0f} tokens or samples that all trials to the end would take: {done / max(whole, 1):.2f}"
    )
    best = sweep.best_first()[0]
    if math.isnan(best.value):
        print("no trial has a result")
        return EXIT_NO_RESTART
    print(f"best: {sweep.command(best)}")
    return EXIT_FINISHED


def write_page(sweep: "Sweep") -> None:
    """Write the page of a sweep, ``sweep.html``, with the curves of its best trials; without matplotlib none."""
    from bigtrain.log import get_logger
    from bigtrain.run.sweep import page_of

    try:
        require("sweep.html", "matplotlib", "report")
    except ConfigError as error:
        get_logger().warning(str(error))
        return
    (sweep.directory / "sweep.html").write_text(page_of(sweep), encoding="utf-8")


def _places(config: SweepConfig) -> list[dict[str, str]]:
    """Return the environment of each place in which a trial runs: a GPU each, or a core and the memory for it."""
    settings = config.sweep
    if settings.launcher:
        return [{}] * (settings.parallel or 1)
    import torch

    from bigtrain.config import Precision
    from bigtrain.plan import preflight

    if torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
        return [{"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} for n in range(settings.parallel or len(gpus))]
    one = hydra_cli.training_of(fit_micro_batch(config, 1))
    report = preflight(one, world_size=1, local_world_size=1, device_type="cpu", precision=Precision.fp32)
    fitting = report.machine.available_bytes // report.needed_bytes(report.estimate)[0]
    number = settings.parallel or max(min(num_usable_cpus(), fitting), 1)
    # One thread each, as torchrun has it: sums in another order are other numbers.
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}] * number


SHOWN: list[Any] = [f"sweep.{f.name}" for f in dataclasses.fields(SweepConfig().sweep)]
main = partial(hydra_cli.command, SweepConfig, run, HELP, reader=read, shown=SHOWN)
