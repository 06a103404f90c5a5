"""Derived values, and every contradiction, of a configuration and a world; without torch, and before any process group."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from bigtrain.config import (
    PERPLEXITIES,
    WITHOUT_TEXT,
    DataConfig,
    ModelConfig,
    TrainConfig,
    are_records,
    component_data,
    is_live,
    own_sets,
    parts,
)
from bigtrain.config.bounds import out_of_bounds, without_effect
from bigtrain.config.choices import (
    Activation,
    AdapterKind,
    Content,
    DataSource,
    Duplicates,
    EngineKind,
    Load,
    ModelKind,
    Offload,
    OptimizerKind,
    Packing,
    Positions,
    Precision,
    TaskKind,
)
from bigtrain.config.convert import MAX_NAME_BYTES, nearest
from bigtrain.config.layout import data_ranks, data_ranks_of_node, layout_problems
from bigtrain.config.length import beyond_the_end, length_problems
from bigtrain.config.parallel import shared
from bigtrain.config.privacy import check_privacy
from bigtrain.config.sync import check_sync
from bigtrain.config.tasks import (
    OF_DOCUMENTS,
    SMALL_NETWORKS,
    WITHOUT_LENGTH,
    check_task,
    packing_of,
    with_inputs,
    with_outputs,
)
from bigtrain.errors import ConfigError

RunT = TypeVar("RunT", bound=TrainConfig)
DEFAULT_MICRO_BATCH_SIZE = 4
ZERO_KINDS = (EngineKind.zero1, EngineKind.zero2, EngineKind.zero3)
FSDP_KINDS = (EngineKind.fsdp, EngineKind.hsdp)
OWN_TOKENIZERS = ("bpe", "bytes")
NUM_BYTES_IDS = 257
"""Of the bytes and the end of a text."""
RESUME_WORDS = ("auto", "never", "must")
PATHLESS = {DataSource.stdlib, DataSource.synthetic}
"""Sources that ignore ``data.path``."""
WHAT_PATH_IS = {
    DataSource.datasets: "dataset name or directory",
    DataSource.records: ".npz file",
    DataSource.images: "directory of images",
    DataSource.own: "name of a part",
    DataSource.prepared: "directory or URL of a prepared corpus",
}


def resolve(config: RunT) -> RunT:
    """Return a copy of ``config`` with derived values; ``engine.precision`` follows from the device, in the trainer."""
    model, task = dataclasses.replace(config.model), with_inputs(config.task, config.data)
    if model.kind is ModelKind.native:
        derived: dict[str, Any] = {
            "num_kv_heads": model.num_heads,
            "head_dim": max(model.hidden_dim // max(model.num_heads, 1), 1),
            "ffn_dim": 4 * model.hidden_dim,
        }
        model = dataclasses.replace(model, **{k: v for k, v in derived.items() if getattr(model, k) is None})
    has_length = model.kind is not ModelKind.own or "max_positions" in model.settings
    model = with_outputs(model, task)
    if model.kind is ModelKind.hf:
        has_length = model.head not in WITHOUT_LENGTH
    data = dataclasses.replace(config.data)
    if data.sequence_length is None and (has_length or not are_records(data)):
        data.sequence_length = model.max_positions
    if task.kind in OF_DOCUMENTS and not are_records(data) and data.packing in (None, Packing.concat):
        data.packing = packing_of(task.kind)
    if own_sets(data, "validation"):
        data.validation_fraction = 0.0
    # Pretrained weights know the ids of one tokenizer; one trained on the corpus would be another language.
    origin = model.init_from or (model.name if model.pretrained else None)
    if origin and data.tokenizer == "bpe" and model.head not in WITHOUT_LENGTH:
        data.tokenizer = origin
    name = config.run.name or re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(model.name or "run").name)
    return dataclasses.replace(
        config, model=model, task=task, data=data, run=dataclasses.replace(config.run, name=name)
    )


def fit_micro_batch(config: RunT, world_size: int) -> RunT:
    """Return ``config`` with a micro-batch, unless it has one: up to 4, the largest that needs the least padding.

    A pipeline gets a micro-batch or more for each of its ranks, and if it can as many for each of them.
    """
    if config.train.micro_batch_size is not None:
        return config
    per_rank = math.ceil(config.train.global_batch_size / data_ranks(config.parallel, world_size))
    pp = max(config.parallel.pp, 1)
    largest = max(min(DEFAULT_MICRO_BATCH_SIZE, per_rank // pp), 1)
    fitting = min(range(largest, 0, -1), key=lambda size: -per_rank % (size * pp))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=fitting))


def check(config: TrainConfig, *, world_size: int, local_world_size: int) -> list[str]:
    """Return every problem of a resolved ``config`` for this world, each with what to change."""
    bounds = out_of_bounds(config)
    if config.model.kind is not ModelKind.native:  # the shape of another model is what its files say
        bounds = [p for p in bounds if p.startswith("model.adapter.") or not p.startswith("model.")]
    return [
        *_check_run(config),
        *_check_parts(config),
        *_check_model(config.model),
        *_check_data(config.data),
        *_check_model_and_data(config),
        *check_task(config),
        *_check_engine(config, world_size, local_world_size),
        *layout_problems(config, world_size, local_world_size),
        *check_adapter(config),
        *check_privacy(config),
        *check_sync(config, world_size),
        *bounds,
        *_check_training(config),
        *length_problems(config),
    ]


def check_data(data: DataConfig) -> list[str]:
    """Return every problem of the ``data`` section by itself."""
    return [*out_of_bounds(data, "data."), *_check_data(data)]


def _check_data(data: DataConfig) -> Iterator[str]:
    yield from _check_mixture(data)
    places = {f"data.mixture.{name}" if data.mixture else "data": part for name, part in component_data(data).items()}
    for which in ("validation", "test"):
        sets = own_sets(data, which).items()
        places |= {f"data.{which}.sets.{name}" if name else f"data.{which}": part for name, part in sets}
    for where, part in places.items():
        if part.source not in PATHLESS and not part.path:
            what = WHAT_PATH_IS.get(part.source, "file, directory or glob")
            chosen = f"data={part.source.name}" if where == "data" else f"{where}.source={part.source.name}"
            yield f"{where}.path: missing; {chosen} needs {where}.path=<{what}>"
        if part.source is DataSource.tokens and part.tokenizer in OWN_TOKENIZERS:
            yield f"{where}.tokenizer={part.tokenizer}: ids mean something to the tokenizer that made them alone; name it"
        if part.source not in PATHLESS | {DataSource.prepared, DataSource.images} and "://" in (part.path or ""):
            instead = (
                "write the name of the dataset" if part.source is DataSource.datasets else "copy it to this machine"
            )
            yield f"{where}.path={part.path}: a URL, which only {where}.source=prepared and images read; {instead}"
    meant = difflib.get_close_matches(data.tokenizer.lower(), OWN_TOKENIZERS, n=1, cutoff=0.75)
    if meant and data.tokenizer not in OWN_TOKENIZERS:  # before a hub is asked for it
        other = f"(a directory of that name is data.tokenizer=./{data.tokenizer})"
        yield f"data.tokenizer={data.tokenizer}: did you mean {meant[0]}? {other}"
    yield from _check_preparation(data)
    yield from _check_live(data)


def _check_live(data: DataConfig) -> Iterator[str]:
    """Find settings that need the whole text before training, which is tokenised on the fly."""
    live = [name for name, part in component_data(data).items() if is_live(part)]
    if not live:
        return
    if data.tokenizer == "bpe":
        yield (
            "data.on_the_fly=true: a bpe is trained on the whole text, which is not read first; use data.tokenizer=bytes, a "
            "Hugging Face tokenizer by name, or the directory of a corpus or run that has one "
            "(python launch/prepare.py on a part of the text makes one)"
        )
    for name in _chosen(data):
        yield f"data.{name}: not offered on the fly, where samples are not known before"
    if data.packing is Packing.documents:
        yield "data.on_the_fly=true: data.packing=documents is of prepared text; leave one of them out"
    if data.filters.duplicates is not Duplicates.keep:
        yield (
            f"data.filters.duplicates={data.filters.duplicates.name}: duplicates are found by reading the whole text; "
            "leave it out, or prepare the text before (data.on_the_fly=false)"
        )
    for name in live if data.mixture else ():
        if data.mixture[name].max_epochs is not None:
            yield (
                f"data.mixture.{name}.max_epochs: not offered on the fly, where the length of an epoch is unknown; leave it "
                f"out, or prepare this component before (data.mixture.{name}.on_the_fly=false)"
            )


def _chosen(data: DataConfig) -> list[str]:
    """Return the settings that choose among the samples."""
    return [name for name in ("max_train_samples", *PERPLEXITIES) if getattr(data, name) is not None]


def _check_preparation(data: DataConfig) -> Iterator[str]:
    filters, sources = data.filters, {part.source for part in component_data(data).values()}
    if data.image_channels == 2:
        yield "data.image_channels=2: must be 1 or 3"
    if data.augment.mixup and sources != {DataSource.images}:
        yield "data.augment.mixup: every component has to be of data=images, which alone have labels to mix"
    if filters.max_characters is not None and filters.max_characters < filters.min_characters:
        yield f"data.filters.max_characters={filters.max_characters}: must not be less than data.filters.min_characters"
    if data.source is DataSource.gettext and data.content is not Content.seq2seq:
        yield "data=gettext: messages and their translations are data.content=seq2seq"
    of_files = {DataSource.text: (), DataSource.stdlib: (Content.seq2seq,)}
    offered = of_files.get(data.source)
    if offered is not None and data.content not in (Content.text, Content.labelled, *offered):
        yield (
            f"data.content={data.content.name}: data={data.source.name} has no records; "
            "use jsonl, csv, parquet, arrow or datasets"
        )


def _check_mixture(data: DataConfig) -> Iterator[str]:
    for name in _chosen(data) if data.mixture else ():
        yield f"data.{name}: not offered for a mixture; leave it out, or give components max_epochs"
    for name, component in data.mixture.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"data.mixture.{name}: a name has letters, digits, '_' and '-' only"
        steps = [change.step for change in component.later_weights]
        if steps != sorted(set(steps)):
            yield f"data.mixture.{name}.later_weights: steps {steps} must be ascending"
    if data.mixture and not any(component.weight > 0 for component in data.mixture.values()):
        yield "data.mixture: at least one component needs a positive weight from the beginning"
    components = component_data(data).values()
    prepared = [part.path for part in components if part.source is DataSource.prepared]
    is_trained = any(part.source not in (DataSource.prepared, *WITHOUT_TEXT) for part in components)
    if data.tokenizer == "bpe" and prepared and is_trained:
        yield (
            "data.tokenizer=bpe would train another tokenizer than the one that a component of data.mixture was prepared "
            f"with; use that one: data.tokenizer={prepared[0]}"
        )


def ignored_settings(config: TrainConfig) -> list[str]:
    """Return a warning for every changed setting that has no effect."""
    return list(_ignored(config))


def _ignored(config: TrainConfig) -> Iterator[str]:
    data, defaults = config.data, DataConfig()
    components = list(component_data(data).values())
    for section in fields(config):
        if is_dataclass(value := getattr(config, section.name)):
            yield from without_effect(value, f"{section.name}.", parts=components if value is data else None)
    any_live, all_live = any(map(is_live, components)), all(map(is_live, components))
    is_cached = any_live or any("://" in (part.path or "") for part in components)
    for keys, is_used, reason in (
        (("shard_tokens", "verify", "on_bad_shard"), not all_live, "by data.on_the_fly=true"),
        (("cache_directory", "cache_gib"), is_cached, "unless data.path is a URL or data.on_the_fly=true"),
    ):
        changed = [key for key in keys if getattr(data, key) != getattr(defaults, key)]
        yield from (f"data.{key} is ignored {reason}" for key in changed if not is_used)
    for path in (part.path or "" for part in components if part.source is DataSource.text):
        if path.lower().endswith((".jsonl", ".csv", ".tsv", ".parquet", ".arrow")):
            yield f"data.path={path}: data=text reads it as plain text; its rows are read by data={path.split('.')[-1]}"
    if "best" in config.checkpoint.keep and config.validation.every_steps == 0:
        yield "checkpoint.keep=best is ignored while validation.every_steps=0: no checkpoint has a loss"
    if not config.train.is_open:
        yield from beyond_the_end(config)


def _check_run(config: TrainConfig) -> Iterator[str]:
    name = config.run.name or ""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        yield f"run.name={name!r}: use letters, digits, '.', '_' and '-' only, starting with a letter or digit"
    elif len(name) > MAX_NAME_BYTES:
        yield f"run.name={name[:20]}...: {len(name)} characters; the name of a directory has {MAX_NAME_BYTES} at most"


def _check_parts(config: TrainConfig) -> Iterator[str]:
    """Look own parts up, which are there only if they were imported."""
    task, model = config.task, config.model
    named: list[tuple[str, str, dict[str, Any], list[str]]] = []
    if task.kind not in TaskKind.__members__:
        named.append(("task.kind", task.kind, task.settings, list(TaskKind.__members__)))
    if model.kind is ModelKind.own and model.name not in SMALL_NETWORKS:
        named.append(("model.name", model.name or "", model.settings, list(SMALL_NETWORKS)))
    for part in component_data(config.data).values():
        if part.source is DataSource.own and part.path:
            named.append(("data.path", part.path, part.settings, []))
    for setting, name, settings, ours in named:
        if not parts.is_own(name):
            known = f"; {nearest(name, ours)}" if ours else ""
            yield f"{setting}={name}: must be the name of an own part, such as ideas.part{known}"
            continue
        try:
            parts.build(name, settings, setting=setting)
        except ConfigError as error:
            yield str(error)


def _check_mixture_of_experts(model: ModelConfig) -> Iterator[str]:
    if (moe := model.moe) is None:
        return
    if model.activation is not Activation.swiglu or model.bias:
        yield "model.moe: experts are SwiGLU networks without biases; add model.activation=swiglu model.bias=false"
    for name, width in (("hidden_dim", model.hidden_dim), ("moe.expert_dim", moe.expert_dim)):
        if width % 8:
            yield f"model.{name}={width}: grouped products want a multiple of 8, {width + -width % 8} for example"
    if moe.experts_per_token > moe.num_experts:
        yield f"model.moe.experts_per_token={moe.experts_per_token}: there are model.moe.num_experts={moe.num_experts}"
    if moe.dense_layers >= model.num_layers:
        yield f"model.moe.dense_layers={moe.dense_layers}: no mixture is left of model.num_layers={model.num_layers}"
    if model.adapter and moe.balance_speed:
        yield "model.adapter: it leaves the weights as they are, and so the experts' balance: model.moe.balance_speed=0"


def _check_model(model: ModelConfig) -> Iterator[str]:
    if model.kind is ModelKind.hf:
        if not model.name:
            yield (
                "model.name: +model=hf needs model.name=<hub id or local directory>, or model.architecture=<one of "
                "transformers'>"
            )
        if model.architecture and model.pretrained:
            yield (
                "model.architecture begins from scratch: leave out model.pretrained, or name a model with "
                "model.name=<hub id or directory>"
            )
        if model.settings and not model.architecture:
            yield "model.settings: they are those of model.architecture, which is not set"
        if model.freeze_batch_norm and not (model.init_from or model.pretrained):
            yield "model.freeze_batch_norm: from scratch there are no means to keep; add model.pretrained or model.init_from"
        if model.init_from and model.pretrained:
            yield (
                f"model.init_from={model.init_from!r} gives the trunk, and model.pretrained=true all weights of model.name; "
                "write one of them"
            )
    if model.kind is not ModelKind.native or out_of_bounds(model):  # which are told already
        return
    yield from _check_mixture_of_experts(model)
    if model.hidden_dim % model.num_heads and model.head_dim == max(model.hidden_dim // model.num_heads, 1):
        yield (
            f"model.hidden_dim={model.hidden_dim} does not divide by model.num_heads={model.num_heads}; "
            "change one of them or set model.head_dim"
        )
    if model.num_heads % model.num_kv_heads:
        yield f"model.num_heads={model.num_heads} does not divide by model.num_kv_heads={model.num_kv_heads}"
    if model.positions is Positions.rope and model.head_dim % 2:
        yield f"model.head_dim={model.head_dim}: rotary positions need an even number"
    if (scaling := model.rope_scaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (
            f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor}: must be more than "
            f"low_freq_factor={scaling.low_freq_factor}"
        )


def _check_model_and_data(config: TrainConfig) -> Iterator[str]:
    data, model = config.data, config.model
    is_native, is_tokenised = model.kind is ModelKind.native, data.source not in (DataSource.prepared, *WITHOUT_TEXT)
    if is_native and data.sequence_length > model.max_positions:
        yield (
            f"data.sequence_length={data.sequence_length} is longer than model.max_positions={model.max_positions}; "
            f"use data.sequence_length<={model.max_positions} or a larger model.max_positions"
        )
    if is_native and is_tokenised and data.tokenizer == "bpe" and model.vocab_size < data.tokenizer_vocab_size:
        yield (
            f"model.vocab_size={model.vocab_size} is smaller than data.tokenizer_vocab_size="
            f"{data.tokenizer_vocab_size}; raise the one or lower the other"
        )
    if is_tokenised and data.tokenizer == "bytes" and model.vocab_size < NUM_BYTES_IDS:
        yield (
            f"model.vocab_size={model.vocab_size} is smaller than the {NUM_BYTES_IDS} ids of data.tokenizer=bytes; "
            "choose a larger model.vocab_size or, of a model of transformers, its own tokenizer"
        )


def _check_engine(config: TrainConfig, world_size: int, local_world_size: int) -> Iterator[str]:
    engine, kind = config.engine, config.engine.kind
    dp_size = data_ranks(config.parallel, world_size)
    dp_shard = engine.dp_shard
    if dp_shard is None:
        dp_shard = data_ranks_of_node(config.parallel, world_size, local_world_size)
    if kind is EngineKind.hsdp and dp_shard >= 1 and dp_size % dp_shard:
        divided = "".join(f" / {setting}" for setting in shared(config.parallel))
        yield f"engine.dp_shard={dp_shard} does not divide the world size {world_size}{divided}"
    if engine.offload is Offload.cpu and kind in (EngineKind.ddp, EngineKind.accelerate):
        yield f"engine.offload=cpu is not offered by engine={kind.name}; use fsdp, hsdp, zero1, zero2 or zero3"
    if engine.precision is not Precision.fp8:
        return
    if kind not in (EngineKind.ddp, *FSDP_KINDS):
        yield f"engine.precision=fp8 is not offered by engine={kind.name}; use ddp, fsdp or hsdp"
    if not engine.compile:
        yield "engine.precision=fp8 is slower than bf16 without engine.compile=true"
    num_tokens = (config.train.micro_batch_size or 1) * (config.data.sequence_length or 1)
    if num_tokens % 16:
        yield (
            "engine.precision=fp8 needs a multiple of 16 tokens in a micro-batch; train.micro_batch_size x "
            f"data.sequence_length are {num_tokens}"
        )


def _check_training(config: TrainConfig) -> Iterator[str]:
    steps, betas, keep = config.profile.steps, config.optimizer.betas, config.checkpoint.keep
    if steps and (len(steps) != 2 or steps[0] > steps[1]):
        yield f"profile.steps={steps}: must be [first, last], as [20, 25]"
    if len(betas) != 2:
        yield f"optimizer.betas={betas}: must be two numbers"
    if not all(re.fullmatch(r"all|best|(latest|every) [1-9][0-9]*", rule.strip()) for rule in keep.split(",")):
        yield f"checkpoint.keep={keep!r}: must be 'all', 'latest N', 'every N', 'best' or several of them with commas"
    if config.checkpoint.load is not Load.all and config.checkpoint.resume in RESUME_WORDS:
        yield "checkpoint.load=weights: of which run? name it with checkpoint.resume=<path>; a run's own are loaded whole"
    hang, first_hang = config.supervision.hang_seconds, config.supervision.first_hang_seconds
    if first_hang < hang:
        yield f"supervision.first_hang_seconds={first_hang}: must be at least hang_seconds={hang}"
    if 0 < (factor := config.supervision.straggler_factor) <= 1:
        yield f"supervision.straggler_factor={factor}: must be more than 1, or 0 to switch it off"


def check_adapter(config: TrainConfig) -> Iterator[str]:
    """Yield what adapters of the model cannot be combined with."""
    adapter, engine = config.model.adapter, config.engine
    if adapter is None:
        return
    if config.optimizer.kind is OptimizerKind.muon:
        yield "model.adapter: optimizer=muon is for whole matrices, not for their factors; use optimizer=adamw"
    if config.optimizer.keep_zeros:
        yield "optimizer.keep_zeros: adapters begin with a factor of zeros, which would stay; leave one of them out"
    if engine.precision is Precision.fp8:
        yield "model.adapter: not offered with engine.precision=fp8; use bf16"
    if adapter.kind is not AdapterKind.lora and engine.kind is EngineKind.zero3:
        instead = "which engine=zero3 does not gather for it; use engine=fsdp"
        yield f"model.adapter.kind=dora: it reads whole weights, {instead}"
    if adapter.nf4 and engine.kind not in (EngineKind.ddp, *FSDP_KINDS):
        yield f"model.adapter.nf4: engine={engine.kind.name} takes no weights in 4 bits; use engine=ddp, fsdp or hsdp"
    if adapter.nf4 and adapter.kind is not AdapterKind.lora:
        yield "model.adapter.nf4: kind=dora reads whole weights, which there are none of; use kind=lora"
