"""Derived values, and every contradiction, of a configuration and a world; without torch, and before any process group."""

import dataclasses
import difflib
import math
import re
from dataclasses import fields, is_dataclass
from pathlib import PurePosixPath
from typing import Any

from bigtrain.config import (
    WITHOUT_TEXT,
    DataConfig,
    TrainConfig,
    TrainingConfig,
    are_records,
    component_data,
    is_live,
    own_sets,
)
from bigtrain.config.adapters import check_adapter
from bigtrain.config.bounds import out_of_bounds, without_effect
from bigtrain.config.choices import (
    Content,
    DataSource,
    Duplicates,
    EngineKind,
    Load,
    ModelKind,
    Offload,
    Packing,
    Positions,
    Precision,
    TaskKind,
)
from bigtrain.config.convert import MAX_NAME_BYTES, nearest
from bigtrain.config.length import beyond_the_end, length_problems
from bigtrain.config.parts import build as build_part
from bigtrain.config.parts import is_own as is_own_part
from bigtrain.config.tasks import (
    OF_DOCUMENTS,
    SMALL_NETWORKS,
    WITHOUT_LENGTH,
    check_task,
    head_of,
    num_outputs_of,
    with_inputs,
)
from bigtrain.errors import ConfigError

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


def resolve(config: TrainConfig) -> TrainConfig:
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
    if model.kind is ModelKind.hf:
        model.head, model.num_outputs = head_of(task), num_outputs_of(task)
        has_length = model.head not in WITHOUT_LENGTH
    data = dataclasses.replace(config.data)
    if data.sequence_length is None and (has_length or not are_records(data)):
        data.sequence_length = model.max_positions
    if task.kind in OF_DOCUMENTS and not are_records(data) and data.packing is Packing.concat:
        data.packing = Packing.documents
    if own_sets(data, "validation"):
        data.validation_fraction = 0.0
    # Pretrained weights know the ids of one tokenizer; one trained on the corpus would be another language.
    if (origin := model.init_from or (model.name if model.pretrained else None)) and data.tokenizer == "bpe":
        data.tokenizer = origin
    name = config.run.name or re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(model.name or "run").name)
    return dataclasses.replace(
        config, model=model, task=task, data=data, run=dataclasses.replace(config.run, name=name)
    )


def fit_micro_batch(config: TrainConfig, world_size: int) -> TrainConfig:
    """Return ``config`` with a micro-batch, unless it has one: up to 4, the largest that needs the least padding."""
    if config.train.micro_batch_size is not None:
        return config
    per_rank = math.ceil(config.train.global_batch_size / world_size)
    fitting = min(range(DEFAULT_MICRO_BATCH_SIZE, 0, -1), key=lambda size: -per_rank % size)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=fitting))


def check(config: TrainConfig, *, world_size: int, local_world_size: int) -> list[str]:
    """Return every problem of a resolved ``config`` for this world, each with what to change."""
    return [
        *_check_run(config),
        *_check_parts(config),
        *_check_model(config),
        *_check_data(config.data),
        *_check_model_and_data(config),
        *check_task(config),
        *_check_engine(config, world_size, local_world_size),
        *_check_bounds(config),
        *_check_training(config),
        *length_problems(config),
    ]


def _check_bounds(config: TrainConfig) -> list[str]:
    """Find numbers out of bounds; the shape of a Hugging Face model is what its files say."""
    problems = out_of_bounds(config)
    return problems if config.model.kind is ModelKind.native else [p for p in problems if not p.startswith("model.")]


def check_data(data: DataConfig) -> list[str]:
    """Return every problem of the ``data`` section by itself."""
    return out_of_bounds(data, "data.") + _check_data(data)


def _check_data(data: DataConfig) -> list[str]:
    problems = _check_mixture(data)
    places = {f"data.mixture.{name}" if data.mixture else "data": part for name, part in component_data(data).items()}
    for which in ("validation", "test"):
        sets = own_sets(data, which).items()
        places |= {f"data.{which}.sets.{name}" if name else f"data.{which}": part for name, part in sets}
    for where, part in places.items():
        if part.source not in PATHLESS and not part.path:
            what = WHAT_PATH_IS.get(part.source, "file, directory or glob")
            chosen = f"data={part.source.name}" if where == "data" else f"{where}.source={part.source.name}"
            problems.append(f"{where}.path: missing; {chosen} needs {where}.path=<{what}>")
        if part.source not in PATHLESS | {DataSource.prepared} and "://" in (part.path or ""):
            problems.append(
                f"{where}.path={part.path}: a URL, which only {where}.source=prepared reads; "
                + ("write the name of the dataset" if part.source is DataSource.datasets else "copy it to this machine")
            )
    problems += _check_tokenizer(data)
    problems += _check_preparation(data)
    problems += _check_live(data)
    return problems


def _check_tokenizer(data: DataConfig) -> list[str]:
    """Find a misspelt ``bpe`` or ``bytes`` before a hub is asked for it."""
    name = data.tokenizer
    meant = difflib.get_close_matches(name.lower(), OWN_TOKENIZERS, n=1, cutoff=0.75)
    if name in OWN_TOKENIZERS or not meant:
        return []
    return [f"data.tokenizer={name}: did you mean {meant[0]}? (a directory of that name is data.tokenizer=./{name})"]


def _check_live(data: DataConfig) -> list[str]:
    """Find settings that need the whole text before training, which is tokenised on the fly."""
    live = [name for name, part in component_data(data).items() if is_live(part)]
    if not live:
        return []
    problems = []
    if data.tokenizer == "bpe":
        problems.append(
            "data.on_the_fly=true: a bpe is trained on the whole text, which is not read first; use data.tokenizer=bytes, a "
            "Hugging Face tokenizer by name, or the directory of a corpus or run that has one "
            "(python launch/prepare.py on a part of the text makes one)"
        )
    if data.max_train_samples is not None:
        problems.append("data.max_train_samples: not offered on the fly, where samples are not known before")
    if data.packing is Packing.documents:
        problems.append("data.on_the_fly=true: data.packing=documents is of prepared text; leave one of them out")
    if data.filters.duplicates is not Duplicates.keep:
        problems.append(
            f"data.filters.duplicates={data.filters.duplicates.name}: duplicates are found by reading the whole text; "
            "leave it out, or prepare the text before (data.on_the_fly=false)"
        )
    problems += [
        f"data.mixture.{name}.max_epochs: not offered on the fly, where the length of an epoch is unknown; leave it out, "
        f"or prepare this component before (data.mixture.{name}.on_the_fly=false)"
        for name in live
        if data.mixture and data.mixture[name].max_epochs is not None
    ]
    return problems


def _check_preparation(data: DataConfig) -> list[str]:
    filters = data.filters
    sources = {part.source for part in component_data(data).values()}
    rules = [
        (data.image_channels != 2, "data.image_channels=2: must be 1 or 3"),
        (
            not data.augment.mixup or sources == {DataSource.images},
            "data.augment.mixup: every component has to be of data=images, which alone have labels to mix",
        ),
        (
            filters.max_characters is None or filters.max_characters >= filters.min_characters,
            f"data.filters.max_characters={filters.max_characters}: must not be less than data.filters.min_characters",
        ),
        (
            (data.content is Content.seq2seq) or data.source is not DataSource.gettext,
            "data=gettext: messages and their translations are data.content=seq2seq",
        ),
        (
            data.content in (Content.text, Content.labelled) or data.source not in (DataSource.text, DataSource.stdlib),
            f"data.content={data.content.name}: data={data.source.name} has no records; "
            "use jsonl, csv, parquet, arrow or datasets",
        ),
    ]
    return [message for holds, message in rules if not holds]


def _check_mixture(data: DataConfig) -> list[str]:
    problems = []
    if data.mixture and data.max_train_samples is not None:
        problems.append(
            "data.max_train_samples: not offered for a mixture; leave it out, or give components max_epochs"
        )
    for name, component in data.mixture.items():
        where = f"data.mixture.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            problems.append(f"{where}: a name has letters, digits, '_' and '-' only")
        steps = [change.step for change in component.later_weights]
        if steps != sorted(set(steps)):
            problems.append(f"{where}.later_weights: steps {steps} must be ascending")
    if data.mixture and not any(component.weight > 0 for component in data.mixture.values()):
        problems.append("data.mixture: at least one component needs a positive weight from the beginning")
    parts = component_data(data).values()
    prepared = [part.path for part in parts if part.source is DataSource.prepared]
    is_trained = any(part.source not in (DataSource.prepared, *WITHOUT_TEXT) for part in parts)
    if data.tokenizer == "bpe" and prepared and is_trained:
        problems.append(
            "data.tokenizer=bpe would train another tokenizer than the one that a component of data.mixture was prepared "
            f"with; use that one: data.tokenizer={prepared[0]}"
        )
    return problems


def ignored_settings(config: TrainConfig) -> list[str]:
    """Return a warning for every changed setting that has no effect."""
    data, defaults = config.data, DataConfig()
    parts = list(component_data(data).values())
    ignored = [
        problem
        for section in fields(config)
        if is_dataclass(value := getattr(config, section.name))
        for problem in without_effect(value, f"{section.name}.", parts=parts if value is data else None)
    ]
    any_live, all_live = any(map(is_live, parts)), all(map(is_live, parts))
    is_cached = any_live or any("://" in (part.path or "") for part in parts)
    for keys, is_used, reason in (
        (("shard_tokens", "verify", "on_bad_shard"), not all_live, "by data.on_the_fly=true"),
        (("cache_directory", "cache_gib"), is_cached, "unless data.path is a URL or data.on_the_fly=true"),
    ):
        changed = [key for key in keys if getattr(data, key) != getattr(defaults, key)]
        ignored += [f"data.{key} is ignored {reason}" for key in changed if not is_used]
    ignored += [
        f"data.path={part.path}: data=text reads it as plain text; its rows are read by data={part.path.split('.')[-1]}"
        for part in parts
        if part.source is DataSource.text
        and (part.path or "").lower().endswith((".jsonl", ".csv", ".tsv", ".parquet", ".arrow"))
    ]
    if "best" in config.checkpoint.keep and config.validation.every_steps == 0:
        ignored.append("checkpoint.keep=best is ignored while validation.every_steps=0: no checkpoint has a loss")
    ignored += [] if config.train.is_open else beyond_the_end(config)
    return ignored


def _check_run(config: TrainConfig) -> list[str]:
    name = config.run.name or ""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return [f"run.name={name!r}: use letters, digits, '.', '_' and '-' only, starting with a letter or digit"]
    if len(name) > MAX_NAME_BYTES:
        return [
            f"run.name={name[:20]}...: {len(name)} characters; the name of a directory has {MAX_NAME_BYTES} at most"
        ]
    return []


def _check_parts(config: TrainConfig) -> list[str]:
    """Look own parts up, which are there only if they were imported."""
    task, model, problems = config.task, config.model, []
    names = [("task.kind", task.kind, task.settings)] if task.kind not in TaskKind.__members__ else []
    if model.kind is ModelKind.own and model.name not in SMALL_NETWORKS:
        names.append(("model.name", model.name or "", model.settings))
    data = [part for part in component_data(config.data).values() if part.source is DataSource.own and part.path]
    names += [("data.path", part.path, part.settings) for part in data]
    for setting, name, settings in names:
        try:
            if not is_own_part(name):
                ours = {"task.kind": list(TaskKind.__members__), "model.name": list(SMALL_NETWORKS)}.get(setting)
                known = f"; {nearest(name, ours)}" if ours else ""
                problems.append(f"{setting}={name}: must be the name of an own part, such as ideas.part{known}")
            else:
                build_part(name, settings, setting=setting)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _check_model(config: TrainConfig) -> list[str]:
    model = config.model
    problems = []
    if model.kind is ModelKind.hf:
        if not model.name:
            problems.append(
                "model.name: +model=hf needs model.name=<hub id or local directory>, or model.architecture=<one of "
                "transformers'>"
            )
        if model.architecture and model.pretrained:
            problems.append(
                "model.architecture begins from scratch: leave out model.pretrained, or name a model with "
                "model.name=<hub id or directory>"
            )
        if model.settings and not model.architecture:
            problems.append("model.settings: they are those of model.architecture, which is not set")
        if model.init_from and model.pretrained:
            problems.append(
                f"model.init_from={model.init_from!r} gives the trunk, and model.pretrained=true all weights of model.name; "
                "write one of them"
            )
        return problems
    if model.kind is ModelKind.own or out_of_bounds(model):  # which are told already
        return []
    if model.hidden_dim % model.num_heads and model.head_dim == max(model.hidden_dim // model.num_heads, 1):
        problems.append(
            f"model.hidden_dim={model.hidden_dim} does not divide by model.num_heads={model.num_heads}; "
            "change one of them or set model.head_dim"
        )
    if model.num_heads % model.num_kv_heads:
        problems.append(f"model.num_heads={model.num_heads} does not divide by model.num_kv_heads={model.num_kv_heads}")
    if model.positions is Positions.rope and model.head_dim % 2:
        problems.append(f"model.head_dim={model.head_dim}: rotary positions need an even number")
    if (scaling := model.rope_scaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
        problems.append(
            f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor}: must be more than "
            f"low_freq_factor={scaling.low_freq_factor}"
        )
    return problems


def _check_model_and_data(config: TrainConfig) -> list[str]:
    """Check what the model and the data have to agree about."""
    data, model = config.data, config.model
    problems = []
    if model.kind is ModelKind.native and data.sequence_length > model.max_positions:
        problems.append(
            f"data.sequence_length={data.sequence_length} is longer than model.max_positions={model.max_positions}; "
            f"use data.sequence_length<={model.max_positions} or a larger model.max_positions"
        )
    without = (DataSource.prepared, *WITHOUT_TEXT)
    trains_tokenizer = data.tokenizer == "bpe" and data.source not in without
    if model.kind is ModelKind.native and trains_tokenizer and model.vocab_size < data.tokenizer_vocab_size:
        problems.append(
            f"model.vocab_size={model.vocab_size} is smaller than data.tokenizer_vocab_size="
            f"{data.tokenizer_vocab_size}; raise the one or lower the other"
        )
    if data.tokenizer == "bytes" and data.source not in without and model.vocab_size < NUM_BYTES_IDS:
        problems.append(
            f"model.vocab_size={model.vocab_size} is smaller than the {NUM_BYTES_IDS} ids of data.tokenizer=bytes; "
            "choose a larger model.vocab_size or, of a model of transformers, its own tokenizer"
        )
    return problems


def padding(train: TrainingConfig, world_size: int) -> list[str]:
    """Return a warning with the share of the computing that is padding, where it is more than 1 %."""
    places = train.micro_batches(world_size) * train.micro_batch_size * world_size
    if places <= 1.01 * train.global_batch_size:
        return []
    return [
        f"{1 - train.global_batch_size / places:.0%} of the computing is padding: {world_size} ranks with micro-batches of "
        f"{train.micro_batch_size} have {places} places for train.global_batch_size={train.global_batch_size}"
    ]


def _check_engine(config: TrainConfig, world_size: int, local_world_size: int) -> list[str]:
    engine = config.engine
    problems = []
    if engine.kind is EngineKind.hsdp:
        dp_shard = local_world_size if engine.dp_shard is None else engine.dp_shard
        if dp_shard >= 1 and world_size % dp_shard:
            problems.append(f"engine.dp_shard={dp_shard} does not divide the world size {world_size}")
    if engine.offload is Offload.cpu and engine.kind in (EngineKind.ddp, EngineKind.accelerate):
        problems.append(
            f"engine.offload=cpu is not offered by engine={engine.kind.name}; use fsdp, hsdp, zero1, zero2 or zero3"
        )
    if engine.precision is Precision.fp8:
        problems += _check_fp8(config)
    return problems + check_adapter(config)


def _check_fp8(config: TrainConfig) -> list[str]:
    engine, num_tokens = config.engine, (config.train.micro_batch_size or 1) * (config.data.sequence_length or 1)
    rules = [
        (
            engine.kind in (EngineKind.ddp, *FSDP_KINDS),
            f"engine.precision=fp8 is not offered by engine={engine.kind.name}; use ddp, fsdp or hsdp",
        ),
        (engine.compile, "engine.precision=fp8 is slower than bf16 without engine.compile=true"),
        (
            num_tokens % 16 == 0,
            f"engine.precision=fp8 needs a multiple of 16 tokens in a micro-batch; train.micro_batch_size x "
            f"data.sequence_length are {num_tokens}",
        ),
    ]
    return [message for holds, message in rules if not holds]


def _check_training(config: TrainConfig) -> list[str]:
    steps, betas, keep = config.profile.steps, config.optimizer.betas, config.checkpoint.keep
    hang, first_hang = config.supervision.hang_seconds, config.supervision.first_hang_seconds
    straggler_factor = config.supervision.straggler_factor
    kept = r"all|best|(latest|every) [1-9][0-9]*"
    rules = [
        (
            not steps or (len(steps) == 2 and steps[0] <= steps[1]),
            f"profile.steps={steps}: must be [first, last], as [20, 25]",
        ),
        (len(betas) == 2, f"optimizer.betas={betas}: must be two numbers"),
        (
            all(re.fullmatch(kept, rule.strip()) for rule in keep.split(",")),
            f"checkpoint.keep={keep!r}: must be 'all', 'latest N', 'every N', 'best' or several of them with commas",
        ),
        (
            config.checkpoint.load is Load.all or config.checkpoint.resume not in RESUME_WORDS,
            "checkpoint.load=weights: of which run? name it with checkpoint.resume=<path>; a run's own are loaded whole",
        ),
        (
            first_hang >= hang,
            f"supervision.first_hang_seconds={first_hang}: must be at least hang_seconds={hang}",
        ),
        (
            not 0 < straggler_factor <= 1,
            f"supervision.straggler_factor={straggler_factor}: must be more than 1, or 0 to switch it off",
        ),
    ]
    return [message for holds, message in rules if not holds]
