"""The parity gate: the same run under every engine and world size, compared step by step.

All cases train the same steps from the same weights on the same samples; losses, gradient norms and final weights must
agree with those of the first.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from bigtrain.config import EngineKind, ParallelConfig, Precision, TrainConfig
from bigtrain.config.parallel import shared
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.loader import StepBatch
from bigtrain.distributed.collectives import all_reduce_sum, init_process_group, pick_device
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import MODEL, EngineState, initialise
from bigtrain.models import build_model
from bigtrain.optim.schedule import lr_at
from bigtrain.processes import RankInfo
from bigtrain.run.data import open_data, train_loader, with_class_weights
from bigtrain.run.frozen import starting_values
from bigtrain.run.step import read_back, seed_step, train_step
from bigtrain.tasks import build_objective
from bigtrain.testing.ranks import run_ranks

StepFunction = Callable[[Engine, StepBatch, float], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Case:
    """One way to compute the run."""

    engine: EngineKind
    world_size: int
    micro_batch_size: int
    dp_shard: int | None = None  # ``hsdp`` only
    environ: dict[str, str] = field(default_factory=dict)  # what ``accelerate launch`` would set
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # what ranks share

    def __str__(self) -> str:
        extra = f" shard {self.dp_shard}" if self.dp_shard else ""
        extra += f" zero{self.environ[ZERO_STAGE]}" if ZERO_STAGE in self.environ else ""
        extra += "".join(f" {setting.removeprefix('parallel.')}" for setting in shared(self.parallel))
        return f"{self.engine.name}{extra} world {self.world_size} micro {self.micro_batch_size}"


ZERO_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"


@dataclass(frozen=True, slots=True)
class Trajectory:
    losses: list[float]
    grad_norms: list[float]
    parameters: dict[str, np.ndarray]  # final fp32 weights by name, in natural shape
    wrapped_type: str  # type of the wrapped model, since libraries fall back to another engine in silence


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest differences from the reference: relative, over all steps, and of the weights absolute."""

    loss: float
    grad_norm: float
    parameters: float

    def within(self, tolerance: "Difference") -> bool:
        """Return whether nothing differs by more than in ``tolerance``."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(tolerance), strict=True)
        return all(value <= bound for value, bound in pairs)


_ROUNDED = Difference(loss=2e-3, grad_norm=math.inf, parameters=math.inf)
TOLERANCES = {
    Precision.fp32: Difference(loss=1e-5, grad_norm=1e-5, parameters=1e-4),
    Precision.tf32: _ROUNDED,
    Precision.bf16: _ROUNDED,
    Precision.fp8: _ROUNDED,
}  # how far a case may be from a reference in fp32


def compute(
    config: TrainConfig,
    case: Case,
    *,
    step: StepFunction = train_step,
    num_steps: int | None = None,
    timeout_seconds: float = 300,
) -> Trajectory:
    """Train the first ``num_steps`` steps (by default all) of the run as ``case`` says, on new ranks."""
    args = (configure(config, case), step, num_steps)
    return run_ranks(trace, case.world_size, *args, timeout_seconds=timeout_seconds, environ=case.environ)[0]


def configure(config: TrainConfig, case: Case) -> TrainConfig:
    engine = dataclasses.replace(config.engine, kind=case.engine, dp_shard=case.dp_shard)
    train = dataclasses.replace(config.train, micro_batch_size=case.micro_batch_size)
    return dataclasses.replace(config, engine=engine, parallel=case.parallel, train=train)


def compare(trajectory: Trajectory, reference: Trajectory) -> Difference:
    """Return how far ``trajectory`` is from ``reference``."""

    def relative(values: list[float], expected: list[float]) -> float:
        # NaN counts as infinity: max() would ignore it.
        differences = np.abs(np.subtract(values, expected)) / np.abs(expected)
        return float(np.nan_to_num(differences, nan=np.inf).max())

    parameters = max(
        float(np.nan_to_num(np.abs(trajectory.parameters[name] - expected), nan=np.inf).max())
        for name, expected in reference.parameters.items()
    )
    return Difference(
        relative(trajectory.losses, reference.losses),
        relative(trajectory.grad_norms, reference.grad_norms),
        parameters,
    )


def trace(config: TrainConfig, step_function: StepFunction = train_step, num_steps: int | None = None) -> Trajectory:
    """Train on this rank, joining the process group first if need be, and return what was computed."""
    info = RankInfo.from_env()
    device = pick_device(info)
    if not dist.is_initialized():
        init_process_group(info, device, timeout_seconds=120)
    stream = open_data(config)["train"]
    config = with_class_weights(config, stream)
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=device)
    values = starting_values(config.model, config.train.seed)
    initialise(engine.state, values, num_threads=1)
    pending = []
    with train_loader(stream, config, engine, start=Cursor()) as loader:
        for batch in loader:
            lr = lr_at(batch.step, peak_lr=config.optimizer.lr, num_steps=config.train.steps, config=config.scheduler)
            seed_step(config.train.seed, batch.step, engine.mesh.rank, engine.device)
            loss, grad_norm = step_function(engine, batch, lr)
            pending.append({"loss": loss, "grad_norm": grad_norm})
            if batch.step + 1 == (num_steps or config.train.steps):
                break
    records = read_back(pending, build_objective(config.task), engine.mesh)
    wrapped = [cls.__name__ for cls in type(engine.module).__mro__]
    return Trajectory(
        losses=[record["loss"] for record in records],
        grad_norms=[record["grad_norm"] for record in records],
        parameters=whole_parameters(engine.state),
        wrapped_type="FSDPModule" if "FSDPModule" in wrapped else wrapped[0],
    )


def whole_parameters(state: EngineState) -> dict[str, np.ndarray]:
    """Return every master weight, assembled from all ranks' boxes; for small models only."""
    whole = {}
    for key, entry in state.entries.items():
        if key.startswith(MODEL):
            tensor = torch.zeros(entry.shape)
            for box in entry.own_boxes():
                tensor[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.view.shape, strict=True))] = (
                    box.view.cpu()
                )
            whole[key.removeprefix(MODEL)] = all_reduce_sum(tensor).numpy()
    return whole
