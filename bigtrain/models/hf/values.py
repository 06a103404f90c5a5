"""Initial values of Hugging Face models: their own rules, or their published files."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from bigtrain.config import ModelConfig
from bigtrain.log import get_logger
from bigtrain.models.construction import parameters_on_meta
from bigtrain.models.hf.build import build_hf_model
from bigtrain.models.hf.heads import HEADS, HFNetwork, PreTrainedModel, is_of_head
from bigtrain.models.hf.load import published
from bigtrain.models.init import Finite, Given, InitialValue, seed_of
from bigtrain.models.programs import built_whole, recorded_values, seeded


def published_values(model: HFNetwork, config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return every parameter's value from the safetensors files of ``config.name``, fresh ones of a head they lack."""
    in_head = partial(is_of_head, model.causal_lm) if HEADS[config.head].is_fresh else None
    found = published(model.causal_lm, config.name, setting="model.name", is_of_head=in_head)
    return _with_fresh(model, found, seed, f"model.name={config.name!r}")


def trunk_values(config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return values of which the trunk's are from the safetensors files of ``config.init_from``, others fresh."""
    with torch.device("meta"):
        model = build_hf_model(config)
    in_head = partial(is_of_head, model.causal_lm)
    found = published(model.causal_lm, config.init_from, setting="model.init_from", is_of_head=in_head)
    found = {name: value for name, value in found.items() if not in_head(name)}
    return _with_fresh(model, found, seed, f"model.init_from={config.init_from!r}")


def _with_fresh(model: HFNetwork, found: Mapping[str, InitialValue], seed: int, where: str) -> dict[str, InitialValue]:
    """Return values that were found in files, by transformers' names, and fresh ones of the other parameters."""
    own = {name: name.removeprefix("causal_lm.") for name, _ in model.named_parameters()}
    fresh = [name for name in own if own[name] not in found]
    if fresh:
        get_logger().info(f"{where}: fresh: {', '.join(own[name] for name in fresh)}")
    drawn = fresh_values(model, seed) if fresh else {}
    return {name: drawn[name] if name in fresh else Finite(found[own[name]], f"{where}: {own[name]}") for name in own}


def fresh_values(model: HFNetwork, seed: int) -> dict[str, InitialValue]:
    """Return values distributed like those that ``transformers`` would start from.

    Matrices are played back in parts (:mod:`bigtrain.models.programs`); all else, such as norms, biases and decay
    rates, is initialised in one piece.
    """
    from transformers.pytorch_utils import Conv1D

    programs = recorded_values(model, lambda: _initialise_as_transformers(model.causal_lm, model.causal_lm), seed)
    values, others = {}, {}
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            is_linear = isinstance(module, nn.Linear | nn.Embedding | Conv1D) and name == "weight"
            is_matrix = is_linear or (param.ndim >= 3 and not isinstance(module, nn.modules.conv._ConvNd))  # experts
            fqn = f"{prefix}.{name}"
            # Sinusoidal tables, without gradient, are not random.
            if param.requires_grad and is_matrix and fqn in programs:
                values[fqn] = programs[fqn]
            else:
                others[fqn] = module, name, param
    for module, name, param in others.values():
        setattr(module, name, nn.Parameter(torch.full(param.shape, math.nan, device="cpu")))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_of(seed, "transformers"))
        _initialise_as_transformers(model.causal_lm, model.causal_lm)
    drawn = {fqn: module.get_parameter(name).detach() for fqn, (module, name, _) in others.items()}
    for module, name, param in others.values():
        setattr(module, name, param)
    values |= {fqn: Given(value) for fqn, value in drawn.items()}
    if unsaid := [fqn for fqn, value in drawn.items() if value.isnan().any()]:
        values |= _constructed(model, unsaid, seed)
    return {name: values[name] for name, _ in model.named_parameters()}


def _constructed(model: HFNetwork, names: list[str], seed: int) -> dict[str, InitialValue]:
    """Return what constructors give to parameters that their initialisation leaves alone."""
    build = partial(type(model.causal_lm), model.causal_lm.config)
    most = max(model.get_parameter(name).numel() for name in names)
    with seeded(seed), parameters_on_meta(keep_elements=most) as constructed:
        again = build()
    own = {name.removeprefix("causal_lm."): name for name in names}
    found = {name: constructed.get(again.get_parameter(name)) for name in own}
    values: dict[str, InitialValue] = {name: Given(v.float()) for name, v in found.items() if v is not None}
    unknown = [name for name, v in found.items() if v is None or v.isnan().any()]
    if unknown:  # such as those of a parametrisation, which are computed from others
        values |= built_whole(build, unknown, seed, type(model.causal_lm).__name__)
    return {own[name]: value for name, value in values.items()}


def _initialise_as_transformers(module: nn.Module, owner: PreTrainedModel) -> None:
    """Let the innermost ``PreTrainedModel`` around each module initialise it, children first: parents overrule."""
    from transformers import PreTrainedModel

    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        _initialise_as_transformers(child, owner)
    owner._init_weights(module)
