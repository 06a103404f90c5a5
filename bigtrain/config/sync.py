"""The section ``sync``, and what it cannot be combined with."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from bigtrain.config.bounds import Bound, OnlyIf
from bigtrain.config.choices import EngineKind, OptimizerKind
from bigtrain.config.parallel import shared

if TYPE_CHECKING:
    from bigtrain.config import TrainConfig


@dataclass(kw_only=True, slots=True)
class SyncConfig:
    """Local steps: workers train by themselves and average their weights now and then (FedAvg, DiLoCo)."""

    every_steps: Annotated[int, Bound(ge=1)] = 1
    """Steps that each worker takes on its own part of every batch before weights are averaged; 1 = gradients are, in every step."""
    workers: Annotated[int | None, Bound(ge=1, le=10_000), OnlyIf("every_steps", not_in=(1,))] = None
    """Workers of the run, a multiple of its ranks: a rank with several takes their steps one after the other."""
    outer_lr: Annotated[float, Bound(gt=0), OnlyIf("every_steps", not_in=(1,))] = 1.0
    """Learning rate of the step from the weights before to their average: 1 takes the average itself, DiLoCo 0.7."""
    outer_momentum: Annotated[float, Bound(ge=0, lt=1), OnlyIf("every_steps", not_in=(1,))] = 0.0
    """Nesterov momentum of that step: DiLoCo 0.9."""


def check_sync(config: "TrainConfig", world_size: int) -> Iterator[str]:
    """Yield what stands against local steps, each with what to change."""
    sync, train, where = config.sync, config.train, f"sync.every_steps={config.sync.every_steps}"
    if sync.every_steps == 1:
        return
    if sync.workers is None:
        yield f"{where}: say how many workers the run has, such as sync.workers={world_size}"
        return
    if sync.workers % world_size:
        yield f"sync.workers={sync.workers}: {world_size} ranks cannot have as many each; use a number of ranks that divides it"
    each = sync.workers * (train.micro_batch_size or 1)
    if train.global_batch_size % each:
        size = -(-train.global_batch_size // each) * each
        yield (
            f"train.global_batch_size={train.global_batch_size}: {sync.workers} workers cannot have as many micro-batches of "
            f"{train.micro_batch_size} each; use train.global_batch_size={size}"
        )
    if config.engine.kind is not EngineKind.ddp:
        yield f"{where}: a worker has whole weights of its own, and engine={config.engine.kind.name} shards them; use engine=ddp"
    if config.optimizer.kind is OptimizerKind.muon:
        yield f"{where}: optimizer=muon is not offered with it; use optimizer=adamw"
    for name, is_on in (
        ("privacy.max_grad_norm", config.privacy.max_grad_norm is not None),
        ("model.moe", config.model.moe is not None),
        ("model.adapter", config.model.adapter is not None),
        ("optimizer.average", config.optimizer.average is not None),
        ("optimizer.keep_zeros", config.optimizer.keep_zeros),
        *((setting.partition("=")[0], True) for setting in shared(config.parallel)),
    ):
        if is_on:
            yield f"{where}: {name} is not offered with it; leave it out"
    if config.logging.layer_norms_every_steps:
        yield f"{where}: norms per layer are of one set of weights; add logging.layer_norms_every_steps=0"
