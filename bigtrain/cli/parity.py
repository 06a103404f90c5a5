"""Compare engines and world sizes on a run of your own: ``python launch/parity.py +model=gpt_nano``."""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated

from bigtrain import log
from bigtrain.cli import hydra_cli
from bigtrain.config import EngineConfig, EngineKind, Precision, TrainConfig
from bigtrain.config.bounds import Bound, out_of_bounds
from bigtrain.config.check import check, fit_micro_batch
from bigtrain.config.layout import CP_KINDS, TP_KINDS
from bigtrain.config.parallel import copies, shared
from bigtrain.config.parts import is_own
from bigtrain.errors import EXIT_FAULT, EXIT_FINISHED, ConfigError, counted, raise_problems

if TYPE_CHECKING:
    from bigtrain.testing.parity import Case, Difference, Trajectory

TIMEOUT_SECONDS = 3600.0
"""For a whole case; ranks that wait for each other in vain give up much earlier."""


@dataclass(kw_only=True, slots=True)
class ParityConfig(TrainConfig):
    """A run, and the ways to compute it that are compared."""

    engines: list[EngineKind] = field(default_factory=lambda: list(EngineKind))
    """Engines to compare."""
    worlds: Annotated[list[int], Bound(ge=1, le=1024)] = field(default_factory=lambda: [1, 2])
    """Numbers of processes to compare; each engine runs with each of them."""
    steps: Annotated[int, Bound(ge=1)] = 20
    """Optimizer steps from the beginning of the run that are compared."""


HELP = """\
Compute the beginning of a training run under several engines and world sizes, and compare losses, gradient norms
and final weights with those of the first one. The same numbers mean that the engine is a matter of speed and memory only.

  python launch/parity.py +model=gpt_nano
  python launch/parity.py +model=gpt_nano 'engines=[ddp,fsdp,zero2]' 'worlds=[1,2]' steps=20
  python launch/parity.py +model=gpt_nano 'engines=[fsdp,zero3]' engine.precision=bf16 train.global_batch_size=8
  python launch/parity.py --import ./ideas.py +model=gpt_nano task=ideas.focal 'engines=[ddp]'
  python launch/parity.py +model=gpt_nano parallel.tp=2 'engines=[ddp,fsdp]' 'worlds=[2,4]'
  python launch/parity.py +model=hf model.name=gpt2 data=synthetic data.sequence_length=64 'worlds=[2]'

It starts the processes of each case by itself on this machine: no torchrun. Every rank puts the whole model together
at the end, so it has to fit.

With parallel.tp or parallel.cp all cases share their matrices or sequences so, and are compared with one process that
does not.

With an objective of your own, micro-batches of another size are compared too: one that takes a mean over them differs.

Settings of its own, with their defaults:
{settings}

All settings of launch/train.py except engine=<kind> and engine.kind are allowed and mean the same. In fp32, which is
the default here on a GPU too, losses and gradient norms of every step must agree within 1e-5 (relative) and the
weights within 1e-4. With engine.precision=bf16 the losses must agree within 2e-3 with those of the first case in fp32.

Exit codes: 0 all agree, 1 some do not (or failed), 2 something to change in the command or the data.
"""


def read(args: list[str]) -> ParityConfig:
    """Return the run with a precision, checked for every case."""
    keys = {arg: arg.partition("=")[0].lstrip("+") for arg in args}
    if misplaced := [arg for arg in args if keys[arg] in ("engine", "engine.kind")]:
        raise ConfigError(f"{misplaced[0]}: write 'engines=[{misplaced[0].partition('=')[2].strip('[]')}]'")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "parity.py starts its own processes: start it with python, not with torchrun or another launcher"
        )
    config = hydra_cli.compose_run(ParityConfig, args)  # where the micro-batch is open, each world has its own
    config.engine.precision = config.engine.precision or Precision.fp32
    if (num_copies := copies(config.parallel) * config.parallel.ep) > 1:
        kinds = TP_KINDS if config.parallel.tp == num_copies else CP_KINDS
        config.engines = config.engines if "engines" in keys.values() else list(kinds)
        config.worlds = config.worlds if "worlds" in keys.values() else [num_copies]
    raise_problems(out_of_bounds(config))
    if config.steps > config.train.steps:
        raise ConfigError(f"steps={config.steps}: must be at most train.steps={config.train.steps}")
    raise_problems(_problems(config))
    some_case = dataclasses.replace(fit_micro_batch(config, 1), engine=EngineConfig())
    hydra_cli.check_machine(some_case)
    hydra_cli.warn(some_case, 1, max(config.worlds))
    return config


def _problems(config: ParityConfig) -> Iterator[str]:
    """Yield the problems of every case, each with the cases that have it, where not all have."""
    cases_by_problem: dict[str, list[str]] = {}
    for engine in config.engines:
        for world_size in config.worlds:
            case_config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, kind=engine))
            case_config = fit_micro_batch(case_config, world_size)
            for problem in check(case_config, world_size=world_size, local_world_size=world_size):
                cases_by_problem.setdefault(problem, []).append(f"{engine.name} world {world_size}")
    for problem, cases in cases_by_problem.items():
        yield problem if len(cases) == len(config.engines) * len(config.worlds) else f"{', '.join(cases)}: {problem}"
    num_cases = len(config.engines) * len(config.worlds) + bool(shared(config.parallel))  # the one process
    if num_cases < 2 and not is_own(config.task.kind):
        yield "nothing to compare: name several engines=[...] or worlds=[...]"


def run(config: ParityConfig) -> int:
    """Compute and compare all cases; return the exit code."""
    from bigtrain.run.data import prepare_data
    from bigtrain.testing.parity import TOLERANCES, Case, compare

    _check_gpus(config)
    log.setup(hydra_cli.rank())
    prepare_data(config.data)  # here, where nobody waits for it in a collective
    train = hydra_cli.training_of(config)
    exact = dataclasses.replace(train, engine=dataclasses.replace(train.engine, precision=Precision.fp32))
    micro_batches = {world: fit_micro_batch(config, world).train.micro_batch_size for world in config.worlds}
    dp_shard = {EngineKind.hsdp: config.engine.dp_shard}
    cases = [
        Case(kind, n, micro_batches[n], dp_shard.get(kind), parallel=config.parallel)
        for kind in config.engines
        for n in config.worlds
    ]
    if shared(config.parallel):
        cases.insert(0, Case(EngineKind.ddp, 1, micro_batches[config.worlds[0]]))
    if is_own(config.task.kind) and (other := _other_micro_batch(cases, config.train.global_batch_size)):
        cases.append(dataclasses.replace(cases[0], micro_batch_size=other))
    reference = _compute(exact, cases[0], config.steps, "reference")
    if reference is None:
        return EXIT_FAULT
    rows, tolerance = [_row(cases[0], reference, None, "reference, fp32")], TOLERANCES[train.engine.precision]
    compared = cases if train.engine.precision is not Precision.fp32 else cases[1:]
    differing = []
    for number, case in enumerate(compared, start=1):
        trajectory = _compute(train, case, config.steps, f"{number}/{len(compared)}")
        difference = compare(trajectory, reference) if trajectory else None
        agrees = difference is not None and difference.within(tolerance)
        differing += [] if agrees else [case]
        rows.append(_row(case, trajectory, difference, "agrees" if agrees else "DIFFERS" if trajectory else "FAILED"))
    print(_table(rows))
    print(_verdict(len(compared) - len(differing), len(compared), cases[0], config, tolerance))
    if differing and is_own(config.task.kind):
        print(_cause(config.task.kind, differing, cases[0]), file=sys.stderr)
    return EXIT_FAULT if differing else EXIT_FINISHED


def _other_micro_batch(cases: list["Case"], global_batch_size: int) -> int | None:
    """Return another micro-batch size for the first case, where all cases have the same; None if there is no other."""
    sizes = {case.micro_batch_size for case in cases}
    size = cases[0].micro_batch_size
    other = max(size // 2, 1) if size > 1 else min(2, global_batch_size)
    return other if len(sizes) == 1 and other != size else None


def _cause(name: str, differing: list["Case"], reference: "Case") -> str:
    """Return which comparisons of an own objective differ, and why they usually do."""
    cuts = {
        "another micro-batch size": [case for case in differing if case.micro_batch_size != reference.micro_batch_size],
        "another number of ranks": [case for case in differing if case.world_size != reference.world_size],
        "another engine": [case for case in differing if case.engine is not reference.engine],
    }
    what, cases = next((what, cases) for what, cases in cuts.items() if cases)
    return (
        f"task.kind={name}: with {what} ({cases[0]}) the step is another one than {reference}'s: the usual cause is a mean, "
        "over a micro-batch or its targets, where the objective must return a sum"
    )


def _check_gpus(config: ParityConfig) -> None:
    import torch

    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < max(config.worlds):
        raise ConfigError(
            f"worlds={config.worlds}: this machine has {counted(num_gpus, 'GPU')}, and every process needs one of its own; "
            f"use worlds up to {num_gpus}, or CUDA_VISIBLE_DEVICES= to compare on the CPU"
        )


def _compute(config: TrainConfig, case: "Case", num_steps: int, label: str) -> "Trajectory | None":
    """Compute a case with a line of progress; return None, with the reason on standard error, if it failed."""
    from bigtrain.testing.parity import compute
    from bigtrain.testing.ranks import RankFailedError

    print(f"[{label}] {case} ...", end=" ", flush=True, file=sys.stderr)
    begin = time.monotonic()
    try:
        trajectory = compute(config, case, num_steps=num_steps, timeout_seconds=TIMEOUT_SECONDS)
    except RankFailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        return None
    print(f"{time.monotonic() - begin:.1f} s", flush=True, file=sys.stderr)
    return trajectory


def _row(case: "Case", trajectory: "Trajectory | None", difference: "Difference | None", verdict: str) -> list[str]:
    numbers = [f"{value:.1e}" for value in dataclasses.astuple(difference)] if difference else ["-"] * 3
    return [str(case), trajectory.wrapped_type if trajectory else "-", *numbers, verdict]


def _table(rows: list[list[str]]) -> str:
    rows = [["case", "wrapped type", "loss", "grad norm", "parameters", "verdict"], *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _verdict(num_agreeing: int, num_compared: int, reference: "Case", config: ParityConfig, bound: "Difference") -> str:
    tolerances = f"loss {bound.loss:.0e}, grad norm {bound.grad_norm:.0e}, parameters {bound.parameters:.0e}"
    who = f"all {num_compared}" if num_agreeing == num_compared else f"only {num_agreeing} of {num_compared}"
    return (
        f"{who} cases agree with {reference} in fp32 over {config.steps} steps "
        f"({config.engine.precision.name}, within {tolerances.replace('inf', 'any')})"
    )


main = partial(hydra_cli.command, ParityConfig, run, HELP, reader=read, shown=["engines", "worlds", "steps"])
