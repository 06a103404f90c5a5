"""What a step of a run trains on, as text."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bigtrain.checkpoint.store import find_checkpoints, read_run_state
from bigtrain.config import Packing, TrainConfig, are_records
from bigtrain.data.order.cursor import Cursor, DataState
from bigtrain.data.read.batch import Batch
from bigtrain.data.read.images import visible
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.read.tokenizer import load_tokenizer
from bigtrain.errors import ConfigError
from bigtrain.run.data import elsewhere, open_data
from bigtrain.run.directory import read_config
from bigtrain.run.pictures import picture_lines
from bigtrain.tasks.base import IGNORE_INDEX

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def inspect_run(directory: Path, *, step: int, num_samples: int) -> Iterator[str]:
    """Yield the lines of :func:`inspect_step` for a run on disk, also after a change of its mixture."""
    config, found = read_config(directory), find_checkpoints(directory)
    state = read_run_state(found[-1]) if found else None
    start = Cursor(state.step, state.samples) if state else Cursor()
    with elsewhere(config.data):
        yield from inspect_step(
            config, step=step, num_samples=num_samples, start=start, previous=state.data if state else None
        )


def inspect_step(
    config: TrainConfig,
    *,
    step: int,
    num_samples: int,
    start: Cursor | None = None,
    previous: DataState | None = None,
) -> Iterator[str]:
    """Yield lines that show the samples of an optimizer step: of records, their columns; of text, its tokens.

    Tokens are separated by ``│``. Each is a target, predicted from those before; one that does not count is in
    ``⟦ ⟧``. A document (with ``data.document_mask`` all that its tokens see) begins with the token that opens it in ``( )``.

    Args:
        config: resolved and checked.
        step: from 1.
        num_samples: samples to show.
        start: a place that the run has been at, by default its beginning.
        previous: of the checkpoint there.

    Raises:
        ConfigError: there is no such step, or it is from before a change of the mixture.
    """
    start = start or Cursor()
    batch_size = config.train.global_batch_size
    first = start.samples + (step - 1 - start.step) * batch_size
    if step < 1 or first < (previous.origin_samples if previous else 0):
        raise ConfigError(f"step={step}: must be at least 1, and after the last change of the mixture")
    stream = open_data(config, previous)["train"]
    tokenizer = load_tokenizer(stream.tokenizer_directory) if stream.tokenizer_directory else None
    is_text = not are_records(config.data)
    ids = stream.ids(first, batch_size)
    beyond = f", which ends at train.steps={config.train.steps}" if step > config.train.steps else ""
    yield f"step {step}: samples {first} to {first + batch_size - 1} of the run{beyond}"
    for number, sample_id in enumerate(ids[:num_samples].tolist()):
        batch = stream.gather(np.array([sample_id]), np.array([first + number]))
        title = f"sample {number + 1} of {batch_size}"
        if config.data.packing is Packing.documents:
            yield from _document_lines(stream, batch, sample_id, title, tokenizer)
        elif stream.collate is not None:
            yield from _masked_lines(batch, sample_id, title, tokenizer)
        elif is_text:
            yield from _sample_lines(stream, batch, sample_id, title, tokenizer)
        else:
            yield from _record_lines(stream, batch, sample_id, title, first + number)


def _record_lines(stream: SampleStream, batch: Batch, sample_id: int, title: str, position: int) -> Iterator[str]:
    component, rows = stream.origin_of(sample_id)
    told = stream.components[component].split.records.describe(int(rows[0]), position)
    yield ""
    yield f"── {title}: {component} {sample_id}, row {rows[0]}{told}"
    for name, tensor in batch.items():
        if name == "pixels" and stream.facts:
            yield from (f"   {line}" for line in picture_lines(visible(tensor[0].numpy(), stream.facts)))
            continue
        shown = np.array2string(tensor[0].numpy(), threshold=16, precision=4, separator=", ", prefix=f"   {name}: ")
        yield f"   {name}: {shown}"


def _document_lines(
    stream: SampleStream, batch: Batch, sample_id: int, title: str, tokenizer: "Tokenizer | None"
) -> Iterator[str]:
    """Yield the text of a document and its labels, each tag in ``[ ]`` behind its token; or a source and its target."""
    component, documents = stream.origin_of(sample_id)
    columns = {name: tensor[0].numpy() for name, tensor in batch.items()}
    yield ""
    yield f"── {title}: {component} {sample_id}, document {documents[0]}"
    if "source" in columns:
        written = columns["targets"][columns["targets"] != IGNORE_INDEX]
        for name, ids in (("source", columns["source"][: columns["source_lengths"]]), ("target", written)):
            yield f"   {name}: {'│'.join(_text(int(token), tokenizer) for token in ids)}"
        return
    tokens = columns["tokens"][: columns["lengths"]]
    labels, names = columns.get("labels", columns.get("values")), stream.label_names
    tags = labels if labels.shape == columns["tokens"].shape else np.full(len(tokens), IGNORE_INDEX)
    pairs = zip(tokens.tolist(), tags.tolist(), strict=False)
    pieces = (_text(token, tokenizer) + (f"[{names[tag]}]" if tag != IGNORE_INDEX else "") for token, tag in pairs)
    yield f"   text: {'│'.join(pieces)}"
    if "values" in columns:
        yield f"   values: {labels.tolist()}"
    elif labels.ndim == 0:
        yield f"   label: {names[int(labels)]}"
    elif labels is not tags:
        yield f"   labels: {', '.join(names[label] for label in np.flatnonzero(labels)) or 'none'}"


def _masked_lines(batch: Batch, sample_id: int, title: str, tokenizer: "Tokenizer | None") -> Iterator[str]:
    """Yield the tokens of a sample; a predicted one is in ``[ ]``, behind what the network sees in its place if that differs."""
    tokens, targets = batch["tokens"][0].tolist(), batch["targets"][0].tolist()
    pieces = []
    for token, target in zip(tokens, targets, strict=True):
        seen = _text(token, tokenizer) or "?"
        is_target, is_same = target != IGNORE_INDEX, token == target
        pieces.append(f"{'' if is_same else seen}[{_text(target, tokenizer)}]" if is_target else seen)
    counted = sum(target != IGNORE_INDEX for target in targets)
    yield ""
    yield f"── {title}: sample {sample_id}, {counted} of {len(targets)} tokens are predicted"
    yield f"   {'│'.join(pieces)}"


def _sample_lines(
    stream: SampleStream, batch: Batch, sample_id: int, title: str, tokenizer: "Tokenizer | None"
) -> Iterator[str]:
    tokens, targets = batch["tokens"][0].numpy(), batch["targets"][0].numpy()
    component, documents = stream.origin_of(sample_id)
    counted = int((targets != IGNORE_INDEX).sum())
    yield ""
    yield f"── {title}: {component} {sample_id}, {counted} of {len(targets)} targets count"
    for places in np.split(np.arange(len(documents)), np.flatnonzero(np.diff(documents)) + 1):
        document = int(documents[places[0]])
        if document < 0:
            yield f"   padding: {len(places)}"
            continue
        pieces = []
        for place in places.tolist():
            is_counted, is_last = targets[place] != IGNORE_INDEX, place + 1 == len(tokens)
            # What does not count is known from the input after it.
            target = targets[place] if is_counted else None if is_last else tokens[place + 1]
            text = "…" if target is None else _text(int(target), tokenizer)
            pieces.append(text if is_counted else f"⟦{text}⟧")
        yield f"   document {document}: ({_text(int(tokens[places[0]]), tokenizer)}) {'│'.join(pieces)}"


def _text(token: int, tokenizer: "Tokenizer | None") -> str:
    if tokenizer is None:
        return str(token)
    return repr(tokenizer.decode([token], skip_special_tokens=False))[1:-1]
