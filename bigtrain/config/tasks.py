"""What a task asks of network and data: without torch."""

import dataclasses

from bigtrain.config import DataConfig, DataSource, TaskConfig, TrainConfig, are_records, component_data
from bigtrain.config.choices import Content, Head, Inputs, ModelKind, Packing, TaskKind

SMALL_NETWORKS = ("mlp", "cnn", "rnn")
OF_DOCUMENTS = {
    TaskKind.classification.name: Content.labelled,
    TaskKind.token_classification.name: Content.tagged,
    TaskKind.regression.name: Content.numbers,
    TaskKind.seq2seq.name: Content.seq2seq,
}
"""Tasks whose samples of text are documents, and what these have to hold."""
HEAD_OF_INPUTS = {
    Inputs.pixels: Head.image_classification,
    Inputs.sequence: Head.audio_classification,
    Inputs.audio: Head.audio_classification,
}
WITHOUT_LENGTH = (Head.image_classification, Head.audio_classification)
"""Networks whose samples have no number of tokens."""


def check_task(config: TrainConfig) -> list[str]:
    """Return what does not go together of a task, its network and its data."""
    written = config.validation.written_samples and config.task.kind != TaskKind.seq2seq.name
    told = [f"validation.written_samples: task={config.task.kind} writes no texts; leave it out"] if written else []
    return [*told, *_check_masked_lm(config), *_check_records(config)]


def with_inputs(task: TaskConfig, data: DataConfig) -> TaskConfig:
    """Return ``task`` with the column that its network gets, which by default follows from the data."""
    if task.inputs or task.kind not in (TaskKind.classification.name, TaskKind.regression.name):
        return task
    are_images = all(part.source is DataSource.images for part in component_data(data).values())
    usual = Inputs.pixels if are_images else Inputs.features
    return dataclasses.replace(task, inputs=usual if are_records(data) else Inputs.tokens)


def head_of(task: TaskConfig) -> Head:
    """Return what a model of transformers ends with for a task."""
    if task.kind in (TaskKind.classification.name, TaskKind.regression.name):
        return HEAD_OF_INPUTS.get(task.inputs, Head.sequence_classification)
    heads = {kind.name: Head[kind.name] for kind in TaskKind if kind.name in Head.__members__}
    heads |= {TaskKind.seq2seq.name: Head.seq2seq_lm, TaskKind.speech.name: Head.speech_seq2seq}
    return heads.get(task.kind, Head.causal_lm)


def num_outputs_of(task: TaskConfig) -> int | None:
    """Return how many labels or values a task predicts; None if those are ids of a tokenizer."""
    if task.kind == TaskKind.regression.name:
        return task.num_values
    return task.num_labels if task.kind in (TaskKind.classification.name, TaskKind.token_classification.name) else None


def _check_records(config: TrainConfig) -> list[str]:
    """Find tasks of records that get text, and networks that take the other of the two."""
    task, model, problems = config.task.kind, config.model, []
    is_small = model.kind is ModelKind.own and model.name in SMALL_NETWORKS
    is_by_sample = task in (TaskKind.classification.name, TaskKind.regression.name)
    is_of_text = task in (TaskKind.causal_lm.name, TaskKind.masked_lm.name)
    if task in TaskKind.__members__ and not is_of_text:
        if task in OF_DOCUMENTS and not are_records(config.data):
            problems += _check_documents(config, OF_DOCUMENTS[task])
        elif not are_records(config.data):
            problems.append(
                f"task={task}: data={config.data.source.name} has no records; use data=records or your own data"
            )
        if model.kind is ModelKind.native:
            problems.append(
                f"task={task}: bigtrain's own decoder predicts text only; use +model=hf, a small network or your own"
            )
        if model.kind is ModelKind.hf and is_by_sample and config.task.inputs is Inputs.features:
            problems.append(
                f"task={task}: transformers has no network for task.inputs=features; use tokens, pixels, sequence or audio"
            )
    if is_small and not is_by_sample and task in TaskKind.__members__:
        problems.append(
            f"task={task}: model.name={model.name} predicts one label or vector a sample; it is for classification, regression"
        )
    if task in TaskKind.__members__ and task not in OF_DOCUMENTS:
        if config.data.packing is Packing.documents:
            problems.append(f"data.packing=documents: task={task} reads rows of documents; use concat or best_fit")
        problems += [
            f"data.content={part.content.name}: task={task} predicts no labels; use data.content=text"
            for part in component_data(config.data).values()
            if part.content.has_labels
        ]
    return problems


def _check_documents(config: TrainConfig, content: Content) -> list[str]:
    """Find text that is not labelled as the task needs it."""
    task, parts = config.task, component_data(config.data).values()
    rules = [
        (
            all(part.content is content or part.source is DataSource.prepared for part in parts),
            f"task={task.kind}: needs data.content={content.name} (text with what is predicted), or records (data=records)",
        ),
        (
            task.inputs in (None, Inputs.tokens),
            f"task.inputs={task.inputs and task.inputs.name}: text is tokens; leave it out, or use data=records",
        ),
        (
            config.data.packing is Packing.documents,
            f"data.packing={config.data.packing.name}: task={task.kind} makes a sample of each document; leave it out",
        ),
        (not config.data.document_mask, "data.document_mask: a sample is one document; leave it out"),
    ]
    return [problem for holds, problem in rules if not holds]


def _check_masked_lm(config: TrainConfig) -> list[str]:
    """Find what samples of hidden tokens cannot be made of, or predicted by."""
    model, data = config.model, config.data
    if config.task.kind != TaskKind.masked_lm.name:
        return []
    rules = [
        (
            model.kind is not ModelKind.native,
            "task=masked_lm: bigtrain's own decoder sees earlier tokens only; use +model=bert_mini, or another encoder with "
            "+model=hf",
        ),
        (data.packing is Packing.concat, "task=masked_lm: data.packing=best_fit pads samples; use data.packing=concat"),
        (not data.document_mask, "task=masked_lm: data.document_mask is not offered; leave it out"),
        (data.content is Content.text, f"task=masked_lm: data.content={data.content.name} is for answers; use text"),
    ]
    return [problem for holds, problem in rules if not holds]
