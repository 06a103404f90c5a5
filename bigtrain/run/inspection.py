"""What a step of a run trains on, as text."""

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.checkpoint.store import RunState, find_checkpoints, read_run_state
from bigtrain.config import Packing, TrainConfig, are_records
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.images import visible
from bigtrain.data.read.records import RecordSplit
from bigtrain.data.read.stream import SampleStream, StoredSamples
from bigtrain.data.read.tokenizer import load_tokenizer
from bigtrain.errors import ConfigError
from bigtrain.run.data import elsewhere, open_data
from bigtrain.run.directory import read_config
from bigtrain.tasks.base import IGNORE_INDEX

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHADES = " .:-=+*#%@"
_MOST_COLUMNS = 64
Columns = Mapping[str, NDArray[Any]]


def inspect_run(directory: Path, *, step: int, num_samples: int) -> Iterator[str]:
    """Yield the lines of :func:`inspect_step` for a run on disk, also after a change of its mixture."""
    config, found = read_config(directory), find_checkpoints(directory)
    state = read_run_state(found[-1]) if found else None
    with elsewhere(config.data):
        yield from inspect_step(config, step=step, num_samples=num_samples, state=state)


def inspect_step(config: TrainConfig, *, step: int, num_samples: int, state: RunState | None = None) -> Iterator[str]:
    """Yield lines that show samples of an optimizer step, from 1: of records, their columns; of text, its tokens.

    Tokens are separated by ``│``. Each is a target, predicted from those before; one that does not count is in ``⟦ ⟧``.
    A document (with ``data.document_mask`` all that its tokens see) begins with the token that opens it in ``( )``. The
    step is counted from the checkpoint with ``state``, by default from the beginning of the run. ConfigError: there is
    no such step, or it is from before a change of the mixture.
    """
    start, previous = (state.cursor, state.data) if state else (Cursor(), None)
    batch_size = config.train.global_batch_size
    first = start.samples + (step - 1 - start.step) * batch_size
    if step < 1 or first < (previous.origin_samples if previous else 0):
        raise ConfigError(f"step={step}: must be at least 1, and after the last change of the mixture")
    stream = open_data(config, previous)["train"]
    tokenizer = load_tokenizer(stream.tokenizer_directory) if stream.tokenizer_directory else None
    beyond = f", which ends at train.steps={config.train.steps}" if step > config.train.steps else ""
    yield f"step {step}: samples {first} to {first + batch_size - 1} of the run{beyond}"
    for number, sample_id in enumerate(stream.ids(first, batch_size)[:num_samples].tolist()):
        batch = stream.gather(np.array([sample_id]), np.array([first + number]))
        columns = {name: tensor[0].numpy() for name, tensor in batch.items()}
        component, places = stream.origin_of(sample_id)
        lines: Iterable[str]
        if config.data.packing in (Packing.documents, Packing.preferences):
            where, lines = f"{component} {sample_id}, document {places[0]}", _document_lines(stream, columns, tokenizer)
        elif "source" in columns and not are_records(config.data):
            where, lines = f"sample {sample_id}, with gaps", _document_lines(stream, columns, tokenizer)
        elif stream.collation is not None:
            counted = f"{np.count_nonzero(columns['targets'] != IGNORE_INDEX)} of {len(columns['targets'])}"
            where, lines = f"sample {sample_id}, {counted} tokens are predicted", [_masked_line(columns, tokenizer)]
        elif not are_records(config.data):
            counted = f"{np.count_nonzero(columns['targets'] != IGNORE_INDEX)} of {len(columns['targets'])}"
            where, lines = f"{component} {sample_id}, {counted} targets count", _text_lines(columns, places, tokenizer)
        else:
            samples = stream.components[component]
            assert isinstance(samples, StoredSamples) and isinstance(samples.split, RecordSplit)
            told = samples.split.records.describe(int(places[0]), first + number)
            where, lines = f"{component} {sample_id}, row {places[0]}{told}", _record_lines(stream, columns)
        yield ""
        yield f"── sample {number + 1} of {batch_size}: {where}"
        yield from (f"   {line}" for line in lines)


def _record_lines(stream: SampleStream, columns: Columns) -> Iterator[str]:
    for name, values in columns.items():
        if name == "pixels" and stream.facts:
            yield from _picture_lines(visible(values, stream.facts))
        else:
            yield f"{name}: {np.array2string(values, threshold=16, precision=4, separator=', ', prefix=f'   {name}: ')}"


def _picture_lines(pixels_HWC: NDArray[np.uint8]) -> Iterator[str]:
    """Yield lines that show an image, of a large one every n-th pixel: half blocks in a terminal, shades elsewhere."""
    every = -(-pixels_HWC.shape[1] // _MOST_COLUMNS)
    pixels = np.broadcast_to(pixels_HWC[::every, ::every], (*pixels_HWC[::every, ::every].shape[:2], 3)).astype(int)
    if not sys.stdout.isatty():
        for row in pixels.mean(axis=-1):
            yield "".join(2 * _SHADES[int(value * len(_SHADES) / 256)] for value in row)
        return
    rows = [*pixels, np.zeros_like(pixels[0])]
    for above, below in itertools.zip_longest(rows[:-1:2], rows[1::2]):
        colours = ([";".join(map(str, pixel.tolist())) for pixel in row] for row in (above, below))
        blocks = (f"\x1b[38;2;{front};48;2;{back}m▀" for front, back in zip(*colours, strict=True))
        yield "".join(blocks) + "\x1b[0m"


def _document_lines(stream: SampleStream, columns: Columns, tokenizer: "Tokenizer | None") -> Iterator[str]:
    """Yield the text of a document and its labels, each tag in ``[ ]`` behind its token; or a source and its target."""
    if "source" in columns:
        written = columns["targets"][columns["targets"] != IGNORE_INDEX]
        for name, ids in (("source", columns["source"][: columns["source_lengths"]]), ("target", written)):
            # What the tokenizer has not, such as a sentinel, is its number.
            yield f"{name}: {'│'.join(_text(token, tokenizer) or f'<{token}>' for token in ids.tolist())}"
        return
    if "chosen" in columns:
        told = {"chosen": "chosen", "rejected": "rejected"}
        if "labels" in columns:  # of rated answers, which are judged beside the answer to another prompt
            told = {"chosen": "good" if columns["labels"] else "bad", "rejected": "another prompt's"}
        for name, what in told.items():
            targets = columns[f"{name}_targets"]
            length = int(np.flatnonzero(targets != IGNORE_INDEX).max(initial=0)) + 1
            answer = {"tokens": columns[name][:length], "targets": targets[:length]}
            yield from (f"{what}: {line}" for line in _text_lines(answer, np.zeros(length, dtype=np.int64), tokenizer))
        return
    tokens = columns["tokens"][: columns["lengths"]]
    labels, names = columns.get("labels", columns.get("values")), stream.label_names
    tags = labels if labels.shape == columns["tokens"].shape else np.full(len(tokens), IGNORE_INDEX)
    pairs = zip(tokens.tolist(), tags.tolist(), strict=False)
    pieces = (_text(token, tokenizer) + (f"[{names[tag]}]" if tag != IGNORE_INDEX else "") for token, tag in pairs)
    yield f"text: {'│'.join(pieces)}"
    if "values" in columns:
        yield f"values: {labels.tolist()}"
    elif labels.ndim == 0:
        yield f"label: {names[int(labels)]}"
    elif labels is not tags:
        yield f"labels: {', '.join(names[label] for label in np.flatnonzero(labels).tolist()) or 'none'}"


def _masked_line(columns: Columns, tokenizer: "Tokenizer | None") -> str:
    """Return the tokens of a sample, predicted ones in ``[ ]`` behind what the network sees in their place."""
    pieces = []
    for token, target in zip(columns["tokens"].tolist(), columns["targets"].tolist(), strict=True):
        seen = _text(token, tokenizer) or "?"
        predicted = f"{'' if token == target else seen}[{_text(target, tokenizer)}]" if target != IGNORE_INDEX else seen
        pieces.append(predicted)
    return "│".join(pieces)


def _text_lines(columns: Columns, documents: NDArray[np.int64], tokenizer: "Tokenizer | None") -> Iterator[str]:
    tokens, targets = columns["tokens"], columns["targets"]
    counted = "\x1b[32m{}\x1b[0m" if sys.stdout.isatty() else "{}"
    for places in np.split(np.arange(len(documents)), np.flatnonzero(np.diff(documents)) + 1):
        document = int(documents[places[0]])
        if document < 0:
            yield f"padding: {len(places)}"
            continue
        pieces = []
        for place in places.tolist():
            is_counted, is_last = targets[place] != IGNORE_INDEX, place + 1 == len(tokens)
            # What does not count is known from the input after it.
            target = targets[place] if is_counted else None if is_last else tokens[place + 1]
            text = "…" if target is None else _text(int(target), tokenizer)
            pieces.append((is_counted, text))
        runs = [
            (counted if is_counted else "⟦{}⟧").format("│".join(text for _, text in run))
            for is_counted, run in itertools.groupby(pieces, key=itemgetter(0))
        ]
        yield f"document {document}: ({_text(int(tokens[places[0]]), tokenizer)}) {'│'.join(runs)}"


def _text(token: int, tokenizer: "Tokenizer | None") -> str:
    if tokenizer is None:
        return str(token)
    return repr(tokenizer.decode([token], skip_special_tokens=False))[1:-1]
