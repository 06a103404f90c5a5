"""Export of a checkpoint as a directory of transformers."""

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
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file

from bigtrain.checkpoint.loader import verify_checkpoint
from bigtrain.checkpoint.store import find_checkpoints, read_run_state, step_of
from bigtrain.config import (
    Head,
    ModelConfig,
    ModelKind,
    Precision,
    Quantisation,
    TaskConfig,
    TaskKind,
    TrainConfig,
    Verify,
)
from bigtrain.config.convert import from_dict
from bigtrain.config.tasks import OF_NEXT_TOKENS
from bigtrain.data.read.index import PUBLISHED_DIRECTORY, TokenizerRecord, check_file, read_index
from bigtrain.data.read.tokenizer import TOKENIZER_FILE, load_tokenizer, num_ids
from bigtrain.engine.state import MODEL
from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.files import sync, write_durably
from bigtrain.models.hf.build import build_hf_model
from bigtrain.models.hf.disk import disk_config, disk_tensors
from bigtrain.models.hf.files import published_directory
from bigtrain.models.hf.heads import PreTrainedModel
from bigtrain.models.hf.load import stored_buffers
from bigtrain.models.hf.native import HFTensor, hf_config, hf_tensors
from bigtrain.models.init import Newest
from bigtrain.run.collation import mask_id_of
from bigtrain.run.directory import DESCRIPTION_FILES, find_whole, label_names, own_model
from bigtrain.run.export_adapter import ADAPTER_CONFIG, MergedWeights, adapter_description, adapter_tensors
from bigtrain.run.frozen import AveragedWeights, MovingAverage, WeightReader
from bigtrain.run.quantise import quantise, require_quantisation

CONFIG, GENERATION = "config.json", "generation_config.json"
ROLES = ("bos_token", "eos_token", "pad_token")
MOVING = "moving"  # the average that the optimizer has kept
MASK_TOKEN = "[MASK]"
PREDICT_OF_DOCUMENTS = (TaskKind.classification, TaskKind.token_classification, TaskKind.regression)
OWN_ROLES = ("bos_token", "eos_token")  # of a tokenizer made by bigtrain: both are the end-of-text token
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # in the file
    load: Callable[[], torch.Tensor]  # in any floating-point dtype


@dataclass(frozen=True, slots=True)
class Exported:
    checkpoint: Path  # the source
    averaged: list[Path]  # those whose mean it is, with more than one
    num_parameters: int  # elements of all tensors
    has_tokenizer: bool  # false for synthetic data
    losses: list[float]  # on held-out text, before and after it was quantised


def export(
    path: Path,
    out: Path,
    *,
    precision: Precision,
    max_shard_bytes: int,
    merge: bool = True,
    average: int | str = 1,
    quantised: Quantisation | None = None,
) -> Exported:
    """Write a run, or one of its checkpoints, as ``out`` for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    A published tokenizer and the configuration of a Hugging Face model are copied byte for byte where the run has not
    changed them; a tokenizer of bigtrain's encodes as in training. ``out`` appears when it is complete; its files of
    weights have at most ``max_shard_bytes``, unless a single tensor has more. Adapters are merged into the weights or, without
    ``merge``, written alone, for peft. Weights are the means of ``average`` checkpoints, up to this one, or its :data:`MOVING` average; those of linear
    layers are ``quantised``. CheckpointError: no checkpoint verifies. ConfigError: transformers has no such model, or
    ``out`` exists or cannot be written.
    """
    if precision not in DTYPES:
        raise ConfigError(f"dtype={precision.name}: weights are written in {' or '.join(p.name for p in DTYPES)}")
    if out.exists():
        raise ConfigError(f"out={out} exists; nothing is overwritten: choose another name, or remove it")
    run, checkpoint = find_whole(path)
    state = read_run_state(checkpoint)
    config = from_dict(TrainConfig, state.config)
    model, dtype = own_model(config.model, run), DTYPES[precision]
    if model.kind is ModelKind.own:
        raise ConfigError(
            f"model.name={model.name}: transformers has no such model; bigtrain/checkpoint/dcp.py lets any program load it"
        )
    tokenizer = read_index(run, check_sizes=False).tokenizer if (run / TOKENIZER_FILE).is_file() else None
    if quantised:
        require_quantisation(quantised)
        if config.task.kind not in OF_NEXT_TOKENS or not merge:
            raise ConfigError(f"quantise={quantised.name}: is for whole causal language models; leave it out")
    averaged = _newest(checkpoint, int(average)) if average not in (1, "1", MOVING) else []
    reader = MovingAverage(checkpoint) if average == MOVING else AveragedWeights(averaged or [checkpoint])
    if merge:
        describe = _native if model.kind is ModelKind.native else _hugging_face
        whole = MergedWeights(reader, model) if model.adapter else reader
        parts, descriptions = describe(config, run, whole, dtype, tokenizer)
    elif model.adapter:
        tensors = adapter_tensors(reader, model)
        parts = [Part(name, tuple(t.shape), dtype, functools.partial(tensors.get, name)) for name, t in tensors.items()]
        descriptions = {ADAPTER_CONFIG: _json(adapter_description(tensors, model, state.origin))}
    else:
        raise ConfigError(f"merge=false: {run} has no adapters to write alone; leave it out")
    partial = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        for name, content in descriptions.items():
            write_durably(partial / name, [memoryview(content)])
        _write_weights(partial, parts, max_shard_bytes, "model" if merge else "adapter_model")
        if tokenizer:
            write_tokenizer(run, partial, tokenizer, config)
        losses = quantise(checkpoint, partial, quantised, max_shard_bytes) if quantised else []
        sync(partial)
        os.rename(partial, out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"out={out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    num_parameters = sum(math.prod(part.shape) for part in parts)
    return Exported(checkpoint, averaged, num_parameters, has_tokenizer=tokenizer is not None, losses=losses)


def _newest(checkpoint: Path, count: int) -> list[Path]:
    """Return a checkpoint behind the ``count - 1`` before it; ConfigError if there are fewer, CheckpointError if damaged."""
    run, others = checkpoint.parent.parent, []
    if count > 1:
        others = [other for other in find_checkpoints(run) if step_of(other) < step_of(checkpoint)][1 - count :]
    if len(others) < count - 1:
        have = f"{run} has {len(others)} before {checkpoint.name}"
        raise ConfigError(f"average={count}: {have}; checkpoint.keep=all, or latest {count}, keeps them")
    if problems := [problem for other in others for problem in verify_checkpoint(other, Verify.full)]:
        raise CheckpointError("\n  ".join([f"average={count}: not all of them are whole:", *problems]))
    return [*others, checkpoint]


def _native(
    run_config: TrainConfig,
    run: Path,
    reader: WeightReader | MergedWeights,
    dtype: torch.dtype,
    tokenizer: TokenizerRecord | None,
) -> tuple[list[Part], dict[str, bytes]]:
    read = Newest(reader.read)  # query, key and value are parts of one tensor

    def part(tensor: HFTensor) -> Part:
        return Part(tensor.name, tensor.shape, dtype, lambda: tensor.cut_from(read(MODEL + tensor.native)))

    ids = _token_ids(run, tokenizer)
    config = hf_config(run_config.model) | ids | {"torch_dtype": _name(dtype)}
    return [part(tensor) for tensor in hf_tensors(run_config.model)], {CONFIG: _json(config), GENERATION: _json(ids)}


def _hugging_face(
    run_config: TrainConfig,
    run: Path,
    reader: WeightReader | MergedWeights,
    dtype: torch.dtype,
    tokenizer: TokenizerRecord | None,
) -> tuple[list[Part], dict[str, bytes]]:
    """Return the tensors of a transformers model and the files that describe it, as they are on disk."""
    own = own_model(run_config.model, run)
    with torch.device("meta"):
        network = build_hf_model(own).causal_lm
    published = published_directory(own.name, list(DESCRIPTION_FILES))
    files = {name: (published / name).read_bytes() for name in DESCRIPTION_FILES if (published / name).is_file()}
    config = disk_config(json.loads(files[CONFIG]), architecture=type(network).__name__, dtype=_name(dtype))
    if tokenizer and os.path.realpath(tokenizer.name) != os.path.realpath(str(run_config.model.name)):
        ids = _token_ids(run, tokenizer)
        config = _with_ids(config, ids)
        if GENERATION in files:
            files[GENERATION] = _json(_with_ids(json.loads(files[GENERATION]), ids))
    config |= _of_labels(own, run_config.task, label_names(run))
    if own.head is Head.sequence_classification:  # before which one that reads the last token looks for it
        config["pad_token_id"] = network.config.get_text_config().pad_token_id
    files[CONFIG] = _json(config)
    return list(_disk_parts(network, reader, dtype)), files


def _of_labels(model: ModelConfig, task: TaskConfig, names: list[str]) -> dict[str, Any]:
    """Return what a ``config.json`` says of the labels or values that a model predicts."""
    if model.num_outputs is None:
        return {}
    labels = names if len(names) == model.num_outputs else [f"LABEL_{label}" for label in range(model.num_outputs)]
    described = {"id2label": dict(enumerate(labels)), "label2id": {name: label for label, name in enumerate(labels)}}
    kind = "multi_label_classification" if task.multi_label else "single_label_classification"
    is_number = task.kind in (TaskKind.regression, TaskKind.reward)
    return described | {"problem_type": "regression" if is_number else kind}


def _disk_parts(network: PreTrainedModel, reader: WeightReader | MergedWeights, dtype: torch.dtype) -> Iterator[Part]:
    """Yield the tensors of a transformers model: parameters from the checkpoint, stored buffers as the run had them."""
    prefix = f"{MODEL}causal_lm."
    parameters = [key.removeprefix(prefix) for key in reader.keys if key.startswith(prefix)]
    buffers = dict(stored_buffers(network))
    groups = disk_tensors(network, [*parameters, *buffers])

    def read(number: int) -> dict[str, torch.Tensor]:
        names = groups[number].sources
        return groups[number].convert({n: buffers[n] if n in buffers else reader.read(prefix + n) for n in names})

    made = Newest(read)  # the experts of a layer are parts of one tensor
    # Buffers stay what they are: programs that compute in bf16 keep them apart for their precision.
    for number, group in enumerate(groups):
        kept = next((buffers[name].dtype for name in group.sources if name in buffers), dtype)
        for name, shape in group.shapes.items():
            yield Part(name, shape, kept, functools.partial(lambda number, name: made(number)[name], number, name))


def _token_ids(run: Path, tokenizer: TokenizerRecord | None) -> dict[str, int | None]:
    """Return the tokenizer's ids of BOS, EOS and padding; None where it has none."""
    if tokenizer is None:
        return {f"{role}_id": None for role in ROLES}
    own = dict.fromkeys(OWN_ROLES, load_tokenizer(run).id_to_token(tokenizer.eos_id))
    roles = _published_roles(run) if tokenizer.published else own
    ids = {f"{role}_id": load_tokenizer(run).token_to_id(roles.get(role) or "") for role in ROLES}
    return ids | {"eos_token_id": tokenizer.eos_id}


def _published_roles(run: Path) -> dict[str, str]:
    roles: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = run / PUBLISHED_DIRECTORY / name
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        contents = {role: token["content"] if isinstance(token, dict) else token for role, token in told.items()}
        roles |= {role: contents[role] for role in ROLES if isinstance(contents.get(role), str)}
    return roles


def _with_ids(described: dict[str, Any], ids: dict[str, int | None]) -> dict[str, Any]:
    """Return ``described`` with the ids of another tokenizer, except where it has none or a list has it already."""

    def fits(name: str) -> bool:
        told = described.get(name)
        return ids[name] in (None, *(told if isinstance(told, list) else [told]))

    return described | {name: value for name, value in ids.items() if not fits(name)}


def write_tokenizer(run: Path, directory: Path, tokenizer: TokenizerRecord, config: TrainConfig) -> None:
    """Write a run's tokenizer into a directory, from which ``AutoTokenizer`` loads it."""
    if tokenizer.published:
        for file in tokenizer.published:
            check_file(run, file)
            copy = directory / Path(file.name).relative_to(PUBLISHED_DIRECTORY)
            copy.parent.mkdir(exist_ok=True)
            write_durably(copy, [memoryview((run / file.name).read_bytes())])
        return
    tokens = dict.fromkeys(OWN_ROLES, load_tokenizer(run).id_to_token(tokenizer.eos_id))
    behaviour = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.model.max_positions,
        "clean_up_tokenization_spaces": False,
        # As in training, the name of a special token inside a text is text.
        "split_special_tokens": True,
    }
    shutil.copyfile(run / TOKENIZER_FILE, directory / TOKENIZER_FILE)
    if config.task.kind in PREDICT_OF_DOCUMENTS:
        _open_documents(run, directory, tokenizer.eos_id)
    if config.task.kind == TaskKind.masked_lm:
        tokens["mask_token"] = _add_mask_token(run, directory, config)
    for name, content in (("special_tokens_map.json", tokens), ("tokenizer_config.json", tokens | behaviour)):
        write_durably(directory / name, [memoryview(_json(content))])


def _open_documents(run: Path, directory: Path, eos_id: int) -> None:
    """Let the exported tokenizer begin a text with the end-of-text token, as documents begin in training."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(run)
    name = tokenizer.id_to_token(eos_id)
    tokenizer.post_processor = TemplateProcessing(single=f"{name} $A", special_tokens=[(name, eos_id)])
    tokenizer.save(str(directory / TOKENIZER_FILE))


def _add_mask_token(run: Path, directory: Path, config: TrainConfig) -> str | None:
    """Return the name of the token that stands for a hidden one, which the exported tokenizer has from now on."""
    tokenizer = load_tokenizer(run)
    mask_id = mask_id_of(config, tokenizer, run)
    if mask_id == num_ids(tokenizer):  # the id behind the others, which training used
        tokenizer.add_special_tokens([MASK_TOKEN])
        tokenizer.save(str(directory / TOKENIZER_FILE))
    return tokenizer.id_to_token(mask_id)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_weights(directory: Path, parts: list[Part], max_shard_bytes: int, name: str) -> None:
    """Write the tensors, a file at a time, into files with the names that transformers gives those of ``name``."""
    by_name = {part.name: part for part in parts}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda part: math.prod(part.shape) * part.dtype.itemsize,
        filename_pattern=f"{name}{{suffix}}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {key: by_name[key].load().to(by_name[key].dtype, copy=True).contiguous() for key in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        sync(directory / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_durably(directory / f"{name}.safetensors.index.json", [memoryview(_json(index))])


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
