"""The data of a run: prepared once, opened on every rank, continued from a checkpoint."""

import contextlib
import dataclasses
import datetime
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from bigtrain.checkpoint.store import RunState
from bigtrain.config import (
    OF_RECORDS,
    WITHOUT_TEXT,
    AugmentConfig,
    DataConfig,
    DataSource,
    LongChats,
    ModelConfig,
    ModelKind,
    OnBad,
    Packing,
    TaskConfig,
    TaskKind,
    TrainConfig,
    are_records,
    component_data,
    own_sets,
)
from bigtrain.config.convert import flatten, to_dict
from bigtrain.config.length import beyond_the_end, steps_to_train
from bigtrain.config.tasks import BALANCED, PREDICT_LABELS, with_outputs
from bigtrain.data.order.cursor import Cursor, DataState
from bigtrain.data.prepare.corpus import prepare_components
from bigtrain.data.read.batch import Batch
from bigtrain.data.read.index import INDEX_FILE, PUBLISHED_DIRECTORY, SPLITS, read_index
from bigtrain.data.read.loader import TrainLoader, require_validation_targets, validation_batches
from bigtrain.data.read.overlap import seen_in_training
from bigtrain.data.read.packing import unanswered
from bigtrain.data.read.records import RecordSplit
from bigtrain.data.read.stream import SampleStream, StoredSamples
from bigtrain.data.read.tokenizer import TEMPLATE_FILE, TOKENIZER_FILE, load_tokenizer
from bigtrain.data.streams import count_labels, open_streams
from bigtrain.distributed.collectives import differing_rank, gather_json, on_rank0
from bigtrain.engine.base import Engine
from bigtrain.errors import CheckpointError, DataError, counted, of_all_ranks, some
from bigtrain.log import get_logger, redact
from bigtrain.models.hf.build import published_labels
from bigtrain.run.collation import build_collation, relabelled
from bigtrain.run.directory import read_config
from bigtrain.run.scored import add_scores
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import IGNORE_INDEX
from bigtrain.telemetry import names

HELD_OUT = "validation"
VOCAB_MULTIPLE = 128  # an embedding may be padded to a multiple of so many rows for speed
PREPARATION = datetime.timedelta(days=7)  # for which the other ranks wait while rank 0 prepares a corpus


def prepare_data(data: DataConfig) -> dict[str, str]:
    """Prepare the components that need it, in this process; return the directory of each."""
    return {name: str(directory) for name, directory in prepare_components(data, progress=True)}


def open_data(config: TrainConfig, previous: DataState | None = None) -> Mapping[str, SampleStream]:
    """Prepare the data on rank 0 if needed, and open it on every rank, from the ``previous`` state on."""
    train, validation, objective = config.train, config.validation, build_objective(config.task)
    data = with_own_tokenizer(config.data, config.run.directory)
    streams = open_streams(
        data,
        on_rank0(lambda: prepare_data(data), patience=PREPARATION),
        vocab_size=config.model.vocab_size,
        objective=objective,
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        validation_samples=validation.batches * train.global_batch_size if validation.every_steps else 0,
        previous=previous,
        sides=("train",) if own_sets(config.data, HELD_OUT) else SPLITS,
    )
    stream = streams["train"]
    limit_ids(streams.values(), config.model)
    if collation := build_collation(config, stream.tokenizer_directory, stream.facts):
        for part in streams.values():
            part.collated(collation)
    for name, part in streams.items():
        add_scores(config, name, part)
    streams |= open_own_sets(config, stream)
    if validation.every_steps and config.data.on_bad_shard is not OnBad.skip:
        sizes = {"batches": validation.batches, "global_batch_size": train.global_batch_size}
        for part in sets_of(streams, HELD_OUT).values():
            require_validation_targets(part, **sizes, objective=objective)
    found = remarks(config, stream)
    if dist.is_initialized() and any(part.source in OF_RECORDS for part in component_data(data).values()):
        _require_same_rows(stream)
    if stream.num_left_out and stream.num_samples:
        found.append(unanswered(stream.num_left_out, stream.num_left_out + stream.num_samples))
    for remark in found:
        get_logger().warning(remark)
    return streams


def with_num_labels(config: TrainConfig) -> TrainConfig:
    """Return ``config`` with as many labels as the data has names for, which is prepared if need be, unless it says."""
    if config.task.num_labels is not None or config.task.kind not in PREDICT_LABELS:
        return config
    data = with_own_tokenizer(config.data, config.run.directory)
    num_labels = on_rank0(lambda: count_labels(prepare_data(data).values()), patience=PREPARATION)
    task = dataclasses.replace(config.task, num_labels=num_labels)
    return dataclasses.replace(config, task=task, model=with_outputs(config.model, task))


def limit_ids(streams: Iterable[SampleStream], model: ModelConfig) -> None:
    """From now on refuse records with ids that the network's embedding has no row for; own networks say nothing of theirs."""
    splits = [part.split for stream in streams for part in stream.components.values() if hasattr(part, "split")]
    for split in splits if model.kind is not ModelKind.own else ():
        if isinstance(split, RecordSplit):
            split.records.num_ids = model.vocab_size


def open_own_sets(config: TrainConfig, train: SampleStream) -> dict[str, SampleStream]:
    """Return the sets of ``data.validation`` and ``data.test``, and say what of them is trained on too."""
    found = {}
    if own_sets(config.data, HELD_OUT):
        get_logger().info("data.validation names sets to validate on: nothing is held out of the training data")
    for which in (HELD_OUT, "test"):
        for name, part in own_sets(config.data, which).items():
            stream = open_set(
                config,
                part,
                where=f"data.{which}.sets.{name}" if name else f"data.{which}",
                tokenizer=train.tokenizer_directory,
                label_names=list(train.label_names),
                facts=train.facts,
                sequence_length=train.sequence_length,
            )
            stream.require_samples()
            on_rank0(partial(_tell_seen, train, stream))
            found[f"{which}/{name}" if name else which] = stream
    return found


def open_set(
    config: TrainConfig,
    data: DataConfig,
    *,
    where: str,
    tokenizer: Path | None,
    label_names: list[str],
    facts: Mapping[str, Any],
    sequence_length: int | None = None,
) -> SampleStream:
    """Return all samples of a set; text is prepared with the tokenizer of the training data. All ranks call this.

    ``data`` is the set's, at the setting ``where``; ``tokenizer`` the directory of the training corpus or the run, None
    without text. Its labels get the numbers they have in ``label_names``, its images are normalised by ``facts``.
    DataError: it cannot be prepared, has another tokenizer, or labels that the training data has not.
    """
    is_text, objective = data.source not in WITHOUT_TEXT, build_objective(config.task)
    length = data.sequence_length or sequence_length
    data = dataclasses.replace(data, sequence_length=length, augment=AugmentConfig())
    if is_text and tokenizer and data.source is not DataSource.prepared:
        data = dataclasses.replace(data, tokenizer=str(tokenizer))
    stream = open_streams(
        data,
        on_rank0(lambda: prepare_data(data)),
        vocab_size=config.model.vocab_size,
        objective=None if is_text else objective,
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        sides=("train",),
        facts=facts,
    )["train"]
    stream.name = where
    limit_ids([stream], config.model)
    if tokenizer and (own := stream.tokenizer_directory):
        ours, theirs = (read_index(path, check_sizes=False).tokenizer for path in (own, tokenizer))
        if ours.file.xxh3 != theirs.file.xxh3:
            raise DataError(
                f"{where}: it was prepared with the tokenizer {ours.name}, not with that of the training data"
            )
    if unknown := sorted(set(stream.label_names) - set(label_names)):
        raise DataError(
            f"{where}: labels that the training data has not: {some(unknown, 8)}; leave their documents out"
        )
    if stream.label_names != label_names and stream.label_names:
        are_several = objective.fields["labels"].shape not in ((), ("T",))
        stream.collated(relabelled(list(stream.label_names), label_names, are_several=are_several))
    if collation := build_collation(config, stream.tokenizer_directory, facts):
        stream.collated(collation)
    add_scores(config, where.removeprefix("data.").replace(".sets.", "/"), stream)
    return stream


def sets_of(streams: Mapping[str, SampleStream], which: str) -> dict[str, SampleStream]:
    """Return the sets of ``validation`` or ``test`` among the streams of a run, by their own names."""
    found = {name: stream for name, stream in streams.items() if name.startswith(which)}
    return {name.removeprefix(which).removeprefix("/"): found[name] for name in sorted(found)}


def _tell_seen(train: SampleStream, measured: SampleStream) -> None:
    found = seen_in_training(train, measured)
    if found and found[0]:
        numbers, total = found
        get_logger().warning(
            f"{measured.name}: {len(numbers)} of {total} documents or records are trained on too, such as number "
            f"{some([str(number) for number in numbers], 3)}, so what is measured on them is memory; take them out of one "
            "of the two"
        )


def _require_same_rows(stream: SampleStream) -> None:
    """Refuse records that are others on another rank, as those of a random source without a seed are."""
    if (rank := differing_rank(stream.fingerprint)) is not None:
        problem = f"data: the rows of rank {rank} are not those of rank 0; every process has to read the same ones"
        raise of_all_ranks(DataError(problem))


@contextlib.contextmanager
def elsewhere(data: DataConfig) -> Iterator[None]:
    """Add to a DataError about missing data that a run's relative paths count from where it was started."""
    try:
        yield
    except DataError as error:
        found = [part for part in component_data(data).values() if part.source is not DataSource.own]
        paths = [part.path for part in found if part.path and not re.match(r"package:|.*://", part.path)]
        gone = [path for path in paths if not os.path.isabs(path) and not os.path.exists(path)]
        if not gone:
            raise
        advice = f"the run's data.path={gone[0]} counts from the directory where it was started: go there first"
        raise type(error)(f"{error}; {advice}") from error


def with_own_tokenizer(data: DataConfig, directory: Path) -> DataConfig:
    """Return ``data`` with the run's copies of tokenizer and chat template in place of the same ones if gone."""
    if not (directory / INDEX_FILE).is_file():
        return data
    template, own = data.chat_template, directory / PUBLISHED_DIRECTORY / TEMPLATE_FILE
    is_gone = template and not Path(template).exists() and own.is_file() and not data.mixture
    if is_gone and read_config(directory).data.chat_template == template:
        get_logger().warning(f"data.chat_template={template} is not there; {own}, the run's copy, is used")
        data = dataclasses.replace(data, chat_template=str(own))
    kept = read_index(directory, check_sizes=False).tokenizer
    is_same = not Path(data.tokenizer).is_dir() and kept.facts is not None and kept.name == data.tokenizer
    return dataclasses.replace(data, tokenizer=str(directory)) if is_same else data


def remarks(config: TrainConfig, stream: SampleStream) -> list[str]:
    """Return warnings about the data of a run."""
    found, most = [], config.data.max_train_samples
    if most is not None and stream.num_samples < most:
        found.append(
            f"data.max_train_samples={most}: the data has {stream.num_samples} training samples, all are trained on"
        )
    if config.data.packing is Packing.concat and stream.has_answers:
        found.append(
            "data.packing=concat cuts the text every data.sequence_length tokens, which parts answers from their prompts; "
            "data.packing=best_fit keeps them in one sample"
        )
    if stream.num_cut and config.data.packing in (None, Packing.best_fit):
        done = "left out" if config.data.long_chats is LongChats.drop else "cut (data.long_chats=cut)"
        found.append(
            f"{counted(stream.num_cut, 'chat')} of more than data.sequence_length={stream.sequence_length} tokens: {done}"
        )
    elif stream.num_cut:
        found.append(
            f"{stream.num_cut} of {stream.num_ids} documents are longer than data.sequence_length={stream.sequence_length} "
            "tokens, of which the first are used"
        )
    theirs = published_labels(config.model) if config.model.pretrained and stream.label_names else []
    if theirs and theirs != list(stream.label_names):
        found.append(
            f"the head of model.name={config.model.name} knows the labels {some(theirs, 8)}, in this order, and the data has "
            f"{some(list(stream.label_names), 8)}: it begins with what it knows of others; model.init_from in place of "
            "model.name and model.pretrained begins with a fresh head"
        )
    weights_are_given = config.model.pretrained or config.model.init_from or config.model.kind is ModelKind.own
    has_spare_rows = config.task.kind == TaskKind.denoise  # sentinels
    if stream.tokenizer_directory and not weights_are_given and not has_spare_rows:
        tokenizer = read_index(stream.tokenizer_directory, check_sizes=False).tokenizer
        num_used = tokenizer.vocab_size + (config.task.kind in (TaskKind.masked_lm, TaskKind.seq2seq))
        num_rows, num_enough = config.model.vocab_size, -(-num_used // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        if num_rows > num_enough:
            found.append(
                f"model.vocab_size={num_rows}, but the tokenizer ({tokenizer.name}) has {tokenizer.vocab_size} ids: the "
                f"other rows are never used; model.vocab_size={num_enough} is enough"
            )
    return found


def with_steps(config: TrainConfig, stream: SampleStream, state: RunState | None) -> TrainConfig:
    """Return ``config`` with the steps of a run whose length is in epochs or tokens, and say how many these are."""
    done = {"step": state.step, "samples": state.samples} if state else {"step": 0, "samples": 0}
    stream.require_samples()
    sizes = {"num_samples": stream.num_samples, "sequence_length": stream.sequence_length}
    steps = steps_to_train(config.train, **sizes, **done)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    length = f"{config.train.epochs:g} epochs" if config.train.epochs is not None else f"{config.train.tokens:,} tokens"
    are = f"are done, at step {steps:,}" if state and steps == state.step else f"are {steps:,} steps"
    get_logger().info(f"{length} of {stream.num_samples:,} samples {are}")
    for warning in beyond_the_end(config):
        get_logger().warning(warning)
    return config


def train_loader(stream: SampleStream, config: TrainConfig, engine: Engine, *, start: Cursor) -> TrainLoader:
    """Return this rank's loader from ``start`` on."""
    return TrainLoader(
        stream,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=engine.mesh.dp_rank,
        dp_size=engine.mesh.dp_size,
        start=start,
        prefetch_steps=config.data.prefetch_steps,
        pin_memory=engine.device.type == "cuda",
        objective=build_objective(config.task),
    )


def held_out_batches(
    stream: SampleStream, config: TrainConfig, engine: Engine, *, batches: int
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of ``batches`` global batches of a set; see :func:`validation_batches`."""
    return validation_batches(
        stream,
        batches=batches,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=engine.mesh.dp_rank,
        dp_size=engine.mesh.dp_size,
        objective=build_objective(config.task),
    )


def check_continuation(state: RunState, config: TrainConfig, stream: SampleStream, world_size: int) -> list[str]:
    """Refuse to continue on other data or in another order; return what else has changed, a line each."""
    old = flatten(to_dict(TrainConfig())) | flatten(state.config) | {"world size": state.world_size}
    if old["data.split"] == "train" and config.data.split is None:  # what was the default is read without it
        old["data.split"] = None
    if old["data.packing"] == "concat" and config.data.packing is None:
        old["data.packing"] = None
    new = flatten(redact(to_dict(config))) | {"world size": world_size}
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changed = {key: f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if not key.startswith("run.")}
    problem = None
    if not config.data.allow_change and state.data_fingerprint != stream.fingerprint:
        problem = f"the checkpoint was trained on other data ({state.data_fingerprint}, now {stream.fingerprint})"
    elif not config.data.allow_change and state.data and not stream.continues(state.data):
        problem = f"step {state.step} would not have had the samples that the checkpoint has recorded"
    if problem:
        of_data = [text for key, text in changed.items() if key.startswith(("data.", "task.mask_", "train.seed"))]
        text = "the text itself has: its files, with data=stdlib Python, or how bigtrain prepares it"
        what = of_data or [
            f"no setting has changed, so {'the rows themselves have' if are_records(config.data) else text}"
        ]
        former = _corpus_of(config.data, state.data_fingerprint)
        what += [f"its own text, as it was prepared then: data=prepared data.path={former}"] if former else []
        advice = "restore that, choose another run.name, or go on with data.allow_change=true"
        raise CheckpointError("\n  ".join([f"{problem}:", *what, advice]))
    return list(changed.values())


def _corpus_of(data: DataConfig, fingerprint: str) -> Path | None:
    """Return the prepared corpus with this fingerprint, if it is there."""
    for path in sorted(Path(data.root).glob(f"*/{INDEX_FILE}")):
        with contextlib.suppress(DataError):
            if (index := read_index(path.parent, check_sizes=False)).fingerprint == fingerprint and not index.live:
                return path.parent
    return None


def require_tokenizer(checkpoint: Path, stream: SampleStream) -> None:
    """Raise a CheckpointError, on one rank, if the tokenizer of the data is not that of the checkpoint's run."""
    run, new = checkpoint.parent.parent, stream.tokenizer_directory
    if new is None or not (run / TOKENIZER_FILE).is_file():
        return
    if (run / TOKENIZER_FILE).read_bytes() == (new / TOKENIZER_FILE).read_bytes():
        return
    if load_tokenizer(run).to_str() != load_tokenizer(new).to_str():
        raise CheckpointError(
            f"the tokenizer of the data ({new / TOKENIZER_FILE}) is not the one that {checkpoint} was trained with "
            f"({run / TOKENIZER_FILE}), so the same ids are other text; data.tokenizer={run} keeps that one for the new text"
        )


def count_skipped_shards(stream: SampleStream, config: TrainConfig) -> dict[str, int]:
    """Return the metric of shards skipped by any rank, on rank 0; all ranks call this."""
    if config.data.on_bad_shard is not OnBad.skip:
        return {}
    found = gather_json(stream.skipped_shards)
    return {names.SKIPPED_SHARDS: len({tuple(shard) for shards in found for shard in shards})}


def with_class_weights(config: TrainConfig, train: SampleStream) -> TrainConfig:
    """Return ``config`` with the numbers that balanced weights are for these samples; all ranks call this."""
    if config.task.class_weights != BALANCED:
        return config
    weights = on_rank0(lambda: balanced_weights(train, config.task))
    get_logger().info(f"task.class_weights={BALANCED}: {', '.join(f'{weight:.4g}' for weight in weights)}")
    return dataclasses.replace(config, task=dataclasses.replace(config.task, class_weights=weights))


def balanced_weights(train: SampleStream, task: TaskConfig) -> list[float]:
    """Return the weight of each label, 1 of one that does not occur.

    One label per sample: ``samples / (labels that occur * samples with the label)``, as scikit-learn has it. Several:
    samples without the label by samples with it, ``pos_weight`` of torch.
    """
    parts = [part.labels() for part in train.components.values() if isinstance(part, StoredSamples)]
    labels = np.concatenate(parts)
    if task.multi_label:
        present, others = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
    else:
        present = np.bincount(labels[labels != IGNORE_INDEX], minlength=task.num_labels)
        others = present.sum() / np.count_nonzero(present)
    return np.where(present > 0, others / np.maximum(present, 1), 1.0).tolist()
