"""Runs of small models of transformers, for ``families.py`` and ``same_as_trainer.py``: each function on ranks of its own.

Ranks are forked from a server that has imported the module of their function: what takes seconds is imported here.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import deepspeed.module_inject.auto_ep_config
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch
import torch._inductor.compile_fx
import transformers
from small_configs import small_config
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401

from bigtrain.config import (
    AdapterConfig,
    DataConfig,
    EngineConfig,
    EngineKind,
    ModelConfig,
    ModelKind,
    OptimizerConfig,
    Precision,
    RunConfig,
    SchedulerConfig,
    SchedulerKind,
    TaskConfig,
    TrainConfig,
    TrainingConfig,
)
from bigtrain.config.check import check, resolve
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.batch import Batch
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.models.hf.build import with_hf_shape
from bigtrain.run import launching
from bigtrain.run.data import open_data, train_loader
from bigtrain.testing.ranks import run_ranks

TIMEOUT_SECONDS = 120.0
"""For one call; a rank that waits for another one in vain is ended."""


def call(function: Callable[..., Any], world_size: int, *args: Any) -> tuple[Any, str | None]:
    """Call a module-level function on ranks of its own; return what rank 0 returns, or what the user is told instead.

    Raises:
        RankFailedError: a rank failed otherwise.
    """
    ranks = run_ranks(
        _told, world_size, function, *args, timeout_seconds=TIMEOUT_SECONDS, environ={"OMP_NUM_THREADS": "1"}
    )
    return ranks[0]


def _told(function: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    transformers.logging.set_verbosity_error()
    try:
        return function(*args), None
    except BigtrainError as error:
        return None, str(error)


def write_models(family: str, changes: dict[str, Any], directory: Path) -> torch.nn.Module:
    """Write ``scratch/config.json`` and ``pretrained/``, with noise on every weight, norms and biases too."""
    config = small_config(family, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.02)
    config.save_pretrained(directory / "scratch")
    model.save_pretrained(directory / "pretrained")
    return model


def run_config(
    directory: Path,
    start: str,
    engine: EngineKind,
    data: DataConfig,
    train: TrainingConfig,
    *,
    world_size: int,
    task: TaskConfig | None = None,
    adapter: AdapterConfig | None = None,
) -> TrainConfig:
    """Return the checked configuration of a run of what :func:`write_models` wrote, in fp32 at a constant rate.

    Args:
        directory: of :func:`write_models`; the run is below it.
        start: ``scratch`` or ``pretrained``.
        engine: of the run.
        data: of the run.
        train: of the run; micro-batches are fitted to ``world_size``.
        world_size: number of ranks.
        task: of the run, by default the next token.
        adapter: beside the model's weights.

    Raises:
        ConfigError: listing every problem.
    """
    model = ModelConfig(
        kind=ModelKind.hf, name=str(directory / start), pretrained=start == "pretrained", adapter=adapter
    )
    train.micro_batch_size = train.global_batch_size // (1 if world_size == 1 else 2 * world_size)
    config = TrainConfig(
        model=with_hf_shape(model),
        data=data,
        task=task or TaskConfig(),
        engine=EngineConfig(kind=engine, precision=Precision.fp32),
        optimizer=OptimizerConfig(lr=1e-3),
        scheduler=SchedulerConfig(kind=SchedulerKind.constant, warmup_steps=0),
        train=train,
        run=RunConfig(name=f"{start}-{engine.name}", root=str(directory / "runs")),
    )
    config.checkpoint.asynchronous = False
    config.engine.deepspeed.persistence_threshold_elements = 0  # or ZeRO-3 would not shard what is so small
    config = resolve(config)
    if problems := check(config, world_size=world_size, local_world_size=world_size):
        raise ConfigError("\n".join(problems))
    return config


def run_losses(config: TrainConfig) -> list[float]:
    """Train as ``launch/train.py`` does; return the losses."""
    launching.run(config)
    lines = (config.run.directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def batches(config: TrainConfig) -> Iterator[Batch]:
    """Yield the global batches of a run with a micro-batch size of its global one."""
    only_rank = SimpleNamespace(mesh=SimpleNamespace(dp_rank=0, dp_size=1), device=torch.device("cpu"))
    with train_loader(open_data(config)["train"], config, only_rank, start=Cursor()) as loader:
        for batch in loader:
            yield from batch.micro_batches
            if batch.step + 1 == config.train.steps:
                return
