"""Sets of samples of their own that a run is measured on, beside what is held out of its training data."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import WITHOUT_TEXT, AugmentConfig, DataConfig, DataSource, TrainConfig
from bigtrain.data.prepare.corpus import prepare_components
from bigtrain.data.read.batch import Samples
from bigtrain.data.read.index import read_index
from bigtrain.data.read.overlap import seen_in_training
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.streams import open_streams
from bigtrain.distributed.collectives import on_rank0
from bigtrain.errors import DataError, some
from bigtrain.log import get_logger
from bigtrain.run.collation import build_collation
from bigtrain.tasks import build_objective

HELD_OUT = "validation"


class Relabelled:
    """Numbers the labels of samples as the training data does."""

    def __init__(self, names: list[str], wanted: list[str], *, are_several: bool) -> None:
        self._numbers, self._size, self._are_several = (
            np.array(list(map(wanted.index, names))),
            len(wanted),
            are_several,
        )

    def __call__(self, samples: Samples, positions: NDArray[np.int64]) -> Samples:
        """Return the samples with other labels; negative ones, which do not count, stay."""
        labels = samples["labels"]
        if self._are_several:
            renamed = np.zeros((len(labels), self._size), dtype=labels.dtype)
            renamed[:, self._numbers] = labels
        else:
            renamed = np.where(labels < 0, labels, self._numbers[labels])
        return Samples({**samples, "labels": renamed})


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

    Args:
        config: of the run.
        data: of the set; see :func:`bigtrain.config.set_data`.
        where: its setting.
        tokenizer: directory of the training data's corpus, or of the run; None if there is no text.
        label_names: of the training data, whose numbers its labels get.
        facts: of images that are trained on, by which its own are normalised.
        sequence_length: of samples of the training data, where ``data`` leaves it open.

    Raises:
        DataError: it cannot be prepared, has another tokenizer, or labels that the training data has not.
    """
    is_text = data.source not in WITHOUT_TEXT
    length = data.sequence_length or sequence_length
    data = dataclasses.replace(data, sequence_length=length, augment=AugmentConfig())
    if is_text and tokenizer and data.source is not DataSource.prepared:
        data = dataclasses.replace(data, tokenizer=str(tokenizer))
    directories = on_rank0(lambda: {name: str(path) for name, path in prepare_components(data, progress=True)})
    objective, train = build_objective(config.task), config.train
    stream = open_streams(
        data,
        directories,
        vocab_size=config.model.vocab_size,
        objective=None if is_text else objective,
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        sides=("train",),
        facts=facts,
    )["train"]
    stream.name = where
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
        stream.collated(Relabelled(list(stream.label_names), label_names, are_several=are_several))
    if collate := build_collation(config, stream.tokenizer_directory):
        stream.collated(collate)
    return stream


def sets_of(streams: Mapping[str, SampleStream], which: str) -> dict[str, SampleStream]:
    """Return the sets of ``validation`` or ``test`` among the streams of a run, by their own names."""
    found = {
        name.removeprefix(which).removeprefix("/"): stream for name, stream in streams.items() if name.startswith(which)
    }
    return dict(sorted(found.items()))


def tell_seen(train: SampleStream, measured: SampleStream) -> None:
    """Warn of samples of a set that are trained on too."""
    found = seen_in_training(train, measured)
    if found and found[0]:
        numbers, total = found
        get_logger().warning(
            f"{measured.name}: {len(numbers)} of {total} documents or records are trained on too, such as number "
            f"{some([str(number) for number in numbers], 3)}, so what is measured on them is memory; take them out of one of the two"
        )
