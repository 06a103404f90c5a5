"""Any model of transformers; language models stand behind the interface of the native one.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config import Head, ModelConfig
from bigtrain.config.convert import nearest
from bigtrain.errors import ConfigError, first_line, some
from bigtrain.files import write_anew
from bigtrain.log import quiet_torchao
from bigtrain.models.construction import (
    freeze_batch_statistics,
    outermost_lists,
    parameters_on_meta,
    refuse_batch_statistics,
)
from bigtrain.models.hf.files import refuse_adapter, unreadable
from bigtrain.models.hf.heads import HEADS, HFNetwork, PreTrainedModel, prepare_config
from bigtrain.models.hf.load import read_buffers
from bigtrain.models.loss import sum_cross_entropy_of_logits
from bigtrain.models.sizes import hf_setting, is_language_model, native_shape

quiet_torchao()  # transformers imports it


@dataclass(slots=True)
class HFCache:
    """Holds the cache object that a ``transformers`` model makes for itself."""

    past_key_values: Any = None


class HFCausalLM(HFNetwork):
    """A language model of ``transformers``, called as ``model(tokens, targets)``."""

    def __init__(self, causal_lm: PreTrainedModel, head: Head = Head.causal_lm):
        super().__init__(causal_lm, head)
        self.max_positions: int | None = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
        self.takes_positions = "position_ids" in self.arguments

    @property
    def blocks(self) -> nn.ModuleList:
        """Decoder layers: the longest ``ModuleList`` with trainable parameters, not inside another as experts are."""
        lists = list(outermost_lists(self.causal_lm))
        trained = [modules for modules in lists if any(p.requires_grad for p in modules.parameters())]
        return max(trained or lists, key=len)

    def forward(  # type: ignore[override]  # language models are called alike, whatever they are from
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        *,
        cache: HFCache | None = None,
    ) -> Tensor:
        """Return logits ``(B, T, V)``, or the summed cross-entropy of ``targets_BT`` as an fp32 scalar.

        From positions, counted from 0 in each document, transformers derives a document mask if the architecture takes
        them.
        """
        given: dict[str, Any] = {"use_cache": cache is not None} if "use_cache" in self.arguments else {}
        if cache is not None:
            given["past_key_values"] = cache.past_key_values
        elif positions_BT is not None and self.takes_positions:
            given["position_ids"] = positions_BT
        output = self.causal_lm(input_ids=tokens_BT, **given)
        if cache is not None:
            cache.past_key_values = output.past_key_values
        return output.logits if targets_BT is None else sum_cross_entropy_of_logits(output.logits, targets_BT)

    def new_cache(self, capacity_tokens: int) -> HFCache | None:
        """Return an empty cache, which grows as needed, or None for a model without keys and values."""
        return HFCache() if "past_key_values" in self.arguments else None


def describe_architecture(config: ModelConfig, root: Path) -> str:
    """Write an architecture's ``config.json`` into a directory below ``root``; ConfigError: transformers refuses it."""
    from transformers import CONFIG_MAPPING

    architecture, settings = config.architecture, config.settings
    facts = json.dumps([architecture, settings], sort_keys=True)
    directory = root / f"{architecture}-{hashlib.blake2b(facts.encode(), digest_size=4).hexdigest()}"
    if config.name and Path(config.name) != directory:
        raise ConfigError(f"model.architecture={architecture} and model.name={config.name}: write one of them")
    if architecture not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.architecture={architecture}: unknown; {nearest(architecture, sorted(CONFIG_MAPPING))}"
        )
    kind = CONFIG_MAPPING[architecture]
    known = {*kind().to_dict(), *kind.attribute_map, *inspect.signature(kind.__init__).parameters} - {"self", "kwargs"}
    if unknown := [key for key in settings if key not in known]:
        told = (f"model.settings.{key}: unknown; {nearest(key, sorted(known))}" for key in unknown)
        raise ConfigError("\n".join(told))
    try:
        text = kind(**settings).to_json_string(use_diff=False)
    except Exception as error:  # their checks raise any exception
        raise ConfigError(f"model.settings: {architecture} does not take them: {_reason(error)}") from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_anew(directory / "config.json", text)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error}; choose another data.root") from error
    return str(directory)


def with_hf_shape(config: ModelConfig) -> ModelConfig:
    """Return ``config`` with the shape of the Hugging Face model; ConfigError if it cannot be read."""
    hf_config = read_hf_config(config.name)
    text = hf_config.get_text_config()
    if not HEADS[config.head].has_vocabulary:
        return config
    if not getattr(text, "vocab_size", 0):
        raise ConfigError(
            f"model.name={config.name!r} ({hf_config.model_type}) has no vocabulary; choose a language model"
        )
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        if isinstance(value := hf_setting(text, key), int | float) and value < 1:
            raise ConfigError(f"model.name={config.name!r}: {key}={value} in its config.json: must be at least 1")
    shape = native_shape(text)
    names = ("vocab_size", "num_layers", "hidden_dim", "num_heads", "num_kv_heads", "head_dim", "max_positions")
    # Of a mixture of experts, unlike the shape that activations are counted from, the width of one.
    ffn_dim = hf_setting(text, "intermediate_size") or hf_setting(text, "n_inner") or 4 * shape.hidden_dim
    return dataclasses.replace(config, ffn_dim=ffn_dim, **{name: getattr(shape, name) for name in names})


def read_hf_config(name: str | None, *, setting: str = "model.name") -> Any:
    """Return the transformers configuration of a hub id or directory; ConfigError names the ``setting``."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a config.json holds anything, and their checks raise any exception
        refuse_adapter(Path(str(name)))
        if has_own_code(name):
            raise ConfigError(
                f"{setting}={name!r} needs code of its own (auto_map in its config.json), and code that comes with a model "
                "is never run here; choose an architecture that transformers has"
            ) from error
        if (path := Path(str(name), "config.json")).is_file():
            raise ConfigError(
                f"{path} is not read by transformers: {_reason(error)}; correct it or copy it again"
            ) from error
        raise ConfigError(unreadable(name, error, setting=setting)) from error


def has_own_code(name: str) -> bool:
    """Return whether the description of a model names code that comes with it; False if there is none."""
    from transformers import PreTrainedConfig

    try:
        return "auto_map" in PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError):
        return False


def build_hf_model(config: ModelConfig) -> HFNetwork:
    """Build the architecture of ``config.name``, with ``sdpa`` where it has it; ConfigError if none is for the task."""
    hf_config, head = read_hf_config(config.name), HEADS[config.head]
    try:
        causal_lm = build_causal_lm(hf_config, config.head, config.num_outputs)
    except Exception as error:  # constructors do not expect every configuration
        raise ConfigError(
            f"model.name={config.name!r} ({hf_config.model_type}) cannot be trained as a {head.what}: "
            f"{_reason(error)}; choose {head.architectures}, or correct its config.json"
        ) from error
    if config.freeze_batch_norm:
        freeze_batch_statistics(causal_lm)
    elif not is_language_model(config):
        advice = (
            "with trained weights set model.freeze_batch_norm=true; else choose convnext or vit, or +model=cnn_mnist"
        )
        refuse_batch_statistics(causal_lm, f"model.name={config.name!r}: ", advice)
    if config.pretrained:
        _require_labels(causal_lm, config)
    if config.pretrained or config.freeze_batch_norm:
        with torch.device("cpu"):
            read_buffers(causal_lm, config)
    return (HFCausalLM if is_language_model(config) else HFNetwork)(causal_lm, config.head)


def _require_labels(network: nn.Module, config: ModelConfig) -> None:
    """Refuse published weights of this very class with another number of labels."""
    published = read_hf_config(config.name)
    if config.num_outputs is None or type(network).__name__ not in (published.architectures or []):
        return
    if published.num_labels != config.num_outputs:
        names, trunk = published_labels(config), f"model.init_from={config.name} without model.pretrained"
        ways = f"set task.num_labels={published.num_labels}, or keep its trunk alone: {trunk}"
        raise ConfigError(
            f"model.name={config.name!r} has {published.num_labels} labels ({some(names, 6) or 'without names'}), but the "
            f"task has {config.num_outputs}; {ways if names else f'keep its trunk alone, with a fresh head: {trunk}'}"
        )


def published_labels(config: ModelConfig) -> list[str]:
    """Return the names of the labels of a published classifier, in their order; none if it is none, or has no names."""
    published = read_hf_config(config.name)
    if config.num_outputs is None or not any("Classification" in name for name in published.architectures or []):
        return []
    names = [str(name) for _, name in sorted(published.id2label.items())]
    return [] if names == [f"LABEL_{number}" for number in range(len(names))] else names


def build_causal_lm(hf_config: Any, head: Head = Head.causal_lm, num_outputs: int | None = None) -> PreTrainedModel:
    """Build the network of a transformers configuration; any exception if it has none, or none without other code."""
    import transformers

    auto = getattr(transformers, HEADS[head].auto)
    hf_config.use_cache = False
    hf_config.architectures = hf_config.architectures or []  # looked through where an architecture has several classes
    prepare_config(hf_config, head, num_outputs)
    if getattr(hf_config, "rescale_every", 0):
        hf_config.rescale_every = 0  # RWKV would rescale its weights in every evaluation, for fp16
    with parameters_on_meta() if torch.empty(0).is_meta else contextlib.nullcontext():
        return auto.from_config(hf_config, dtype=torch.float32, trust_remote_code=False)


def _reason(error: Exception) -> str:
    """Return an error in one line, with its type where the text alone says nothing (``KeyError: 'x'``)."""
    text = first_line(error.__cause__ or error)
    return text if isinstance(error, ValueError | ImportError | OSError) and text else f"{type(error).__name__}: {text}"
