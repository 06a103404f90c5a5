"""What a task asks of network and data: without torch."""

import dataclasses
import math
from collections.abc import Iterator

from bigtrain.config import (
    PERPLEXITIES,
    DataConfig,
    DataSource,
    ModelConfig,
    TaskConfig,
    TrainConfig,
    are_records,
    component_data,
)
from bigtrain.config.choices import Content, Head, Inputs, ModelKind, Packing, PreferenceLoss, TaskKind

BALANCED = "balanced"
SMALL_NETWORKS = ("mlp", "cnn", "rnn", "gan")
OF_DOCUMENTS: dict[str, Content] = {
    TaskKind.classification: Content.labelled,
    TaskKind.token_classification: Content.tagged,
    TaskKind.regression: Content.numbers,
    TaskKind.seq2seq: Content.seq2seq,
    TaskKind.preference: Content.preference,
    TaskKind.reward: Content.preference,
    TaskKind.contrastive: Content.seq2seq,
}
"""Tasks whose samples of text are documents, and what these have to hold."""
PREDICT_LABELS = (TaskKind.classification, TaskKind.token_classification)
OF_NEXT_TOKENS = (TaskKind.causal_lm, TaskKind.preference, TaskKind.distillation)
"""Tasks of causal language models."""
OF_HIDDEN_TEXT = (TaskKind.masked_lm, TaskKind.denoise)
"""Tasks that hide part of plain text and predict it."""
WRITES = (TaskKind.seq2seq, TaskKind.denoise, TaskKind.ctc, TaskKind.speech)
"""Tasks of which texts are written."""
HEAD_OF_INPUTS = {
    Inputs.pixels: Head.image_classification,
    Inputs.sequence: Head.audio_classification,
    Inputs.audio: Head.audio_classification,
}
WITHOUT_LENGTH = (Head.image_classification, Head.audio_classification)
"""Networks whose samples have no number of tokens."""


def with_inputs(task: TaskConfig, data: DataConfig) -> TaskConfig:
    """Return ``task`` with the column that its network gets, and as many labels as a list of weights has."""
    if isinstance(task.class_weights, list) and task.num_labels is None and len(task.class_weights) > 1:
        task = dataclasses.replace(task, num_labels=len(task.class_weights))
    if task.inputs or task.kind not in (TaskKind.classification, TaskKind.regression):
        return task
    are_images = all(part.source is DataSource.images for part in component_data(data).values())
    usual = Inputs.pixels if are_images else Inputs.features
    return dataclasses.replace(task, inputs=usual if are_records(data) else Inputs.tokens)


def head_of(task: TaskConfig) -> Head:
    """Return what a model of transformers ends with for a task."""
    if task.kind in (TaskKind.classification, TaskKind.regression, TaskKind.reward):
        return HEAD_OF_INPUTS.get(task.inputs, Head.sequence_classification)
    heads = {kind.name: Head[kind.name] for kind in TaskKind if kind.name in Head.__members__}
    heads |= dict.fromkeys((TaskKind.seq2seq, TaskKind.denoise), Head.seq2seq_lm)
    heads |= {TaskKind.speech: Head.speech_seq2seq, TaskKind.contrastive: Head.embedding}
    return heads.get(task.kind, Head.causal_lm)


def packing_of(task: str) -> Packing:
    """Return how a task makes samples of documents."""
    return Packing.preferences if OF_DOCUMENTS.get(task) is Content.preference else Packing.documents


def num_outputs_of(task: TaskConfig) -> int | None:
    """Return how many labels or values a task predicts; None if those are ids of a tokenizer, or the data decides."""
    if task.kind == TaskKind.regression:
        return task.num_values
    if task.kind == TaskKind.reward:
        return 1
    return task.num_labels if task.kind in PREDICT_LABELS else None


def with_outputs(model: ModelConfig, task: TaskConfig) -> ModelConfig:
    """Return a model that ends as the task needs it, where it does not say otherwise."""
    if model.kind is ModelKind.hf:
        return dataclasses.replace(model, head=head_of(task), num_outputs=num_outputs_of(task))
    if model.kind is ModelKind.own and model.name == TaskKind.gan.name:
        num_inputs = model.settings.get("num_inputs") or task.noise_dim
        return dataclasses.replace(model, settings={**model.settings, "num_inputs": num_inputs})
    if model.kind is ModelKind.own and model.name in SMALL_NETWORKS and model.settings.get("num_outputs") is None:
        return dataclasses.replace(model, settings={**model.settings, "num_outputs": num_outputs_of(task)})
    return model


def check_task(config: TrainConfig) -> Iterator[str]:
    """Yield what does not go together of a task, its network and its data."""
    task, model, data = config.task, config.model, config.data
    if config.validation.written_samples and task.kind not in WRITES:
        yield f"validation.written_samples: task={task.kind} writes no texts; leave it out"
    if config.validation.frechet and task.kind != TaskKind.gan:
        yield f"validation.frechet: task={task.kind} makes no images; leave it out"
    yield from _check_gan(task, model)
    for name in ("prompts", "lm_eval"):
        if getattr(config.validation, name) and task.kind not in OF_NEXT_TOKENS:
            yield f"validation.{name}: task={task.kind} continues no text; leave it out"
    if task.kind in OF_HIDDEN_TEXT:
        yield from _check_hidden_text(task, model, data)
    yield from _check_class_weights(task)
    if task.multi_label and data.augment.mixup:
        yield "data.augment.mixup: blends one label with another, and task.multi_label has any number; leave it out"
    if task.group_by and (task.multi_label or not are_records(data) or data.source is DataSource.images):
        yield f"task.group_by={task.group_by}: a column of data=records or your own data, with one label a sample"
    are_images = all(part.source is DataSource.images for part in component_data(data).values())
    if config.validation.fgsm and (task.kind != TaskKind.classification or task.multi_label or not are_images):
        yield "validation.fgsm: it is for task=classification of data=images, with one label a sample; leave it out"
    for name in PERPLEXITIES if task.kind != TaskKind.causal_lm.name else ():
        if getattr(data, name) is not None:
            yield f"data.{name}: only samples of task=causal_lm are chosen by it; leave it out"
    if task.kind not in TaskKind.__members__:
        return
    is_by_sample = task.kind in (TaskKind.classification, TaskKind.regression)
    if task.kind in (TaskKind.distillation, TaskKind.preference) and model.kind is ModelKind.own:
        yield f"task={task.kind}: needs a causal language model: bigtrain's own or +model=hf"
    if task.kind == TaskKind.distillation:
        if data.scores is None:
            yield "task=distillation: learns what a teacher said; add data.scores=<what bigtrain score what=logits wrote>"
    elif task.kind not in (TaskKind.causal_lm, *OF_HIDDEN_TEXT):
        if task.kind in OF_DOCUMENTS and not are_records(data):
            is_rated = task.kind == TaskKind.preference and task.loss is PreferenceLoss.kto
            yield from _check_documents(task, data, Content.rated if is_rated else OF_DOCUMENTS[task.kind])
        elif not are_records(data):
            yield f"task={task.kind}: data={data.source.name} has no records; use data=records or your own data"
        if task.kind == TaskKind.preference:
            if task.loss.has_reference and model.adapter is None and data.scores is None:
                others = "" if task.loss is PreferenceLoss.kto else ", or choose task.loss=orpo or simpo"
                instead = f"add +adapter=lora or data.scores=<what bigtrain score wrote>{others}"
                yield f"task.loss={task.loss.name} compares with the model before training: {instead}"
            if task.loss.has_reference and model.adapter and model.adapter.also_train and data.scores is None:
                instead = "leave it out, or add data.scores=<what bigtrain score wrote>"
                yield f"model.adapter.also_train: task.loss={task.loss.name} compares with these as they were; {instead}"
        elif model.kind is ModelKind.native and task.kind != TaskKind.gan:
            yield f"task={task.kind}: bigtrain's own decoder predicts text only; use +model=hf, a small network or your own"
        if model.kind is ModelKind.hf and is_by_sample and task.inputs is Inputs.features:
            instead = "use tokens, pixels, sequence or audio"
            yield f"task={task.kind}: transformers has no network for task.inputs=features; {instead}"
    embeds = task.kind == TaskKind.contrastive and model.name == "rnn"
    continues = task.kind == TaskKind.causal_lm and model.settings.get("predicts_next", False)
    predicts_samples = model.kind is ModelKind.own and model.name in SMALL_NETWORKS and model.name != TaskKind.gan
    if predicts_samples and not (is_by_sample or embeds or continues):
        predicts = "predicts one label or vector a sample; it is for classification, regression"
        predicts += ", with model.settings.predicts_next=true for causal_lm" if model.name == "rnn" else ""
        yield f"task={task.kind}: model.name={model.name} {predicts}"
    given, predicted, is_small = model.settings.get("num_outputs"), num_outputs_of(task), model.name in SMALL_NETWORKS
    if model.kind is ModelKind.own and is_small and None not in (given, predicted) and given != predicted:
        yield f"model.settings.num_outputs={given}: task={task.kind} predicts {predicted}; leave num_outputs out"
    if task.kind not in OF_DOCUMENTS:
        if data.packing in (Packing.documents, Packing.preferences):
            yield f"data.packing={data.packing.name}: task={task.kind} reads rows of documents; use concat or best_fit"
        for content in (part.content for part in component_data(data).values()):
            if content.has_labels:
                yield f"data.content={content.name}: task={task.kind} predicts no labels; use data.content=text"


def _check_gan(task: TaskConfig, model: ModelConfig) -> Iterator[str]:
    is_gan = model.kind is ModelKind.own and model.name == TaskKind.gan.name
    if task.kind == TaskKind.gan and model.kind is not ModelKind.own:
        yield "task=gan: needs a generator and a discriminator: +model=gan_digits, or your own network with both"
    if is_gan and task.kind != TaskKind.gan:
        yield f"task={task.kind}: model.name=gan makes images; it is for task=gan"
    elif is_gan and (given := model.settings["num_inputs"]) != task.noise_dim:
        yield f"model.settings.num_inputs={given}: is task.noise_dim={task.noise_dim}; leave it out"


def _check_documents(task: TaskConfig, data: DataConfig, content: Content) -> Iterator[str]:
    parts = component_data(data).values()
    if not all(part.content is content or part.source is DataSource.prepared for part in parts):
        instead = f"data.content={content.name} (text with what is predicted), or records (data=records)"
        yield f"task={task.kind}: needs {instead}"
    if task.inputs not in (None, Inputs.tokens):
        yield f"task.inputs={task.inputs.name}: text is tokens; leave it out, or use data=records"
    if data.packing is not packing_of(task.kind):
        yield f"data.packing={data.packing.name}: task={task.kind} makes a sample of each document; leave it out"
    if data.document_mask:
        yield "data.document_mask: a sample is one document; leave it out"


def _check_class_weights(task: TaskConfig) -> Iterator[str]:
    weights = task.class_weights
    if weights in (None, BALANCED):
        return
    are_weights = isinstance(weights, list) and all(type(w) in (int, float) and 0 <= w < math.inf for w in weights)
    if not are_weights or len(weights) != task.num_labels or not any(weights):
        instead = f"{BALANCED}, or a list of task.num_labels={task.num_labels} numbers from 0 on, not all 0"
        yield f"task.class_weights={weights}: must be {instead}"


def _check_hidden_text(task: TaskConfig, model: ModelConfig, data: DataConfig) -> Iterator[str]:
    """Find what samples of hidden tokens cannot be made of, or predicted by."""
    is_pair = task.kind == TaskKind.denoise
    if model.kind is ModelKind.native:
        instead = "+model=t5_small, or bart" if is_pair else "+model=bert_mini, or another encoder"
        yield f"task={task.kind}: bigtrain's own decoder sees earlier tokens only; use {instead} with +model=hf"
    if data.packing not in (None, Packing.concat):
        yield f"task={task.kind}: data.packing={data.packing.name} pads samples; use data.packing=concat"
    if data.document_mask:
        yield f"task={task.kind}: data.document_mask is not offered; leave it out"
    if data.content is not Content.text:
        yield f"task={task.kind}: data.content={data.content.name} is for answers; use text"
    if is_pair and are_records(data):
        yield f"task={task.kind}: makes its pairs of text; pairs of records are task=seq2seq"
    if is_pair and data.sequence_length is not None and data.sequence_length < 3:
        yield f"task={task.kind}: data.sequence_length={data.sequence_length} leaves no gap; use 3 or more"
