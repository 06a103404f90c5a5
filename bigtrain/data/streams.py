"""The streams of samples of a run, from all components of its data."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigtrain.config import OF_RECORDS, DataConfig, DataSource, LongChats, Packing, component_data
from bigtrain.config.parts import instance
from bigtrain.data.order.cursor import DataState
from bigtrain.data.prepare.live import open_live
from bigtrain.data.read.corpus import Corpus, open_corpus
from bigtrain.data.read.images import Augmentation, ImageSet, read_image_index
from bigtrain.data.read.index import INDEX_FILE, SPLITS, LabelKind, LabelRecord, read_index
from bigtrain.data.read.live import LiveParts, validation_split
from bigtrain.data.read.packing import AnySplit, SyntheticSamples
from bigtrain.data.read.records import RecordSplit, read_npz, split_records
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.read.workers import Helpers
from bigtrain.errors import DataError, some
from bigtrain.tasks.base import Objective

_TOLD = {
    LabelKind.one: "one label per document (data.content=labelled)",
    LabelKind.several: "any number of labels per document (data.content=labelled)",
    LabelKind.numbers: "numbers per document (data.content=numbers)",
    LabelKind.per_token: "a label per word (data.content=tagged)",
}
_MOST_NAMES = 20


def open_streams(
    data: DataConfig,
    directories: Mapping[str, str | Path],
    *,
    vocab_size: int,
    objective: Objective | None = None,
    seed: int,
    global_batch_size: int,
    validation_samples: int = 0,
    previous: DataState | None = None,
    sides: Sequence[str] = SPLITS,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, SampleStream]:
    """Open both splits of all components, prepared in ``directories``, as streams of samples.

    ``objective`` decides the columns of records; ``validation_samples`` are looked for in text that is tokenised while
    training; images are normalised by ``facts``. The rest is as in :class:`SampleStream`. DataError: a tokenizer has
    more ids than ``vocab_size``.
    """
    parts = component_data(data)
    corpora = _open_corpora(parts, directories, vocab_size, objective)
    helpers = Helpers(data.prepare_processes)
    live = {
        name: open_live(Path(directories[name]), parts[name], corpus.index, helpers)
        for name, corpus in corpora.items()
        if corpus.index.live
    }
    of_records = {name: part for name, part in parts.items() if part.source in OF_RECORDS}
    records: dict[str, dict[str, RecordSplit]] = {}
    for name, part in of_records.items():
        records[name] = _open_records(part, objective, directories.get(name), seed, facts)
        if part.source is DataSource.images:  # a mixture is normalised by its first images, as its predictions will be
            facts = facts or records[name]["train"].facts
    label_names = _label_names(corpora, records)

    def split(name: str, which: Any) -> AnySplit | LiveParts:
        if name in records:
            return records[name][which]
        if name in live and which == "validation":
            num_tokens = validation_samples * (data.sequence_length + 1)
            return validation_split(live[name], num_tokens=num_tokens, sequence_length=data.sequence_length)
        if name in corpora:
            return live.get(name) or corpora[name].split(which)
        own_name = f"{name}/{which}" if data.mixture else which  # those of different components hold different samples
        is_ragged = parts[name].synthetic_ragged
        return SyntheticSamples(own_name, vocab_size, data.sequence_length, is_ragged, data.document_mask)

    def open_all(data: DataConfig, *, keeps_all: bool) -> dict[str, SampleStream]:
        streams = {}
        for which in sides:
            splits = {name: split(name, which) for name in parts}
            streams[which] = SampleStream(
                which,
                splits,
                data,
                seed=seed,
                global_batch_size=global_batch_size,
                previous=previous,
                keeps_all=keeps_all or which == "validation",
            )
            streams[which].label_names = label_names
            streams[which].tokenizer_directory = next((Path(directories[name]) for name in corpora), None)
        return streams

    streams = open_all(data, keeps_all=False)
    train = streams["train"]
    if previous and train.has_answers and train.fingerprint == previous.fingerprint and not train.continues(previous):
        # A run goes on as it began: before samples without a target were left out, and long chats, or all, cut anywhere.
        older = [data, replace(data, long_chats=LongChats.split)]
        older += [] if data.packing else [replace(data, packing=Packing.concat)]
        for as_before, keeps_all in itertools.product(older, (True, False)):
            found = open_all(as_before, keeps_all=keeps_all)
            if found["train"].continues(previous):
                return found
    return streams


def _open_corpora(
    parts: Mapping[str, DataConfig], directories: Mapping[str, str | Path], vocab_size: int, objective: Objective | None
) -> dict[str, Corpus]:
    """Return the components of text, with one tokenizer and labels that the objective needs."""
    texts = {name: directory for name, directory in directories.items() if parts[name].source not in OF_RECORDS}
    corpora = {
        name: open_corpus(parts[name], vocab_size=vocab_size, directory=directory) for name, directory in texts.items()
    }
    tokenizers = {name: corpus.index.tokenizer for name, corpus in corpora.items()}
    if len({tokenizer.file.xxh3 for tokenizer in tokenizers.values()}) > 1:  # one number would be several tokens
        names = ", ".join(f"{name}: {tokenizer.name}" for name, tokenizer in tokenizers.items())
        raise DataError(
            f"data.mixture: the components were prepared with different tokenizers ({names}); prepare them with one"
        )
    for name, corpus in corpora.items():
        require_labels(corpus.index.labels, objective, where=str(directories[name]))
    return corpora


def _label_names(corpora: Mapping[str, Corpus], records: Mapping[str, dict[str, RecordSplit]]) -> list[str]:
    names = {name: corpus.index.labels.names for name, corpus in corpora.items() if corpus.index.labels}
    names |= {name: own for name, sides in records.items() if (own := sides["train"].facts.get("label_names"))}
    first = next(iter(names), None)
    for name, other in names.items():
        if other != names[first]:
            raise DataError(
                f"data.mixture: {name} has the labels {some(other, 8)}, {first} has {some(names[first], 8)}; a mixture "
                "needs the same ones"
            )
    return names[first] if first else []


def _open_records(
    data: DataConfig, objective: Objective, directory: str | Path | None, seed: int, facts: Mapping[str, Any] | None
) -> dict[str, RecordSplit]:
    """Return both sides of a component of records; images are in ``directory``."""
    if data.source is DataSource.images:
        source: Any = ImageSet(Path(directory), Augmentation(data.augment, seed))
        if facts:
            source.normalise_like(facts)
        names, num_labels = source.index.label_names, getattr(objective, "num_labels", None)
        if num_labels is not None and len(names) == 1 and not facts:  # a set to validate on may be of one
            raise DataError(
                f"data.path={data.path}: all images are of the class {names[0]}; there is nothing to tell apart"
            )
        wanted = objective.fields["labels"].shape if "labels" in objective.fields else source.labels.shape[1:]
        if len(wanted) != source.labels.ndim - 1:
            told = "one label; leave task.multi_label out" if wanted else "several labels; set task.multi_label=true"
            raise DataError(f"data.path={data.path}: each image has {told}")
        if num_labels is not None and num_labels < len(names):
            raise DataError(
                f"data.path={data.path}: has {len(names)} classes ({some(names, 4)}), but task.num_labels={num_labels}; set "
                f"task.num_labels={len(names)}"
            )
    elif data.source is DataSource.own:
        source = instance(data.path, data.settings, setting="data.path")
    else:
        source = read_npz(data.path)
    return split_records(
        source,
        objective,
        where=f"data.path={data.path}",
        sequence_length=data.sequence_length,
        validation_fraction=data.validation_fraction,
    )


def count_labels(directories: Iterable[str]) -> int:
    """Return how many labels prepared text or images have; 2 if none names them."""
    for directory in map(Path, directories):
        if (directory / INDEX_FILE).is_file():
            labels = read_index(directory, check_sizes=False).labels
            found = labels.names if labels else []
        else:
            found = read_image_index(directory).label_names
        if found:
            return max(len(found), 2)
    return 2


def require_labels(labels: LabelRecord | None, objective: Objective | None, *, where: str) -> None:
    """Refuse a corpus, named ``where``, whose labels are not those that an objective needs, or as many."""
    if objective and labels and "chosen" in objective.fields and "labels" not in objective.fields:
        raise DataError(f"{where}: the documents are rated answers, no pairs; use task.loss=kto")
    wanted = None if objective is None else _wanted(objective)
    if wanted is None:
        return
    kind, size = wanted
    if labels is None or labels.kind is not kind:
        found = _TOLD[labels.kind] if labels else "no labels"
        raise DataError(f"{where}: the documents have {found}; the task needs {_TOLD[kind]}")
    if kind is LabelKind.one and labels.size == 1:
        raise DataError(f"{where}: all documents have the label {labels.names[0]}; there is nothing to tell apart")
    if labels.size != size:
        what, setting = ("numbers", "num_values") if kind is LabelKind.numbers else ("labels", "num_labels")
        names = f" ({some(labels.names, _MOST_NAMES)})" if labels.names else ""
        raise DataError(
            f"{where}: the documents have {labels.size} {what}{names}, not {size}; set task.{setting}={labels.size}"
        )


def _wanted(objective: Objective) -> tuple[LabelKind, int] | None:
    """Return which labels, and how many of them, an objective on documents reads."""
    fields = objective.fields
    if "chosen" in fields and "labels" in fields:
        return LabelKind.one, 2
    if "lengths" not in fields:
        return None
    if "values" in fields:
        (size,) = fields["values"].shape
        return LabelKind.numbers, int(size)
    if "labels" not in fields:
        return None
    labels = fields["labels"]
    if labels.shape == ("T",):
        return LabelKind.per_token, int(labels.below or 0)
    if labels.shape:
        return LabelKind.several, int(labels.shape[0])
    return LabelKind.one, int(labels.below or 0)
