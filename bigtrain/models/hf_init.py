"""Initial values of Hugging Face models: their own rules, or slices of their published files."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bigtrain.config import ModelConfig
from bigtrain.errors import ConfigError
from bigtrain.models.hf import HFCausalLM, unreadable
from bigtrain.models.init import Given, InitialValue, Normal, seed_of


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file, of which only the rows asked for are read."""

    path: Path
    key: str
    shape: tuple[int, ...]

    def fill(self, start: int, out: Tensor) -> None:
        """See :class:`InitialValue`."""
        from safetensors import safe_open

        stop, row = start + out.numel(), math.prod(self.shape[1:])
        with safe_open(self.path, framework="pt", device="cpu") as file:
            first = start // row
            rows = file.get_slice(self.key)[first : -(-stop // row)] if self.shape else file.get_tensor(self.key)
            out.copy_(rows.flatten()[start - first * row : stop - first * row])


def published_values(model: HFCausalLM, config: ModelConfig) -> dict[str, InitialValue]:
    """Return every parameter's place in the safetensors files of ``config.name``.

    Buffers that are stored with the weights are read at once: they are small, and in memory already.

    Raises:
        ConfigError: if there are no such files, or a parameter is missing in them or has another shape.
    """
    stored = stored_tensors(config.name)
    base = model.causal_lm.base_model_prefix + "."
    aliases: dict[int, list[str]] = {}
    for name, param in model.causal_lm.named_parameters(remove_duplicate=False):
        # Files of the bare decoder, such as gpt2's, leave its prefix out.
        aliases.setdefault(id(param), []).extend([name, name.removeprefix(base), base + name])
    values, problems = {}, []
    for name, param in model.named_parameters():
        found = next((stored[alias] for alias in aliases[id(param)] if alias in stored), None)
        if found is None:
            problems.append(f"{name} is not in the files")
        elif found.shape != tuple(param.shape):
            problems.append(f"{name} is {found.shape} in the files and {tuple(param.shape)} in the model")
        else:
            values[name] = found
    if problems:
        raise ConfigError(
            f"model.name={config.name!r}: {len(problems)} parameters do not fit the published weights, first: "
            f"{problems[0]}; if transformers converts this architecture while loading, load it there once, "
            "call save_pretrained(<directory>, save_original_format=False) and give that directory"
        )
    _read_buffers(model, stored)
    return values


def fresh_values(model: HFCausalLM, seed: int) -> dict[str, InitialValue]:
    """Return values distributed like those that ``transformers`` would start from.

    Matrices are normal with the architecture's ``initializer_range`` (which is nearly, not quite, what
    state-space layers do); all else, such as norms, biases and decay rates, is what the model's own
    initialisation code makes of it.
    """
    std = getattr(model.causal_lm.config.get_text_config(), "initializer_range", None) or 0.02
    matrices, others = set(), []
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if _is_matrix(module, name, param):
                matrices.add(f"{prefix}.{name}")
            else:
                others.append((module, f"{prefix}.{name}"))
    values: dict[str, InitialValue] = _own_values(model, others, seed)
    for name in matrices:
        values[name] = Normal(std * _residual_scale(model, name), seed, name)
    return {name: values[name] for name, _ in model.named_parameters()}


def _is_matrix(module: nn.Module, name: str, param: nn.Parameter) -> bool:
    from transformers.pytorch_utils import Conv1D

    linear = isinstance(module, nn.Linear | nn.Embedding | Conv1D) and name == "weight"
    fused_experts = param.ndim >= 3 and not isinstance(module, nn.modules.conv._ConvNd)
    return linear or fused_experts


def _residual_scale(model: HFCausalLM, name: str) -> float:
    """Return the factor by which GPT-2 and its kin, alone in using this name, shrink residual outputs."""
    return 1 / math.sqrt(2 * len(model.blocks)) if name.endswith(".c_proj.weight") else 1.0


def _own_values(model: HFCausalLM, owned: list[tuple[nn.Module, str]], seed: int) -> dict[str, InitialValue]:
    """Run the model's own initialisation with real memory for the given parameters (of given modules)."""
    meta = {fqn: module.get_parameter(fqn.rpartition(".")[2]) for module, fqn in owned}
    for module, fqn in owned:
        real = nn.Parameter(torch.full(meta[fqn].shape, math.nan, device="cpu"))
        setattr(module, fqn.rpartition(".")[2], real)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_of(seed, "transformers"))
        _initialise_as_transformers(model.causal_lm, model.causal_lm)
    values: dict[str, InitialValue] = {fqn: Given(model.get_parameter(fqn).detach()) for fqn in meta}
    for module, fqn in owned:
        setattr(module, fqn.rpartition(".")[2], meta[fqn])
    for fqn, value in values.items():
        assert not value.values.isnan().any(), f"transformers does not say what {fqn} starts from"
    return values


def _initialise_as_transformers(module: nn.Module, owner: nn.Module) -> None:
    """Let the innermost ``PreTrainedModel`` around each module initialise it, children first: parents overrule."""
    from transformers import PreTrainedModel

    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        _initialise_as_transformers(child, owner)
    owner._init_weights(module)


def _read_buffers(model: HFCausalLM, stored: dict[str, StoredTensor]) -> None:
    for name, buffer in model.causal_lm.named_buffers():
        if name in stored:
            flat = torch.empty(buffer.numel(), dtype=torch.float32, device="cpu")
            stored[name].fill(0, flat)
            buffer.copy_(flat.view(buffer.shape))


def stored_tensors(name: str, *, setting: str = "model.name") -> dict[str, StoredTensor]:
    """Return every tensor in the safetensors files of ``name``, a hub id or a local directory.

    Raises:
        ConfigError: if there are no such files; it names the ``setting`` that the name is from.
    """
    from safetensors import safe_open

    stored = {}
    for path in _weight_files(_weights_directory(name, setting)):
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                stored[key] = StoredTensor(path, key, tuple(file.get_slice(key).get_shape()))
    return stored


def _weights_directory(name: str, setting: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["model*.safetensors", "model*.safetensors.index.json"]))
    except (OSError, ValueError) as error:
        raise ConfigError(unreadable(name, error, setting=setting)) from error


def _weight_files(directory: Path) -> Iterator[Path]:
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if not (directory / name).exists():
            raise ConfigError(
                f"{directory} has no {name}; only safetensors files are read: "
                "load the model with transformers and call save_pretrained(<directory>) to make them"
            )
        yield directory / name
