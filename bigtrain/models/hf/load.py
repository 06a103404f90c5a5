"""Weights of transformers' models from their files, converted tensor by tensor as transformers does.

A tensor of the model is a tensor of the files, is made of several (the experts of a layer become one tensor), or is cut
out of one. Tensors of the files that the model has no use for are named.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config import ModelConfig
from bigtrain.errors import ConfigError, first_line, some
from bigtrain.log import get_logger
from bigtrain.models.hf.files import FLOATS, SHOWN, StoredTensor, stored_tensors, tensors_of
from bigtrain.models.hf.heads import HEADS, PreTrainedModel, is_of_head
from bigtrain.models.init import Newest

MODEL_DIRECTORY = "model"  # of a run, what describes its network
BUFFERS_FILE = "buffers.safetensors"  # in it, of the model that a run was started from; checkpoints hold parameters
CHUNK_ELEMENTS = 2**22  # elements of two tensors that are compared at a time


@dataclass(slots=True, eq=False)
class Conversion:
    """One application of one of transformers' conversions."""

    model: PreTrainedModel
    transform: Any  # a ``WeightConverter``
    target: str  # name in the model that its first tensor is for
    parts: list[tuple[str, StoredTensor]] = field(default_factory=list)  # patterns, and what they are for

    def run(self, read: Callable[[StoredTensor], Tensor]) -> dict[str, Tensor]:
        """Return tensors of the model by name."""
        transform = copy.deepcopy(self.transform)
        for pattern, stored in self.parts:
            transform.add_tensor(self.target, stored.key, pattern, read(stored))
        made = transform.convert(self.target, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


@dataclass(frozen=True, slots=True)
class Converted:
    """A tensor of the model that is made of tensors of the files; an :class:`InitialValue`."""

    conversion: Conversion
    name: str
    shape: tuple[int, ...]
    make: Callable[[Conversion], dict[str, Tensor]]
    key: str  # of one of the tensors of the files
    dtype: str

    def read(self) -> Tensor:
        return self.make(self.conversion)[self.name]

    def fill(self, start: int, out: Tensor) -> None:
        out.copy_(self.read().flatten()[start : start + out.numel()])


def published(
    model: PreTrainedModel, name: str, *, setting: str, is_of_head: Callable[[str], bool] | None = None
) -> dict[str, StoredTensor | Converted]:
    """Return the value of every parameter and stored buffer of ``model`` from the files of ``name``.

    ``name`` is a hub id or a local directory, from ``setting``; files may lack what ``is_of_head``, or have it for
    another task. ConfigError names the files or tensors that are missing, do not fit, or are of no use to the model.
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    where = f"{setting}={name!r}"
    if getattr(model.config, "quantization_config", None):
        raise ConfigError(
            f"{where}: its config.json has a quantization_config, and quantised weights cannot be trained; load the model "
            "with transformers and dequantize=True where its method has it, call save_pretrained(<directory>) and give that; of "
            "a run of bigtrain, export without quantise"
        )
    found, left = _assigned(model, stored_tensors(name, setting=setting), where)
    values: dict[str, StoredTensor | Converted] = {}
    problems: list[str] = []
    for names, tensor in _tensors(model).items():
        candidates = [found.pop(alias) for alias in names if alias in found]
        fits = bool(candidates) and candidates[0].shape == tuple(tensor.shape)
        if not fits and is_of_head and is_of_head(names[0]):
            continue
        problems += _problems(names[0], tensor, candidates)
        if candidates:
            values[names[0]] = candidates[0]
    left = [(target, tensor) for target, tensor in left if not _is_derived(tensor)]
    unused = {target for target, _ in left if not (is_of_head and is_of_head(target))}
    report = LoadStateDictInfo(set(), unused, set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(report)  # of which only what transformers would report stays
    useless = [tensor.key for target, tensor in left if target in report.unexpected_keys]
    useless += [other.key for other in found.values()]
    problems += [f"{key} is in the files, but the model of the config.json has no use for it" for key in useless]
    if problems:
        raise ConfigError(
            f"{where}: {len(problems)} tensors do not fit the published weights: {some(problems, SHOWN, '; ')}"
        )
    if ignored := [tensor.key for _, tensor in left]:
        get_logger().warning(
            f"{where}: {len(ignored)} tensors are left out, as transformers does: {some(ignored, SHOWN, '; ')}"
        )
    return values


def _tensors(model: nn.Module) -> dict[tuple[str, ...], Tensor]:
    """Return parameters and stored buffers by their names; tied parameters have several."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, buffer in stored_buffers(model):
        names[buffer] = [name]
    return {tuple(aliases): tensor for tensor, aliases in names.items()}


def stored_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that are stored with the weights."""
    kept = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _assigned(
    model: PreTrainedModel, stored: dict[str, StoredTensor], where: str
) -> tuple[dict[str, StoredTensor | Converted], list[tuple[str, StoredTensor]]]:
    """Return what transformers makes of the files by name in the model, and the files' tensors without a use."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping, expected = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, StoredTensor | Converted] = {}
    conversions: dict[str, Conversion] = {}
    left: list[tuple[str, StoredTensor]] = []
    for key in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and key in expected:
            target, pattern = key, None
        if target not in expected:
            left.append((target, stored[key]))
        elif pattern is not None:
            conversion = conversions.setdefault(target, Conversion(model, by_pattern[pattern], target))
            conversion.parts.append((pattern, stored[key]))
        elif target in found:
            raise ConfigError(
                f"{where}: {found[target].key} and {key} of the files are both {target}; remove one of them"
            )
        else:
            found[target] = stored[key]
    make = Newest[Conversion, dict[str, Tensor]](lambda conversion: conversion.run(StoredTensor.read))
    for conversion in conversions.values():
        found |= {converted.name: converted for converted in _converted(conversion, make, where)}
    return found, left


def _converted(
    conversion: Conversion, make: Callable[[Conversion], dict[str, Tensor]], where: str
) -> Iterator[Converted]:
    keys = [stored.key for _, stored in conversion.parts]
    odd = next((stored.dtype for _, stored in conversion.parts if stored.dtype not in FLOATS), FLOATS[0])
    try:
        made = conversion.run(lambda stored: torch.empty(stored.shape, device="meta"))
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{where}: transformers cannot make {conversion.target} of {some(keys, SHOWN, '; ')} ({first_line(error)})"
        ) from error
    for name, tensor in made.items():
        yield Converted(conversion, name, tuple(tensor.shape), make, keys[0], odd)


def _problems(name: str, tensor: Tensor, candidates: list[StoredTensor | Converted]) -> Iterator[str]:
    if not candidates and isinstance(tensor, nn.Parameter):
        yield f"{name} is not in the files"
    for candidate in candidates:
        if candidate.shape != tuple(tensor.shape):
            yield f"{name} is {candidate.shape} in the files, {tuple(tensor.shape)} in this model"
            return
        if tensor.is_floating_point() and candidate.dtype not in FLOATS:
            yield f"{candidate.key} is {candidate.dtype} in the files: quantised weights cannot be trained"
            return
    for candidate in candidates[1:]:
        if not _is_equal(candidates[0], candidate):
            yield (
                f"{candidates[0].key} and {candidate.key} differ in the files, but are one parameter here; "
                "set tie_word_embeddings=false in the config.json, or remove one of them"
            )


def _is_equal(a: StoredTensor | Converted, b: StoredTensor | Converted) -> bool:
    numel = torch.Size(a.shape).numel()
    for start in range(0, numel, CHUNK_ELEMENTS):
        ours, theirs = torch.empty(2, min(CHUNK_ELEMENTS, numel - start))
        a.fill(start, ours)
        b.fill(start, theirs)
        if not torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True):
            return False
    return True


def _is_derived(tensor: StoredTensor) -> bool:
    """Return whether a tensor is a computed table, as older versions stored them."""
    shape = tensor.shape
    is_mask = shape in ((), (1,)) or (len(shape) > 2 and shape[-1] == shape[-2] and set(shape[:-2]) == {1})
    if tensor.key.endswith(("attn.bias", "attention.bias", "masked_bias", "causal_mask")):
        return is_mask
    return tensor.key.endswith((".inv_freq", "position_ids"))


def read_buffers(model: PreTrainedModel, config: ModelConfig) -> None:
    """Fill the model's stored buffers from a run's file of them or published weights; raises as :func:`published`."""
    if buffers := dict(stored_buffers(model)):
        setting, origin = ("model.init_from", config.init_from) if config.init_from else ("model.name", config.name)
        kept = (Path(str(config.name), BUFFERS_FILE), Path(str(config.init_from), MODEL_DIRECTORY, BUFFERS_FILE))
        of_run = next(({tensor.key: tensor for tensor in tensors_of(path)} for path in kept if path.is_file()), None)
        in_head = functools.partial(is_of_head, model) if HEADS[config.head].is_fresh else None
        values = of_run or published(model, origin, setting=setting, is_of_head=in_head)
        for name in buffers.keys() & values.keys():
            flat = torch.empty(buffers[name].numel(), dtype=torch.float32)
            values[name].fill(0, flat)
            if flat.isnan().any():
                raise ConfigError(f"{setting}={origin!r}: {name} has numbers that are NaN; download it again")
            buffers[name].copy_(flat.view(buffers[name].shape))
