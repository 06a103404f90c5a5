"""Export of a run's adapters alone, in the form of peft, beside the base that they were trained on."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bigtrain.checkpoint.store import Origin
from bigtrain.config import AdapterConfig, Head, ModelConfig, ModelKind
from bigtrain.engine.state import MODEL
from bigtrain.errors import ConfigError
from bigtrain.models import build_model
from bigtrain.models.adapters import adapted_modules, bare, is_of_adapter, merged, peft_config
from bigtrain.models.freeze import frozen_names
from bigtrain.models.hf.native import Family, family_of, hf_tensors
from bigtrain.run.frozen import WeightReader

ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_TASKS = {
    Head.causal_lm: "CAUSAL_LM",
    Head.sequence_classification: "SEQ_CLS",
    Head.token_classification: "TOKEN_CLS",
    Head.seq2seq_lm: "SEQ_2_SEQ_LM",
}


class MergedWeights:
    """Whole weights of a checkpoint, with its adapters merged into them."""

    def __init__(self, reader: WeightReader, model: ModelConfig) -> None:
        self._reader = reader
        with torch.device("meta"):
            self._network = build_model(
                dataclasses.replace(model, adapter=dataclasses.replace(model.adapter, nf4=False))
            )
        self.keys = [key for key in reader.keys if not is_of_adapter(key)]

    def read(self, key: str) -> torch.Tensor:
        return merged(self._network, key.removeprefix(MODEL), lambda name: self._reader.read(MODEL + name))


def adapter_tensors(reader: WeightReader, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Return the tensors of peft's file: factors and magnitudes, and what else was trained, by their names there."""
    names = [key.removeprefix(MODEL) for key in reader.keys if key.startswith(MODEL)]
    frozen = set(frozen_names(names, model))
    trained = {name: reader.read(MODEL + name) for name in names if name not in frozen}
    found = dict(_as_published(trained, model))
    found |= {name: found[first] for name, first in _tied(model) if first in found}  # peft would part them
    return {_PREFIX + _in_file(name): tensor for name, tensor in found.items()}


def _tied(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield further names in transformers of parameters, each with the one that a checkpoint has."""
    if model.kind is ModelKind.native:
        if model.tie_embeddings:
            yield "lm_head.weight", next(t.name for t in hf_tensors(model) if t.native == "embed_tokens.weight")
        return
    with torch.device("meta"):
        network = build_model(dataclasses.replace(model, adapter=None))
    first = dict[int, str]()
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(id(parameter), name)) != name:
            yield bare(name), bare(known)


def _in_file(name: str) -> str:
    is_magnitude = ".lora_magnitude_vector." in name
    return name.replace(".default.weight", "" if is_magnitude else ".weight") if is_of_adapter(name) else name


def _as_published(trained: Mapping[str, torch.Tensor], model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield trained tensors under the names of transformers; stacked native projections share their first factor."""
    if model.kind is ModelKind.hf:
        yield from ((name.removeprefix("causal_lm."), tensor) for name, tensor in trained.items())
        return
    for published in hf_tensors(model):
        if published.native in trained:
            yield published.name, published.cut_from(trained[published.native])
        layer = f"{published.native.removesuffix('.weight')}.lora_"
        for name, tensor in trained.items():
            if name.startswith(layer) and published.native.endswith(".weight"):
                num_outputs = published.shape[1 if published.is_transposed else 0]
                rows = slice(published.first_row, published.first_row + num_outputs)
                suffix = name.removeprefix(layer)
                yield (
                    f"{published.name.removesuffix('.weight')}.lora_{suffix}",
                    tensor if suffix.startswith("A.") else tensor[rows],
                )


def _linear_layers(model: ModelConfig) -> list[str]:
    """Return the names in transformers of all linear layers of the base."""
    if model.kind is ModelKind.hf:
        with torch.device("meta"):
            network = build_model(dataclasses.replace(model, adapter=None))
        return [bare(name) for name in adapted_modules(network, AdapterConfig(targets=["*"]))]
    matrices = [tensor.name for tensor in hf_tensors(model) if len(tensor.shape) == 2]
    return [name.removesuffix(".weight") for name in matrices]


def adapter_description(
    tensors: Mapping[str, torch.Tensor], model: ModelConfig, origin: Origin | None
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for ``tensors`` of :func:`adapter_tensors` and the run's origin.

    ConfigError: a layer and its adapter are both trained.
    """
    layers = sorted({name.removeprefix(_PREFIX).partition(".lora_")[0] for name in tensors if is_of_adapter(name)})
    others = sorted({name.removeprefix(_PREFIX).rpartition(".")[0] for name in tensors if not is_of_adapter(name)})
    if both := set(layers) & set(others):
        problem = f"merge=false: model.adapter.also_train has changed {min(both)} itself, beside its adapter"
        raise ConfigError(f"{problem}, and peft holds one of the two; leave merge=false out")
    last = sorted({layer.rpartition(".")[2] for layer in layers})
    covers = all(layer in layers for layer in _linear_layers(model) if layer.rpartition(".")[2] in last)
    described = peft_config(model.adapter, layers).to_dict() | {
        "target_modules": last if covers else layers,
        "modules_to_save": others or None,
        "fan_in_fan_out": model.kind is ModelKind.native and family_of(model) is Family.gpt2,
        "base_model_name_or_path": (origin and (origin.published or origin.checkpoint)) or model.name,
        "task_type": _TASKS.get(model.head),
        "inference_mode": True,
    }
    return {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}
