"""Initial values of the native model from the files of a GPT-2 or Llama."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config import ModelConfig
from bigtrain.errors import ConfigError
from bigtrain.models.hf.build import build_causal_lm, read_hf_config
from bigtrain.models.hf.files import StoredTensor
from bigtrain.models.hf.load import published
from bigtrain.models.hf.native import HFTensor, described, hf_config, hf_tensors
from bigtrain.models.init import Finite, InitialValue


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix stored transposed, of which only the part asked for is read."""

    stored: StoredTensor

    def fill(self, start: int, out: Tensor) -> None:
        from safetensors import safe_open

        stop, row = start + out.numel(), self.stored.shape[0]
        first = start // row
        with safe_open(self.stored.path, framework="pt", device="cpu") as file:
            columns = file.get_slice(self.stored.key)[:, first : -(-stop // row)]
            out.copy_(columns.t().flatten()[start - first * row : stop - first * row])


@dataclass(frozen=True, slots=True)
class Stacked:
    """Tensors concatenated along their rows."""

    parts: tuple[StoredTensor, ...]

    def fill(self, start: int, out: Tensor) -> None:
        begin, stop = 0, start + out.numel()
        for part in self.parts:
            end = begin + math.prod(part.shape)
            low, high = max(start, begin), min(stop, end)
            if low < high:
                part.fill(low - begin, out[low - start : high - start])
            begin = end


def imported_values(model: nn.Module, config: ModelConfig) -> dict[str, InitialValue]:
    """Return every parameter's value from the safetensors files of ``config.init_from``.

    Raises:
        ConfigError: the files cannot be had, or are of another model; lists the differences.
    """
    with torch.device("meta"):
        causal_lm = build_causal_lm(_same_model(config))
    stored = published(causal_lm, config.init_from, setting="model.init_from")
    parts: dict[str, list[HFTensor]] = {}
    for tensor in hf_tensors(config):
        parts.setdefault(tensor.native, []).append(tensor)
    return {name: _value(parts[name], stored, config) for name, _ in model.named_parameters()}


def _value(tensors: list[HFTensor], stored: dict[str, StoredTensor], config: ModelConfig) -> InitialValue:
    names = [tensor.name for tensor in tensors]
    first = Transposed(stored[names[0]]) if tensors[0].is_transposed else stored[names[0]]
    value = Stacked(tuple(stored[name] for name in names)) if len(names) > 1 else first
    return Finite(value, f"model.init_from={config.init_from!r}: {' or '.join(names)}")


def _same_model(config: ModelConfig) -> Any:
    """Return the model's transformers configuration after comparing it with that of ``config.init_from``.

    Shapes alone would let another rotary base or norm pass.
    """
    from transformers import AutoConfig

    wanted = AutoConfig.for_model(**hf_config(config))
    found = read_hf_config(config.init_from, setting="model.init_from")
    if found.model_type != wanted.model_type:
        raise ConfigError(
            f"model.init_from={config.init_from!r} is a {found.model_type}, but these settings are a "
            f"{wanted.model_type}; choose a model preset of that architecture, or +model=hf "
            f"model.name={config.init_from} model.pretrained=true"
        )
    there, here = described(found), described(wanted)
    if problems := [f"model.{key}: {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]]:
        raise ConfigError(f"model.init_from={config.init_from!r} is another model:\n  " + "\n  ".join(problems))
    return wanted
