"""From a checkpoint to a directory that transformers, and every tool that reads its files, opens without us."""

import functools
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.reader import TensorReader
from bigtrain.checkpoint.shard import NAMES
from bigtrain.checkpoint.store import read_run_state
from bigtrain.config import ModelConfig, ModelKind, Precision, TrainConfig
from bigtrain.data.index import read_index
from bigtrain.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from bigtrain.engine.state import MODEL
from bigtrain.errors import ConfigError
from bigtrain.files import sync
from bigtrain.models import build_model
from bigtrain.models.hf import read_hf_config
from bigtrain.models.hf_export import HFTensor, hf_config, hf_tensors
from bigtrain.models.init import initial_values
from bigtrain.run_files import find_whole
from bigtrain.schema import from_dict

ROLES = ("bos_token", "eos_token", "pad_token")
"""All are the end-of-text token, which stands between documents: it begins, ends and pads a text."""
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """As it is written."""
    load: Callable[[], torch.Tensor]
    """Reads it, in any floating-point type."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    checkpoint: Path
    """What it was written from."""
    num_parameters: int
    """Elements of all tensors."""
    has_tokenizer: bool
    """Whether the run has one; it has none if its data were synthetic."""


def export(path: Path, out: Path, *, precision: Precision, max_shard_bytes: int) -> Exported:
    """Write ``out`` so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` of transformers open it.

    Weights are read and written one tensor at a time. The tokenizer is the run's own; it encodes as in
    training with ``add_special_tokens=False``, which makes no difference to one that bigtrain has made.

    Args:
        path: directory of a run, of which the newest checkpoint that verifies is taken, or of one checkpoint.
        out: directory to be made; it appears when it is complete.
        precision: of the weights in the files.
        max_shard_bytes: largest file of weights, unless a single tensor is larger.

    Raises:
        CheckpointError: no checkpoint verifies.
        ConfigError: transformers has no such model, or ``out`` exists or cannot be written.
    """
    if precision not in DTYPES:
        raise ConfigError(f"dtype={precision.name}: weights are written in {' or '.join(p.name for p in DTYPES)}")
    if out.exists():
        raise ConfigError(f"out={out} exists; nothing is overwritten: choose another name, or remove it")
    run, checkpoint = find_whole(path)
    model = from_dict(TrainConfig, read_run_state(checkpoint).config).model
    list_parts = _native_parts if model.kind is ModelKind.native else _hugging_face_parts
    parts = list_parts(model, checkpoint, DTYPES[precision])
    eos_id = _eos_id(run)
    config = _config(model, eos_id) | {"torch_dtype": str(DTYPES[precision]).removeprefix("torch.")}
    partial = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", {f"{role}_id": config.get(f"{role}_id") for role in ROLES})
        _write_weights(partial, parts, max_shard_bytes)
        if eos_id is not None:
            _write_tokenizer(run, partial, eos_id, max_positions=model.max_positions)
        sync(partial)
        os.rename(partial, out)
        sync(out.parent)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(checkpoint, sum(math.prod(part.shape) for part in parts), has_tokenizer=eos_id is not None)


# What is written


def _native_parts(model: ModelConfig, checkpoint: Path, dtype: torch.dtype) -> list[Part]:
    reader = TensorReader(checkpoint)
    read = functools.lru_cache(maxsize=1)(reader.read)  # query, key and value are parts of one tensor

    def part(tensor: HFTensor) -> Part:
        return Part(tensor.name, tensor.shape, dtype, lambda: tensor.cut_from(read(MODEL + tensor.native)))

    return [part(tensor) for tensor in hf_tensors(model)]


def _hugging_face_parts(model: ModelConfig, checkpoint: Path, dtype: torch.dtype) -> list[Part]:
    """Return the tensors of a transformers model: parameters from the checkpoint, stored buffers as the run had them."""
    reader = TensorReader(checkpoint)
    keys = [key for key in reader.records if key.startswith(MODEL)]
    parts = [
        Part(
            key.removeprefix(f"{MODEL}causal_lm."),
            tuple(reader.records[key].shape),
            dtype,
            functools.partial(reader.read, key),
        )
        for key in keys
    ]
    with torch.device("meta"):
        causal_lm = build_model(model)
    stored = causal_lm.state_dict().keys()
    buffers = {name: buffer for name, buffer in causal_lm.named_buffers() if name in stored}
    if buffers and model.pretrained:
        initial_values(causal_lm, model, seed=0)  # reads the published buffers
    for name, buffer in buffers.items():
        kept = dtype if buffer.is_floating_point() else buffer.dtype
        parts.append(Part(name.removeprefix("causal_lm."), tuple(buffer.shape), kept, lambda buffer=buffer: buffer))
    return parts


def _config(model: ModelConfig, eos_id: int | None) -> dict[str, Any]:
    """Return the content of ``config.json`` without the dtype."""
    if model.kind is ModelKind.native:
        return hf_config(model) | {f"{role}_id": eos_id for role in ROLES}
    published = json.loads(read_hf_config(model.name).to_json_string())
    own = {} if eos_id is None else {f"{role}_id": eos_id for role in ROLES}
    return {key: value for key, value in published.items() if key != "dtype"} | own


def _eos_id(run: Path) -> int | None:
    """Return the id of the run's end-of-text token; None if its data were synthetic, without a tokenizer."""
    return read_index(run, check_sizes=False).tokenizer.eos_id if (run / TOKENIZER_FILE).is_file() else None


def _write_tokenizer(run: Path, directory: Path, eos_id: int, *, max_positions: int) -> None:
    tokens = dict.fromkeys(ROLES, load_tokenizer(run).id_to_token(eos_id))
    behaviour = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        # As in training, the name of a special token inside a text is text.
        "split_special_tokens": True,
    }
    shutil.copyfile(run / TOKENIZER_FILE, directory / TOKENIZER_FILE)
    _write_json(directory / "special_tokens_map.json", tokens)
    _write_json(directory / "tokenizer_config.json", tokens | behaviour)


# How it is written


def _write_weights(directory: Path, parts: list[Part], max_shard_bytes: int) -> None:
    shards = list(_shards(parts, max_shard_bytes))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(directory / name, shard)
    _write_json(
        directory / "model.safetensors.index.json",
        {
            "metadata": {"total_size": sum(part.num_bytes for part in parts)},
            "weight_map": {part.name: name for name, shard in zip(names, shards, strict=True) for part in shard},
        },
    )


def _shards(parts: list[Part], max_shard_bytes: int) -> Iterator[list[Part]]:
    """Cut the list of tensors into files."""
    shard: list[Part] = []
    for part in parts:
        if shard and sum(other.num_bytes for other in shard) + part.num_bytes > max_shard_bytes:
            yield shard
            shard = []
        shard.append(part)
    yield shard


def _write_safetensors(path: Path, parts: list[Part]) -> None:
    """Write one file tensor by tensor; the library's own writer would hold all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)  # every tensor begins at a multiple of its elements
    for part in parts:
        end = position + part.num_bytes
        header[part.name] = {"dtype": NAMES[part.dtype], "shape": part.shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for part in parts:
            tensor = part.load().to(part.dtype).contiguous()
            assert tuple(tensor.shape) == part.shape
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
