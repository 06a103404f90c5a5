"""What a run reaches on samples that it does not train on, in training and afterwards."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from bigtrain import log
from bigtrain.checkpoint.store import read_run_state
from bigtrain.config import EngineKind, Offload, SetConfig, TaskKind, TrainConfig, own_sets, set_data
from bigtrain.config.check import check, fit_micro_batch
from bigtrain.data.read.index import read_index
from bigtrain.data.read.loader import count_targets
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.read.tokenizer import TOKENIZER_FILE
from bigtrain.distributed.collectives import init_process_group, pick_device, shut_down
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import MODEL
from bigtrain.errors import ConfigError
from bigtrain.files import read_json
from bigtrain.models import build_model
from bigtrain.processes import RankInfo
from bigtrain.run.data import elsewhere, held_out_batches, open_data
from bigtrain.run.directory import FACTS_FILE, find_whole, locate, read_config
from bigtrain.run.frozen import load_state
from bigtrain.run.inputs import label_names
from bigtrain.run.sets import HELD_OUT, open_set, sets_of
from bigtrain.run.written import write_validation, written_metrics
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import Objective, split_sums
from bigtrain.tasks.causal_lm import CausalLM

SETS = (HELD_OUT, "test")
NUM_WRITTEN = 10  # texts of a validation that are recorded


@dataclass(frozen=True, slots=True)
class Measured:
    """Loss and metrics of one set, or of several together."""

    metrics: dict[str, float]
    """``loss`` and the task's; of a set with a name as ``name/loss``, besides those of all together."""
    confusion: NDArray[np.float64] | None
    """``(C, C)``, a row per true label, if the task counts them."""
    texts: list[dict[str, str]]
    """On rank 0, what was written of the first of ``validation.written_samples`` samples."""


def validate(engine: Engine, sets: Mapping[str, SampleStream], config: TrainConfig, *, batches: int | None) -> Measured:
    """Return the mean loss per target, and the task's metrics, at any world size.

    Args:
        engine: with the weights.
        sets: by name; what has none is ``""``.
        config: of the run.
        batches: global batches of each set; None for all of it.
    """
    objective = build_objective(config.task)
    totals = {name: _add_up(engine, stream, objective, config, batches) for name, stream in sets.items()}
    metrics, sums = _metrics_of(objective, torch.stack(list(totals.values())).sum(dim=0))
    for name, total in totals.items():
        metrics |= {f"{name}/{key}": value for key, value in _metrics_of(objective, total)[0].items()} if name else {}
    texts = {}
    if config.validation.written_samples:
        texts = {name: write_validation(engine, stream, config) for name, stream in sets.items()}
        metrics |= written_metrics([text for part in texts.values() for text in part])
    for name, stream in sets.items() if isinstance(objective, CausalLM) else ():
        if (size := stream.bytes_per_token) and (name or len(sets) == 1):
            prefix = f"{name}/" if name else ""
            metrics[f"{prefix}bits_per_byte"] = metrics[f"{prefix}loss"] / math.log(2) / size
    for name, part in texts.items():
        metrics |= {f"{name}/{key}": value for key, value in written_metrics(part).items()} if name else {}
    return Measured(metrics, sums.get("confusion"), [text for part in texts.values() for text in part][:NUM_WRITTEN])


def _add_up(
    engine: Engine, stream: SampleStream, objective: Objective, config: TrainConfig, batches: int | None
) -> torch.Tensor:
    """Return targets, summed loss and the objective's sums over samples of a set, over all ranks: fp64 ``(2 + K,)``."""
    batches = batches or math.ceil(stream.num_samples / config.train.global_batch_size)
    steps = held_out_batches(stream, config, engine, batches=batches)
    total = torch.zeros(2 + sum(math.prod(shape) for shape in objective.sums.values()), dtype=torch.float64)
    for micro_batches in steps:
        for batch, sums in zip(micro_batches, engine.evaluate(micro_batches).tolist(), strict=True):
            total += torch.tensor([count_targets(objective, batch), *sums], dtype=torch.float64)
    return engine.mesh.total(total)


def _metrics_of(objective: Objective, total: torch.Tensor) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
    num_targets, loss_sum, *flat = total.tolist()
    loss = loss_sum / num_targets if num_targets else float("nan")  # all in shards that are skipped
    sums = split_sums(objective, flat)
    return {"loss": loss, **objective.metrics(loss, sums)}, sums


def evaluation_config(path: Path, *, batches: int | None = None) -> TrainConfig:
    """Return the configuration of a run for measuring and predicting on the ranks of this world.

    Args:
        path: directory of a run, or of one of its checkpoints.
        batches: global batches of a validation; by default those of the run's own.

    Raises:
        CheckpointError: no checkpoint.
        ConfigError: it is of no use in this world.
    """
    info = RankInfo.from_env()
    log.setup(info.rank)
    config = read_config(locate(path)[0])
    # The engine does not matter to the numbers; this one needs the least memory.
    engine = dataclasses.replace(config.engine, kind=EngineKind.fsdp, dp_shard=None, offload=Offload.none)
    every_steps, batches = config.validation.every_steps or 1, batches or config.validation.batches
    validation = dataclasses.replace(config.validation, batches=batches, every_steps=every_steps)
    train = dataclasses.replace(config.train, micro_batch_size=None)
    config = dataclasses.replace(config, engine=engine, validation=validation, train=train)
    config = fit_micro_batch(config, info.world_size)
    if problems := check(config, world_size=info.world_size, local_world_size=info.local_world_size):
        raise ConfigError("\n".join(problems))
    return config


def load_engine(path: Path, config: TrainConfig) -> tuple[Engine, Path]:
    """Return an engine with the weights of a run's newest whole checkpoint, and that; starts the process group.

    Raises:
        CheckpointError: no whole checkpoint.
    """
    info, device = _join_group()
    _, checkpoint = find_whole(path)
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=device)
    load_state(checkpoint, {key: entry for key, entry in engine.state.entries.items() if key.startswith(MODEL)})
    engine.state.commit()
    return engine, checkpoint


def _join_group() -> tuple[RankInfo, torch.device]:
    """Start the process group, unless there is one."""
    info = RankInfo.from_env()
    device = pick_device(info)
    if not dist.is_initialized():
        init_process_group(info, device)
    return info, device


def validate_run(
    path: Path, *, batches: int | None = None, chosen: str = HELD_OUT, part: SetConfig | None = None
) -> Measured:
    """Return what a checkpoint reaches on a set, with its ``step`` among the metrics, on all ranks of this world.

    Args:
        path: directory of a run, or of one of its checkpoints.
        batches: global batches of each set; by default those of the run's own validations, and all of other sets.
        chosen: ``validation`` or ``test``, or one of their sets by name, such as ``test/news``.
        part: another set, in place of ``chosen``.

    Raises:
        CheckpointError: no whole checkpoint.
        ConfigError: the run has no such set.
    """
    config, (directory, _) = evaluation_config(path, batches=batches), locate(path)
    _join_group()
    with elsewhere(config.data):
        sets = _open_sets(config, directory, chosen, part)
    engine, checkpoint = load_engine(path, config)
    is_usual = chosen == HELD_OUT and part is None
    measured = validate(engine, sets, config, batches=config.validation.batches if is_usual else batches)
    shut_down()
    is_usual &= config.task.kind == TaskKind.causal_lm.name
    if is_usual and sets.get("") and sets[""].tokenizer_directory and not config.data.mixture:
        index = read_index(directory, check_sizes=False)
        if not index.live and index.validation.num_documents:
            measured.metrics["unigram_entropy"] = index.validation.unigram_nats_per_token
    return dataclasses.replace(measured, metrics={"step": read_run_state(checkpoint).step, **measured.metrics})


def _open_sets(config: TrainConfig, run: Path, chosen: str, part: SetConfig | None) -> dict[str, SampleStream]:
    """Return the sets that are measured on; those of their own need no training data."""
    which, _, name = chosen.partition("/")
    data = {"data": set_data(config.data, part)} if part else own_sets(config.data, which) if which in SETS else {}
    if name:
        data = {other: section for other, section in data.items() if other == name}
    if not data and chosen == HELD_OUT:
        return sets_of(open_data(config), HELD_OUT)
    if not data:
        known = [f"{w}/{n}" if n else w for w in SETS for n in own_sets(config.data, w)]
        raise ConfigError(
            f"set={chosen}: the run has {', '.join(dict.fromkeys([HELD_OUT, *known]))}; another one is data.path=..."
        )
    tokenizer = run if (run / TOKENIZER_FILE).is_file() else None
    where = "data" if part else f"data.{which}"
    facts = read_json(run / FACTS_FILE)
    found = {
        other: open_set(config, section, where=where, tokenizer=tokenizer, label_names=label_names(run), facts=facts)
        for other, section in data.items()
    }
    return {"": next(iter(found.values()))} if part or name else found
