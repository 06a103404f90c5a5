"""Export of transformers' models under the names that checkpoints on disk have.

transformers 5 renames and fuses tensors and settings in memory (the experts of a layer are one tensor, rotary settings
one section). Other programs, and older versions, know the names on disk.
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bigtrain.models.hf.heads import PreTrainedModel


@dataclass(frozen=True, slots=True)
class DiskTensors:
    """Tensors on disk that are made of some of the model's own, and of no others."""

    sources: tuple[str, ...]  # names in the model
    shapes: dict[str, tuple[int, ...]]  # shape of each tensor on disk, by its name there
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # from those of the model to those on disk, by name


def disk_tensors(model: PreTrainedModel, names: Iterable[str]) -> list[DiskTensors]:
    """Return what tensors of a ``PreTrainedModel`` become on disk, in as small groups as its conversion allows."""
    from transformers.core_model_loading import revert_weight_conversion

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return revert_weight_conversion(model, dict(tensors))

    own = model.state_dict(keep_vars=True)
    group_of: dict[str, list[str]] = {}
    for name in names:
        targets = convert({name: own[name]})
        groups = {id(group_of[target]): group_of[target] for target in targets if target in group_of}
        merged = [*(member for group in groups.values() for member in group), name]
        taken = [target for target, group in group_of.items() if id(group) in groups] if groups else []
        group_of |= dict.fromkeys([*taken, *targets], merged)
    found = []
    for group in {id(group): group for group in group_of.values()}.values():
        shapes = {name: tuple(t.shape) for name, t in convert({name: own[name] for name in group}).items()}
        found.append(DiskTensors(tuple(group), shapes, convert))
    return found


def disk_config(published: Mapping[str, Any], *, architecture: str, dtype: str) -> dict[str, Any]:
    """Return the content of ``config.json`` for a model that was trained from one with ``published``.

    Dropped are quantisation and references to code; older forms of rotary settings are added. ``architecture`` is the
    class of the model, ``dtype`` that of the weights, as ``float32``.
    """
    config = _with_older_names(published)
    if _rope_as_read(config) != _rope_as_read(published):
        # An architecture that transformers 4 does not know; 5 takes the older form for another.
        config = dict(published)
    config = _with_dtype(config, dtype)
    for key in ("quantization_config", "auto_map"):
        config.pop(key, None)
    return config | {"architectures": [architecture], "torch_dtype": dtype}


def _rope_as_read(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the rotary settings that transformers reads from a ``config.json``; None if it refuses it."""
    from transformers import AutoConfig

    def rope_of(section: Mapping[str, Any]) -> dict[str, Any]:
        inner = {key: rope_of(value) for key, value in section.items() if isinstance(value, dict)}
        own = {"rope_parameters": section["rope_parameters"]} if "rope_parameters" in section else {}
        return {key: value for key, value in inner.items() if value} | own

    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the older form
        (Path(directory) / "config.json").write_text(json.dumps(config))
        try:
            return rope_of(AutoConfig.from_pretrained(directory, trust_remote_code=False).to_dict())
        except Exception:  # its class may raise any exception
            return None


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    types = {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}
    sections = {key: _with_dtype(value, dtype) for key, value in config.items() if isinstance(value, dict)}
    return {**config, **sections, **types}


def _with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the names of transformers 4 for what transformers 5 renamed; existing keys stay."""
    config = {key: _with_older_names(value) if isinstance(value, dict) else value for key, value in config.items()}
    older = _older_rope(config["rope_parameters"], config) if isinstance(config.get("rope_parameters"), dict) else {}
    if config.get("model_type", "").startswith("qwen3") and "num_local_experts" in config:
        older["num_experts"] = config["num_local_experts"]
    return older | config


def _older_rope(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    local, rope = rope.get("sliding_attention") or {}, rope.get("full_attention") or rope
    older = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in older}
    names = _OLDER_NAMES.get(config.get("model_type", ""), {})
    older |= {name: rope[key] for key, name in names.items() if key in rope}
    if "rope_theta" in local:
        older["local_rope_theta" if names is _MODERNBERT else "rope_local_base_freq"] = local["rope_theta"]
    return older


_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_MODERNBERT = {"rope_theta": "global_rope_theta"}
# Names of transformers 4 that differ from those within ``rope_parameters``, by ``model_type``.
_OLDER_NAMES = {
    "gpt_neox": _NEOX,
    "gpt_neox_japanese": _NEOX,
    "modernbert": _MODERNBERT,
    "modernbert-decoder": _MODERNBERT,
}
