"""Kill and resume a training, and compare: ``python launch/verify_resume.py +model=gpt_nano``; ``--help`` says more."""

import dataclasses
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from bigtrain.cli import hydra_cli
from bigtrain.config import EngineKind, TrainConfig
from bigtrain.config.bounds import Bound
from bigtrain.config.check import check, fit_micro_batch
from bigtrain.config.parallel import copies
from bigtrain.errors import EXIT_FAULT, EXIT_FINISHED, raise_problems

if TYPE_CHECKING:
    from bigtrain.testing.resume import Plan, Verdict


@dataclass(kw_only=True, slots=True)
class VerifyResumeConfig(TrainConfig):
    before: Annotated[int, Bound(ge=2)] = 6
    """Steps before the checkpoint that is resumed from."""
    after: Annotated[int, Bound(ge=2)] = 6
    """Steps after it; the kill is in the middle of the second one."""
    world: Annotated[int | None, Bound(ge=1, le=1024)] = None
    """Ranks on this machine; by default one per GPU, or 2 without a GPU."""
    resume_world: Annotated[int | None, Bound(ge=1, le=1024)] = None
    """Ranks of the resumed launch; by default as many."""
    resume_engine: EngineKind | None = None
    """Engine of the resumed launch; by default the same."""
    resume_tp: Annotated[int | None, Bound(ge=1, le=1024)] = None
    """``parallel.tp`` of the resumed launch; by default the same."""
    resume_cp: Annotated[int | None, Bound(ge=1, le=1024)] = None
    """``parallel.cp`` of the resumed launch; by default the same."""
    resume_ep: Annotated[int | None, Bound(ge=1, le=1024)] = None
    """``parallel.ep`` of the resumed launch; by default the same."""
    resume_pp: Annotated[int | None, Bound(ge=1, le=1024)] = None
    """``parallel.pp`` of the resumed launch; by default the same."""


HELP = """\
Is your training, killed and resumed, the training that was never interrupted? Takes the settings of launch/train.py.

  python launch/verify_resume.py +model=gpt_nano
  python launch/verify_resume.py +model=gpt_nano engine=fsdp resume_engine=zero2 resume_world=1
  python launch/verify_resume.py +model=gpt_nano parallel.tp=2 resume_tp=1 resume_world=1
  python launch/verify_resume.py +model=llama3_1b engine=zero3 world=8 before=20 after=20

Trains before + after steps without an interruption; then again, with kill -9 to all ranks in the middle of the second
step after the checkpoint; then resumes. Compares the samples, the learning rates, the losses and the gradient norms of
every step, and the final weights. Under the same engine, layout and world size all of them, and the optimizer's state, must
be the same bit by bit, with dropout too. Otherwise losses may differ by 1e-6 (fp32) or 2e-3 (bf16) relative, gradient
norms and weights by ten times that. Dropout draws its numbers per rank: to change the world size, switch it off.

Settings of its own, with their defaults:
{settings}

All others are those of training (python launch/train.py --help). The schedule of the learning rate stays that of
train.steps. The runs need room for four checkpoints in run.root; they are removed if all is well.

Exit codes: 0 the same, 1 not the same, 2 it could not be found out.
"""


def run(config: VerifyResumeConfig) -> int:
    from bigtrain import log
    from bigtrain.testing.resume import verify_resume

    log.setup(hydra_cli.rank())
    plan = plan_of(config)
    config = fit_micro_batch(config, math.lcm(plan.world_size, plan.resume_world_size))
    root = Path(config.run.root) / f"verify_resume-{config.run.name}-{uuid.uuid4().hex[:8]}"
    verdict = verify_resume(hydra_cli.training_of(config), plan, root, say=partial(print, flush=True))
    print(table(verdict))
    if not verdict.holds:
        print(f"NOT THE SAME: first difference in {verdict.first_difference}\nThe runs are in {root}.")
        return EXIT_FAULT
    how = "bit by bit" if verdict.is_bitwise else "within the rounding of another order of summation"
    print(f"THE SAME: killed in step {plan.before + 2} and resumed from step {plan.before}, {how}.")
    shutil.rmtree(root)
    return EXIT_FINISHED


def table(verdict: "Verdict") -> str:
    """Return what was compared as a table for people."""
    lines = [f"\n{'compared':<18}{'steps':<12}{'difference':<14}{'allowed':<12}"]
    for item in verdict.checks:
        mark = "" if item.holds else "  <--"
        lines.append(f"{item.name:<18}{item.steps:<12}{_number(item.difference):<14}{_number(item.allowed):<8}{mark}")
    return "\n".join([*lines, ""])


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < float("inf") else "differs"


def plan_of(config: VerifyResumeConfig) -> "Plan":
    """Return what is launched on how many ranks; a ConfigError names all that stands against it."""
    import torch

    from bigtrain.testing.resume import Plan

    num_gpus = torch.cuda.device_count()
    world_size = (
        (num_gpus or max(2, copies(config.parallel) * config.parallel.ep)) if config.world is None else config.world
    )
    asked = {"tp": config.resume_tp, "cp": config.resume_cp, "ep": config.resume_ep, "pp": config.resume_pp}
    changes: dict[str, Any] = {name: size for name, size in asked.items() if size is not None}
    plan = Plan(
        before=config.before,
        after=config.after,
        world_size=world_size,
        resume_world_size=world_size if config.resume_world is None else config.resume_world,
        resume_engine=config.resume_engine or config.engine.kind,
        resume_parallel=dataclasses.replace(config.parallel, **changes),
    )
    raise_problems(dict.fromkeys(_problems(config, plan, num_gpus)))
    return plan


def _problems(config: VerifyResumeConfig, plan: "Plan", num_gpus: int) -> Iterator[str]:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "start this command once, without torchrun: it starts world=<number> ranks by itself"
    if config.checkpoint.resume != "auto":
        yield f"checkpoint.resume={config.checkpoint.resume}: leave it out; what is verified are runs of their own"
    moves = (plan.world_size, config.parallel) != (plan.resume_world_size, plan.resume_parallel)
    if moves and config.model.dropout:
        yield (
            f"model.dropout={config.model.dropout}: every rank draws its own random numbers, so another world size "
            "or layout cannot give the same losses; add model.dropout=0, or keep them"
        )
    engine = dataclasses.replace(config.engine, kind=plan.resume_engine)
    resumed = dataclasses.replace(config, engine=engine, parallel=plan.resume_parallel)
    for run_config, world_size in ((config, plan.world_size), (resumed, plan.resume_world_size)):
        yield from check(run_config, world_size=max(world_size, 1), local_world_size=max(world_size, 1))
    if 0 < num_gpus < max(plan.world_size, plan.resume_world_size):
        yield f"world and resume_world: this machine has {num_gpus} GPUs; one rank needs one"


main = partial(
    hydra_cli.command,
    VerifyResumeConfig,
    run,
    HELP,
    reader=partial(hydra_cli.compose_run, VerifyResumeConfig),
    shown=[
        "before",
        "after",
        "world",
        "resume_world",
        "resume_engine",
        "resume_tp",
        "resume_cp",
        "resume_ep",
        "resume_pp",
    ],
)
