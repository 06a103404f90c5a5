"""The trainer's time per optimizer step over a bare PyTorch loop with the same model, data and engine.

    python benchmarks/overhead.py --engine fsdp --ranks 2
    python benchmarks/overhead.py --engine ddp --no-op

Both sides live in one process group and take turns, some steps each, so that whatever else the machine
does falls on both. Our side is ``trainer.train`` itself: loader, seeding, stop agreement, metrics, files
and console. It hands over to the bare loop whenever it has logged, because the recorder it is given is
:class:`Turns`. The other side is what one would write by hand with torch or DeepSpeed alone, with batches
that are on the device already. Equal losses at the end prove that both did the same work.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from turns import machine

from bigtrain.checkpoint.saver import Saver
from bigtrain.config import (
    DataConfig,
    DataSource,
    EngineConfig,
    EngineKind,
    ModelConfig,
    Precision,
    RunConfig,
    SchedulerConfig,
    SchedulerKind,
    TrainConfig,
    TrainingConfig,
)
from bigtrain.config.check import check, resolve
from bigtrain.config.convert import from_dict
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.batch import Batch
from bigtrain.distributed.collectives import all_reduce_sum, init_process_group, pick_device, shut_down
from bigtrain.engine.build import build_engine
from bigtrain.engine.deepspeed_zero import STAGES, deepspeed_settings, import_deepspeed
from bigtrain.engine.state import initialise
from bigtrain.engine.wrap import wrap_blocks
from bigtrain.models import build_model, initial_values
from bigtrain.models.init import InitialValue, Normal
from bigtrain.processes import RankInfo
from bigtrain.run import launching, trainer
from bigtrain.run.data import open_data
from bigtrain.supervise.launch import Launch
from bigtrain.tasks.base import TaskModel
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.telemetry.layer_norms import LayerNorms
from bigtrain.telemetry.recorder import NullRecorder
from bigtrain.testing.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parent.parent
PRESETS = sorted(path.stem for path in (REPOSITORY / "configs/model").glob("*.yaml") if path.stem != "hf")
TURN_STEPS = 10
"""Steps of each side before it is the other's turn; also ``train.log_every_steps``, at its default."""
WARMUP_TURNS = 2
BareStep = Callable[[Batch], torch.Tensor]


@dataclass(slots=True)
class Times:
    """What one side took on one rank."""

    steps: list[float] = field(default_factory=list)
    """Wall-clock seconds of every step."""
    turns: list[float] = field(default_factory=list)
    """Wall-clock seconds per step of every turn, with all that happens between steps."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds per step of every turn, all threads."""
    telemetry: list[float] = field(default_factory=list)
    """Of ours: seconds of every call of the recorder, which reads gauges, writes files and shows, once a turn."""
    norms: list[float] = field(default_factory=list)
    """Of ours: seconds of norms per layer, of every step that they were due in."""
    loss: float = 0.0
    """Loss of the last step on this rank (bare) or on all (ours)."""

    def end_turn(self, steps: list[float], seconds: float, cpu_seconds: float) -> None:
        self.steps += steps
        self.turns.append(seconds / TURN_STEPS)
        self.cpu.append(cpu_seconds / TURN_STEPS)


class Turns(NullRecorder):
    """A recorder that passes everything on and, each time steps have been logged, runs the bare loop's turn."""

    def __init__(self, recorder: NullRecorder, bare_step: BareStep, batches: list[Batch]) -> None:
        self.recorder = recorder
        self.bare_step = bare_step
        self.batches = iter(batches)
        self.ours, self.bare = Times(), Times()
        self.pause = 0.0
        self.start = _clocks()

    def metrics(self, records: list[dict[str, Any]], phases: dict[str, float] | None = None) -> None:
        begin = time.perf_counter()
        self.recorder.metrics(records, phases)
        self.ours.telemetry.append(time.perf_counter() - begin)
        dist.barrier()
        middle = _clocks()
        steps = [record["step_seconds"] for record in records]
        steps[0] -= self.pause  # the trainer's meter ran on during the other's turn
        self.ours.end_turn(steps, *(b - a for a, b in zip(self.start, middle, strict=True)))
        self.ours.loss = records[-1]["loss"]
        self.run_bare(middle)
        self.start = _clocks()
        self.pause = self.start[0] - middle[0]

    def run_bare(self, start: tuple[float, float]) -> None:
        steps, begin = [], start[0]
        for i in range(TURN_STEPS):
            loss = self.bare_step(next(self.batches))
            if i == TURN_STEPS - 1:
                self.bare.loss = loss.item()  # as every loop does now and then
            now = time.monotonic()
            steps.append(now - begin)
            begin = now
        dist.barrier()
        self.bare.end_turn(steps, *(b - a for a, b in zip(start, _clocks(), strict=True)))

    def event(self, kind: str, **fields: Any) -> None:
        self.recorder.event(kind, **fields)

    def message(self, text: str) -> None:
        self.recorder.message(text)

    def close(self) -> None:
        self.recorder.close()


class TimedNorms(LayerNorms):
    """Norms per layer that tell the host's time for them."""

    times: ClassVar[list[float]] = []

    def before_update(self, step: int) -> None:
        begin = time.perf_counter()
        super().before_update(step)
        self.seconds = time.perf_counter() - begin

    def after_update(self, step: int) -> None:
        begin = time.perf_counter()
        super().after_update(step)
        if self._is_due(step):
            self.times.append(self.seconds + time.perf_counter() - begin)


def _clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


class OneMatrix(nn.Module):
    """The smallest thing that can be trained: what is left of the step is the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False)])

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.blocks[0](tokens[:, :4] / 256) - targets[:, :4] / 256).square().sum()


def make_model(config: TrainConfig) -> nn.Module:
    return OneMatrix() if config.model.name == "no-op" else build_model(config.model)


def make_values(config: TrainConfig) -> dict[str, InitialValue]:
    if config.model.name == "no-op":
        return {"blocks.0.weight": Normal(0.02, config.train.seed, "blocks.0.weight")}
    with torch.device("meta"):
        return initial_values(build_model(config.model), config.model, config.train.seed)


def bare_loop(config: TrainConfig, info: RankInfo, device: torch.device, values: dict[str, InitialValue]) -> BareStep:
    """Return the step of a loop as one would write it for this one purpose."""
    with torch.device(device):
        model = make_model(config)
    fill(model, values)
    wrap_blocks(TaskModel(model, CausalLM()), config.engine)
    if config.engine.kind in STAGES:
        return bare_deepspeed_step(config, info, device, model)
    return bare_torch_step(config, device, model)


def fill(model: nn.Module, values: dict[str, InitialValue]) -> None:
    """Give a model its initial weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            buffer = torch.empty(parameter.numel())
            values[name].fill(0, buffer)
            parameter.copy_(buffer.view_as(parameter))


def bare_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters, settings = list(model.parameters()), config.optimizer
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, fused=True)


def bare_torch_step(config: TrainConfig, device: torch.device, model: nn.Module) -> BareStep:
    bf16, grad_clip = config.engine.precision.base is Precision.bf16, config.optimizer.grad_clip
    autocast: Callable[[], Any] = contextlib.nullcontext
    if config.engine.kind is EngineKind.ddp:
        if dist.get_world_size() > 1:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        autocast = partial(torch.autocast, device.type, torch.bfloat16) if bf16 else autocast
    else:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    optimizer = bare_optimizer(config, model)

    def step(batch: Batch) -> torch.Tensor:
        with autocast():
            loss = model(batch["tokens"], batch["targets"]) / batch["targets"].numel()
        loss.backward()
        clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def bare_deepspeed_step(config: TrainConfig, info: RankInfo, device: torch.device, model: nn.Module) -> BareStep:
    deepspeed = import_deepspeed(info, device)
    settings = deepspeed_settings(config, dp_size=info.world_size, device=device)
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=bare_optimizer(config, model), config=settings, dist_init_required=False
    )

    def step(batch: Batch) -> torch.Tensor:
        loss = engine(batch["tokens"], batch["targets"]) / batch["targets"].numel()
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def measure(config: TrainConfig) -> tuple[Times, Times, str]:
    """Run both sides on this rank; return the times of ours and of the bare loop, and what they ran on."""
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    info = RankInfo.from_env()
    device = pick_device(info)
    init_process_group(info, device, timeout_seconds=300)
    values = make_values(config)
    engine = build_engine(config, lambda: make_model(config), info=info, device=device)
    initialise(engine.state, values, num_threads=1)
    bare_step = bare_loop(config, info, device, values)
    streams = open_data(config)
    with trainer.train_loader(streams["train"], config, engine, start=Cursor()) as loader:
        batches = [next(loader).micro_batches[0].to(device) for _ in range(config.train.steps)]
    directory = Path(config.run.root) / config.run.name
    with silence():
        turns = Turns(launching.open_recorder(config, 0, engine, streams["train"]), bare_step, batches)
    saver = Saver(directory, engine.state.entries, config.checkpoint)
    run = trainer.Run(
        config=config,
        launch=Launch(directory, info.rank, config.supervision),
        engine=engine,
        streams=streams,
        recorder=turns,
        saver=saver,
        start=Cursor(),
    )
    trainer.LayerNorms = TimedNorms
    with turns:
        trainer.train(run)
    bare_loss = all_reduce_sum(torch.tensor(turns.bare.loss)).item() / info.world_size
    turns.bare.loss, turns.ours.norms = bare_loss, TimedNorms.times
    num_parameters = sum(entry.numel() for entry in make_model(config).parameters())
    shut_down()
    return turns.ours, turns.bare, f"{num_parameters:,} parameters, {torch.get_num_threads()} threads per rank"


def silence() -> contextlib.redirect_stdout:
    """Send what a console that is opened now says to nowhere."""
    return contextlib.redirect_stdout(open(os.devnull, "w"))


def make_config(args: argparse.Namespace, scratch: str) -> TrainConfig:
    """Return the run: bytes of this project's own source through the memory-mapped corpus, no accumulation."""
    if args.no_op:
        model = ModelConfig(name="no-op", max_positions=8)
    else:
        model = from_dict(ModelConfig, yaml.safe_load((REPOSITORY / f"configs/model/{args.model}.yaml").read_text()))
    precision = Precision.bf16 if torch.cuda.device_count() else Precision.fp32
    config = resolve(
        TrainConfig(
            run=RunConfig(name="overhead", root=f"{scratch}/runs"),
            model=model,
            data=DataConfig(
                source=DataSource.text, path=f"{REPOSITORY}/bigtrain/**/*.py", tokenizer="bytes", root=f"{scratch}/data"
            ),
            engine=EngineConfig(kind=EngineKind[args.engine], precision=precision),
            scheduler=SchedulerConfig(kind=SchedulerKind.constant, warmup_steps=0),
            train=TrainingConfig(
                steps=args.steps,
                global_batch_size=args.batch * args.ranks,
                micro_batch_size=args.batch,
                log_every_steps=TURN_STEPS,
            ),
        )
    )
    if problems := check(config, world_size=args.ranks, local_world_size=args.ranks):
        sys.exit("\n".join(problems))
    return config


def report(args: argparse.Namespace, config: TrainConfig, results: list[tuple[Times, Times, str]]) -> str:
    """Return the table: rank 0's wall clock, the CPU time of all ranks together."""
    ours, bare, facts = results[0]
    tolerance = 1e-4 if config.engine.precision is Precision.fp32 else 1e-2
    assert abs(ours.loss - bare.loss) <= tolerance * abs(bare.loss), f"other work: loss {ours.loss} and {bare.loss}"
    lines = [
        f"engine={args.engine} ranks={args.ranks} {config.engine.precision.name}, model {config.model.name}: {facts}",
        f"batch {args.batch} x {config.data.sequence_length} tokens per rank; turns of {TURN_STEPS} steps; {machine()}",
        f"loss of the last step: bigtrain {ours.loss:.6f}, bare {bare.loss:.6f}",
        "",
        f"{'milliseconds':<60}{'bare':>10}{'bigtrain':>10}{'more':>9}{'ratio':>8}",
    ]
    for name, summary, our_values, bare_values in table(results):
        a, b = summary(our_values) * 1e3, summary(bare_values) * 1e3
        lines.append(f"{name:<60}{b:>10.3f}{a:>10.3f}{a - b:>+9.3f}{a / b:>8.4f}")
    pairs = [a / b for a, b in zip(ours.turns[WARMUP_TURNS:], bare.turns[WARMUP_TURNS:], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    lines.append(f"ratio of neighbouring turns: median {middle:.4f}, quartiles {low:.4f} to {high:.4f}")
    told = statistics.median(ours.telemetry) / TURN_STEPS
    norms = statistics.median(ours.norms or [0.0]) / config.logging.layer_norms_every_steps
    lines.append(
        f"of it telemetry: {told * 1e3:.3f} ms for gauges, files and console, {norms * 1e3:.3f} ms for norms per layer, "
        f"{(told + norms) / 0.1:.2%} of a step of 100 ms"
    )
    return "\n".join(lines)


def table(results: list[tuple[Times, Times, str]]) -> list[tuple[str, Callable[[list[float]], float], Any, Any]]:
    """Return (name, what is shown of the values, our values, bare values) in seconds."""
    median, first_step = statistics.median, WARMUP_TURNS * TURN_STEPS
    steps = [times.steps[first_step:] for times in results[0][:2]]
    turns = [times.turns[WARMUP_TURNS:] for times in results[0][:2]]
    cpu = [np.sum([result[side].cpu[WARMUP_TURNS:] for result in results], axis=0).tolist() for side in (0, 1)]
    return [
        (f"single step, median of {len(steps[0])}", median, *steps),
        ("single step, 25th percentile", lambda values: statistics.quantiles(values, n=4)[0], *steps),
        (f"step with its share of logging, median of {len(turns[0])} turns", median, *turns),
        (f"CPU time per step, all ranks, median of {len(turns[0])} turns", median, *cpu),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["ddp", "fsdp", *(kind.name for kind in STAGES)], default="fsdp")
    parser.add_argument("--ranks", type=int, default=1, help="processes, started here (default 1)")
    parser.add_argument("--model", default="gpt_nano", choices=PRESETS, metavar="PRESET", help="default gpt_nano")
    parser.add_argument("--batch", type=int, default=4, help="sequences per rank and step (default 4)")
    parser.add_argument("--steps", type=int, default=220, help=f"of each side, {WARMUP_TURNS * TURN_STEPS} to warm up")
    parser.add_argument("--no-op", action="store_true", help="a model of 16 numbers, to see the loop alone")
    args = parser.parse_args()
    if min(args.ranks, args.batch) < 1:
        parser.error("--ranks and --batch must be at least 1")
    if args.steps % TURN_STEPS or args.steps < (WARMUP_TURNS + 2) * TURN_STEPS:
        parser.error(f"--steps must be a multiple of {TURN_STEPS}, at least {(WARMUP_TURNS + 2) * TURN_STEPS}")
    # glibc may give memory back to the system after every step and fault it in again in the next, up to a fifth
    # of a step on a CPU. Which side is hit is chance, so neither is: the ranks read this as they start.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}
    with tempfile.TemporaryDirectory(prefix="overhead-") as scratch:
        config = make_config(args, scratch)
        print(report(args, config, run_ranks(measure, args.ranks, config, timeout_seconds=3600)))


if __name__ == "__main__":
    main()
