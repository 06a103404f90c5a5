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


class InOrder:
    """Beside a Trainer of transformers: the samples in their order, and decay of matrices alone, as ours.

    By name, Trainer would let Mamba's vector D decay; of others it chooses the same.
    """

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def _get_train_sampler(self, *_args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Recorded(InOrder):
    """The same, and what Trainer takes for the loss of each micro-batch: its share of the step's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss

    def step_losses(self) -> list[float]:
        """Return the loss of each step."""
        size = self.args.gradient_accumulation_steps
        return [sum(self.losses[first : first + size]) for first in range(0, len(self.losses), size)]


def trainer_arguments(config: TrainConfig, directory: Path, num_micro_batches: int) -> dict[str, Any]:
    """Return the arguments with which a Trainer of transformers trains as a run, on a CPU at a constant rate."""
    settings = config.optimizer
    return {
        "output_dir": str(directory / "trainer"),
        "max_steps": config.train.steps,
        "per_device_train_batch_size": config.train.global_batch_size // num_micro_batches,
        "gradient_accumulation_steps": num_micro_batches,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "adam_epsilon": settings.eps,
        "max_grad_norm": settings.grad_clip,
        "logging_steps": config.train.log_every_steps,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
