"""What a run begins with, and frozen weights, which are filled from that: checkpoints hold their names and a hash."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from bigtrain.checkpoint.loader import load_checkpoint
from bigtrain.checkpoint.shard import TensorReader
from bigtrain.checkpoint.store import Frozen, RunState, read_run_state
from bigtrain.config import ModelConfig, ModelKind, TrainConfig
from bigtrain.config.convert import from_dict
from bigtrain.distributed.collectives import all_reduce_sum
from bigtrain.engine.state import AVERAGE, MODEL, OPTIMIZER, Box, Entry, fill_weights, whole_entry
from bigtrain.errors import CheckpointError, ConfigError, of_all_ranks, some
from bigtrain.log import get_logger
from bigtrain.models import build_initial_values, build_model
from bigtrain.models.adapters import adapter_values, is_of_adapter, plain_name
from bigtrain.models.freeze import frozen_names
from bigtrain.models.hf.build import build_hf_model
from bigtrain.models.hf.heads import is_of_head
from bigtrain.models.hf.values import trunk_values
from bigtrain.models.init import InitialValue, Newest, Whole
from bigtrain.models.moe import BALANCE
from bigtrain.models.nf4 import CODES, SCALES, NF4Linear, dequantise, is_nf4
from bigtrain.run.directory import find_whole, is_run, own_model

_ODD = 0x1E3779B97F4A7C15
_CHUNK_ELEMENTS = 1 << 18  # 2 MiB of int64 each time, in a CPU's caches


def parameters_of(entries: Mapping[str, Entry]) -> list[str]:
    """Return the names of a state's parameters."""
    return [key.removeprefix(MODEL) for key in entries if key.startswith(MODEL) and not key.endswith(BALANCE)]


def describe_frozen(entries: Mapping[str, Entry], model: ModelConfig) -> Frozen | None:
    """Return what checkpoints say of frozen weights, None if there are none; all ranks call this."""
    names = frozen_names(parameters_of(entries), model)
    return Frozen(names, hash_of({MODEL + name: entries[MODEL + name] for name in names})) if names else None


def without_frozen(entries: Mapping[str, Entry], frozen: Frozen | None) -> Mapping[str, Entry]:
    """Return what checkpoints hold of a state."""
    left_out = {MODEL + name for name in frozen.names} if frozen else set()
    return {key: entry for key, entry in entries.items() if key not in left_out}


def hash_of(entries: Mapping[str, Entry]) -> str:
    """Return a hash of whole tensors from the boxes of all ranks, the same under every engine; all ranks call this."""
    keys = sorted(entries)
    sums = torch.zeros(len(keys), dtype=torch.int64)
    for number, key in enumerate(keys):
        for box in entries[key].own_boxes():
            sums[number] += _sum(box, entries[key].shape)
    if dist.is_initialized():
        all_reduce_sum(sums)
    return xxhash.xxh3_128_hexdigest(json.dumps([keys, sums.tolist()]).encode())


def _sum(box: Box, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a sum of the bits of a box's elements in fp32, each times a number of its place in the tensor, modulo 2^64."""
    view, offsets = (box.view, box.offsets) if shape else (box.view[None], (0,))
    total, first = torch.zeros((), dtype=torch.int64), offsets[0]
    for rows in view.split(max(_CHUNK_ELEMENTS // max(view[:1].numel(), 1), 1)):
        place = torch.zeros((), dtype=torch.int64, device=rows.device)
        for dim, size in enumerate(rows.shape):
            begin = first if dim == 0 else offsets[dim]
            along = torch.arange(begin, begin + size, device=rows.device).view(-1, *[1] * (rows.ndim - dim - 1))
            place = place * (shape[dim] if shape else 1) + along
        total += ((2 * place + 1) * _ODD * rows.float().contiguous().view(torch.int32)).sum().cpu()
        first += len(rows)
    return total


def load_state(path: Path, entries: Mapping[str, Entry], *, some_only: bool = False) -> None:
    """Fill entries from a checkpoint and, where it leaves frozen weights out, from what its run began with.

    All ranks call this; without a process group, one alone. With ``some_only`` the checkpoint may hold more.
    CheckpointError: as :func:`load_checkpoint`; or what the run began with is gone, or is not what it was.
    """
    state = read_run_state(path)
    stored = without_frozen(entries, state.frozen)
    load_checkpoint(path, stored, some_only=some_only)
    if state.frozen is None or not (frozen := {key: entry for key, entry in entries.items() if key not in stored}):
        return
    _refill(path, state, frozen)
    if len(frozen) == len(state.frozen.names) and hash_of(frozen) != state.frozen.hash:
        origin = state.origin and (state.origin.checkpoint or state.origin.published)
        origin = origin or f"seed {state.config['train']['seed']}"
        problem = (
            f"{path} leaves out {len(frozen)} frozen weights, and {origin}, which they came from, has others by now; put "
            "back what it was"
        )
        raise of_all_ranks(CheckpointError(problem))


def load_weights(path: Path, entries: Mapping[str, Entry], config: TrainConfig, *, some_only: bool = False) -> None:
    """Fill weights from another run's checkpoint; new adapters begin with initial values. All ranks call this.

    ``some_only`` is as in :func:`load_state`.
    """
    model, fresh = config.model, {}
    if model.adapter and read_run_state(path).config["model"].get("adapter") is None:
        fresh = {key: entry for key, entry in entries.items() if is_of_adapter(key) or is_nf4(key)}
    if fresh:
        base, reader = dataclasses.replace(model, adapter=None), WeightReader(path)
        read = Newest(reader.read)
        stored = {key.removeprefix(MODEL): Whole(functools.partial(read, key)) for key in reader.keys}
        fill_weights(fresh, adapter_values(model, functools.partial(build_model, base), stored, config.train.seed))
    kept = {key: entry for key, entry in entries.items() if key not in fresh}
    load_state(path, kept, some_only=some_only or any(map(is_nf4, fresh)))


def _refill(path: Path, state: RunState, frozen: Mapping[str, Entry]) -> None:
    origin = state.origin.checkpoint if state.origin else None
    if origin and not Path(origin).is_dir():
        problem = f"{path} leaves out {len(frozen)} frozen weights, which came from {origin}, and that is gone"
        raise of_all_ranks(CheckpointError(problem))
    config = from_dict(TrainConfig, state.config)
    if origin:
        load_weights(Path(origin), frozen, config, some_only=True)
        return
    model = config.model if config.model.pretrained else own_model(config.model, path.parent.parent)
    values = starting_values(model, config.train.seed)
    fill_weights(frozen, values)


class WeightReader(TensorReader):
    """Reads whole tensors of a checkpoint, frozen weights too, which are kept in memory; those in 4 bits as fp32."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._frozen: dict[str, torch.Tensor] = {}
        state = read_run_state(path)
        if state.frozen:
            model = own_model(from_dict(TrainConfig, state.config).model, path.parent.parent)
            with torch.device("meta"):
                network = build_model(model)
            parameters = {plain_name(name): parameter for name, parameter in network.named_parameters()}
            names = state.frozen.names
            self._frozen = {MODEL + name: torch.empty_like(parameters[name], device="cpu") for name in names}
            load_state(path, {key: whole_entry(tensor) for key, tensor in self._frozen.items()})
            for name, module in network.named_modules():
                if isinstance(module, NF4Linear):
                    codes, scales = (self._frozen.pop(MODEL + plain_name(f"{name}.{part}")) for part in (CODES, SCALES))
                    whole = dequantise(codes, scales, module.shape[1])
                    self._frozen[MODEL + plain_name(f"{name}.weight")] = whole
        self.keys = [*self.records, *self._frozen]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._frozen[key].shape if key in self._frozen else self.records[key].shape)

    def read(self, key: str) -> torch.Tensor:
        return self._frozen[key] if key in self._frozen else super().read(key)


class AveragedWeights(WeightReader):
    """Reads the means of the tensors of several checkpoints of a run (Izmailov et al. 2018), the last of which is described."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__(paths[-1])
        self._others = [WeightReader(path) for path in paths[:-1]]

    def read(self, key: str) -> torch.Tensor:
        total = super().read(key).double()
        for other in self._others:
            total += other.read(key)
        return (total / (len(self._others) + 1)).float()


class MovingAverage(WeightReader):
    """Reads the moving average of a checkpoint's weights, which began at 0, without that bias (Kingma and Ba 2015, 3)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        state = read_run_state(path)
        decay = state.config["optimizer"].get("average")
        if not decay or not state.step:
            raise ConfigError(f"average=moving: {path} has none; train with optimizer.average=0.999")
        self._share = 1 - decay**state.step

    def read(self, key: str) -> torch.Tensor:
        average = f"{key.replace(MODEL, OPTIMIZER, 1)}.{AVERAGE}"
        return super().read(average) / self._share if average in self.records else super().read(key)


def starting_values(model: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return the initial value of every parameter, of a model of transformers the trunk's from ``model.init_from``.

    If there is a process group, all ranks call this. CheckpointError: no whole checkpoint. ConfigError: another trunk.
    """
    if model.adapter:
        base = dataclasses.replace(model, adapter=None)
        values = starting_values(base, seed)
        return values | adapter_values(model, functools.partial(build_model, base), values, seed)
    if model.kind is not ModelKind.hf or not model.init_from:
        return build_initial_values(model, seed)
    if not is_run(model.init_from):
        return trunk_values(model, seed)
    _, checkpoint = find_whole(Path(model.init_from))
    reader, values = WeightReader(checkpoint), build_initial_values(model, seed)
    keys = {key.removeprefix(MODEL): key for key in reader.keys if key.startswith(MODEL)}
    with torch.device("meta"):
        network = build_hf_model(model)
    in_head = {name for name in {*values, *keys} if is_of_head(network.causal_lm, name.removeprefix("causal_lm."))}
    taken = [name for name in values if name in keys and (name not in in_head or ".pooler." in name)]
    odd = sorted((values.keys() ^ keys.keys()) - in_head)
    odd += [name for name in taken if reader.shape(keys[name]) != tuple(network.get_parameter(name).shape)]
    where = f"model.init_from={model.init_from}"
    if odd:
        raise of_all_ranks(ConfigError(f"{where}: another trunk than this model's; {some(odd, 3)} differ"))
    fresh, left = (", ".join(name for name in names if name not in taken) or "nothing" for names in (values, keys))
    get_logger().info(f"{where}: fresh: {fresh}; left out: {left}".replace("causal_lm.", ""))
    read = Newest(reader.read)
    return values | {name: Whole(functools.partial(read, keys[name])) for name in taken}
