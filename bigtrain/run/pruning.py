"""A run with zeros in its matrices: what it loses by them, a run that begins with them, and one that keeps them."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import RunState, read_run_state
from bigtrain.config import CheckpointConfig, TrainConfig
from bigtrain.data.read.index import INDEX_FILE, PUBLISHED_DIRECTORY
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.read.tokenizer import TOKENIZER_FILE
from bigtrain.distributed.collectives import all_reduce_sum, on_rank0
from bigtrain.engine.base import Engine
from bigtrain.engine.state import MODEL, Entry, fill_weights
from bigtrain.errors import BigtrainError, CheckpointError, ConfigError, of_all_ranks, some
from bigtrain.files import CONFIG_FILE, writing
from bigtrain.log import get_logger
from bigtrain.models import build_model
from bigtrain.models.hf.load import MODEL_DIRECTORY
from bigtrain.models.init import Whole
from bigtrain.models.pruning import TWO_OF_FOUR, input_dims, prunable, two_of_four, without_smallest
from bigtrain.run.data import HELD_OUT
from bigtrain.run.directory import FACTS_FILE
from bigtrain.run.evaluation import load_engine, open_sets, opened
from bigtrain.run.frozen import WeightReader, without_frozen
from bigtrain.run.validation import validate

COPIED = (CONFIG_FILE, FACTS_FILE, INDEX_FILE, TOKENIZER_FILE, PUBLISHED_DIRECTORY, MODEL_DIRECTORY)


@dataclass(frozen=True, slots=True)
class Pruned:
    amount: float | str  # share of each matrix that is 0, or a pattern; 0 of the run as it is
    zeros: float  # share of all weights of the model that are 0
    metrics: dict[str, float]  # of a validation; empty if the run's data is not there


def prune(path: Path, amounts: Sequence[float | str], *, targets: Sequence[str], out: Path | None) -> list[Pruned]:
    """Return what a run is as it is and with each of some amounts of zeros; write it with the last one as ``out``.

    All ranks call this. An amount is a share of each matrix of ``targets`` (:func:`bigtrain.models.pruning.prunable`),
    or :data:`TWO_OF_FOUR`. ``out`` is a run with one checkpoint, of weights alone. ConfigError: it exists, or the run
    has adapters, or nothing that can be pruned. CheckpointError: no whole checkpoint, or ``out`` cannot be written.
    """
    with opened(path) as (config, directory):
        if out and on_rank0(out.exists):
            raise of_all_ranks(
                ConfigError(f"out={out} exists; nothing is overwritten: choose another name, or remove it")
            )
        if config.model.adapter:
            problem = "has adapters beside frozen weights; merge them (bigtrain export), and prune a run that begins so"
            raise of_all_ranks(ConfigError(f"run={path}: {problem}"))
        engine, checkpoint = load_engine(path, config)
        state = read_run_state(checkpoint)
        entries = {key: entry for key, entry in engine.state.entries.items() if key.startswith(MODEL)}
        sets = _held_out(config, directory)
        found = [_measure(0.0, engine, config, sets)]
        for amount in amounts:
            values = _values(amount, checkpoint, config, state, targets)
            fill_weights({MODEL + name: entries[MODEL + name] for name in values}, values)
            engine.state.commit()
            found.append(_measure(amount, engine, config, sets))
        if out:
            _write(out, directory, without_frozen(entries, state.frozen), state)
    return found


def _values(
    amount: float | str, checkpoint: Path, config: TrainConfig, state: RunState, targets: Sequence[str]
) -> dict[str, Whole]:
    """Return the matrices of a checkpoint with zeros, each of which is read and pruned whole when it is asked for."""
    with torch.device("meta"):
        network = build_model(config.model)
    names = prunable(network, targets, frozen=state.frozen.names if state.frozen else ())
    change: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    if amount == TWO_OF_FOUR:
        fitting = {
            name: dim for name, dim in input_dims(network).items() if network.get_parameter(name).shape[dim] % 4 == 0
        }
        change = {name: partial(two_of_four, inputs=fitting[name]) for name in names if name in fitting}
        if left := [name for name in names if name not in fitting]:
            get_logger().warning(
                f"pattern=2:4: of no linear layer with inputs in fours, left as they are: {some(left, 5)}"
            )
    else:
        change = {name: partial(without_smallest, share=float(amount)) for name in names}
    if not change:
        raise of_all_ranks(ConfigError(f"run={checkpoint}: no matrix to prune; name some with targets=[<pattern>]"))
    reader = WeightReader(checkpoint)

    def read(name: str) -> torch.Tensor:
        return change[name](reader.read(MODEL + name))

    return {name: Whole(partial(read, name)) for name in change}


def _held_out(config: TrainConfig, directory: Path) -> dict[str, SampleStream]:
    try:
        return open_sets(config, directory, HELD_OUT, None)
    except BigtrainError as error:
        get_logger().warning(f"the loss is not measured: {error}")
        return {}


def _measure(amount: float | str, engine: Engine, config: TrainConfig, sets: dict[str, SampleStream]) -> Pruned:
    weights = {key: entry for key, entry in engine.state.entries.items() if key.startswith(MODEL)}
    zeros = sum(count_zeros(weights).values()) / sum(math.prod(entry.shape) for entry in weights.values())
    metrics = validate(engine, sets, config, batches=config.validation.batches).metrics if sets else {}
    return Pruned(amount, zeros, metrics)


def _write(out: Path, run: Path, weights: Mapping[str, Entry], state: RunState) -> None:
    def copy() -> None:
        with writing(out):
            out.mkdir(parents=True)
            for source in (run / name for name in COPIED):
                if source.is_dir():
                    shutil.copytree(source, out / source.name)
                elif source.is_file():
                    shutil.copyfile(source, out / source.name)

    on_rank0(copy)
    saver = Saver(out, weights, CheckpointConfig())
    saver.save(dataclasses.replace(state, standing=None, validation_loss=None))
    report = saver.finish()
    if report and report.error:
        raise of_all_ranks(CheckpointError(f"out={out}: {report.error}"))


def count_zeros(entries: Mapping[str, Entry]) -> dict[str, int]:
    """Return how many numbers of each tensor are 0, on all ranks together; all ranks call this."""
    counts = [sum(int((box.view == 0).sum()) for box in entry.own_boxes()) for entry in entries.values()]
    return dict(zip(entries, all_reduce_sum(torch.tensor(counts)).tolist(), strict=True))


def require_zeros(engine: Engine, config: TrainConfig) -> None:
    """Say which zeros ``optimizer.keep_zeros`` keeps; ConfigError on all ranks: there is none, or nothing but zeros."""
    if not config.optimizer.keep_zeros:
        return
    entries = {MODEL + name: engine.state.entries[MODEL + name] for name in engine.state.holders}
    matrices = {key: entry for key, entry in entries.items() if len(entry.shape) >= 2}
    zeros, sizes = count_zeros(matrices), {key: math.prod(entry.shape) for key, entry in matrices.items()}
    if empty := [key.removeprefix(MODEL) for key in matrices if zeros[key] == sizes[key]]:
        problem = f"optimizer.keep_zeros: {some(empty, 3)} is 0 as a whole, and would stay so; leave keep_zeros out"
        raise of_all_ranks(ConfigError(problem))
    if not any(zeros.values()):
        begin = "prune a run (bigtrain prune) and begin with it: checkpoint.resume=<pruned run> checkpoint.load=weights"
        raise of_all_ranks(ConfigError(f"optimizer.keep_zeros: no matrix has a zero to keep; {begin}"))
    share = sum(zeros.values()) / sum(sizes.values())
    number = sum(count > 0 for count in zeros.values())
    get_logger().info(f"optimizer.keep_zeros: {share:.1%} of the matrices' numbers, in {number} of them, stay 0")
