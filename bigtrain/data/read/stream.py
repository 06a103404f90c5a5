"""The samples of a run: one data set or a mixture of several, in the run's order.

A sample of the stream has one number: the components' samples are numbered on end, in the order of their names.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigtrain.config import ComponentConfig, DataConfig, Packing
from bigtrain.data.order.cursor import Cursor, DataState, chain_digest, extend, pieces
from bigtrain.data.order.mixture import Mixture, Share
from bigtrain.data.order.permutation import Order, derive_key, mix64
from bigtrain.data.read.batch import ArrayPool, Batch, Collation, Samples, build_batch, gather_groups
from bigtrain.data.read.corpus import FileSplit
from bigtrain.data.read.documents import DocumentSamples, document_samples
from bigtrain.data.read.live import LiveParts, LiveSamples
from bigtrain.data.read.packing import AnySplit, BestFitSamples, PackedSplit, build_packing, no_samples, packing_for
from bigtrain.data.read.records import RecordSplit
from bigtrain.data.read.scores import Scores
from bigtrain.errors import DataError

WINDOW_SHARDS = 8  # shards that data which has to be fetched is shuffled within, unless configured otherwise


class StoredSamples:
    """Samples of a prepared corpus, records, or synthetic ones: all are known from the beginning."""

    num_cut = 0  # documents that are longer than the sample that each is, chats that are longer than one

    def __init__(
        self, split: AnySplit, data: DataConfig, seed: int, *, keeps_all: bool = False, most_samples: int | None = None
    ) -> None:
        """Cut the split into samples; those without a target that counts are left out unless ``keeps_all``.

        Of more than ``most_samples``, so many are drawn: the same with every seed, more of them for a larger number.
        """
        window = data.shuffle_window_shards or (WINDOW_SHARDS if split.is_remote else None)
        if isinstance(split, FileSplit) and split.is_remote:
            _require_room(split, window, data.cache_gib)
        if data.packing in (Packing.documents, Packing.preferences) and isinstance(split, FileSplit):
            packed: DocumentSamples | PackedSplit = document_samples(split, data)
        else:
            packed = build_packing(split, data.sequence_length, data.packing, data.document_mask, data.long_chats)
        self.num_cut = packed.num_cut() if isinstance(packed, DocumentSamples | BestFitSamples) else 0
        self.fingerprint = split.fingerprint
        self.split = split
        self.num_ids, self.is_full = int(packed.shard_samples.sum()), packed.is_full
        self._answered = None if keeps_all else packed.answered()
        self.num_left_out = 0 if self._answered is None else self.num_ids - len(self._answered)
        if most_samples is not None:
            self._answered = _some_of(
                np.arange(self.num_ids) if self._answered is None else self._answered, most_samples
            )
        self._ends = np.cumsum(packed.shard_samples)
        self.order = Order(packed.shard_samples, seed, window)
        if self._answered is not None:
            self._draw(self._answered)
        self.gather, self.documents = packed.gather, packed.documents
        self._fetching: list[int] = []

    @property
    def num_samples(self) -> int:
        return self.order.num_samples

    def _draw(self, ids: NDArray[np.int64]) -> None:
        """From now on draw these samples, in ascending order, alone."""
        self._answered = ids
        self.order = dataclasses.replace(self.order, shard_samples=np.diff(np.searchsorted(ids, [0, *self._ends])))

    def keep(self, is_kept: NDArray[np.bool_]) -> int:
        """From now on draw only samples of which ``is_kept``, ``(num_ids,)``, is true; return how many others were drawn."""
        drawn = np.arange(self.num_ids) if self._answered is None else self._answered
        self._draw(drawn[is_kept[drawn]])
        return len(drawn) - self.num_samples

    def ids(self, first: int, count: int) -> NDArray[np.int64]:
        ids = self.order.ids(first, count)
        return ids if self._answered is None else self._answered[ids]

    def labels(self) -> NDArray[np.int64]:
        """Return the labels of the samples that are drawn, in the order of their numbers."""
        assert isinstance(self.split, FileSplit | RecordSplit)
        labels = self.split.all_labels()
        return labels if self._answered is None else labels[self._answered]

    def epochs(self, count: int) -> float:
        return count / max(self.num_samples, 1)

    def prefetch(self, first: int) -> None:
        """Begin to fetch what is needed from a position on: this window of shards and the next, if they are remote."""
        assert isinstance(self.split, FileSplit)
        shards = self.order.shards_ahead(first, min(2 * self.order.window_shards, self.split.cache_shards)).tolist()
        if shards != self._fetching:
            self._fetching = shards
            self.split.prefetch(shards)


def _some_of(ids: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    hashes = mix64(ids.astype(np.uint64) ^ np.uint64(derive_key(*b"most samples")))
    return np.sort(ids[np.argsort(hashes, kind="stable")[:number]])


def _require_room(split: FileSplit, window_shards: int, cache_gib: float) -> None:
    """Refuse windows that do not fit into the cache, for which each shard would be fetched again and again."""
    cached = split.cache_shards
    if cached < min(window_shards, len(split.shard_tokens)):
        raise DataError(
            f"data.cache_gib={cache_gib} holds {cached} shards of the {split.name} split, which is shuffled within "
            f"{window_shards} at a time; use a larger data.cache_gib or data.shuffle_window_shards={max(cached, 1)}"
        )


class SampleStream:
    """Position in the run -> sample id -> tokens."""

    tokenizer_directory: Path | None = None  # with its index; None without text
    label_names: Sequence[str] = ()  # of the labels that are predicted, where they have names
    collation: Collation | None = None  # what the task does to samples
    scores: Scores | None = None  # columns beside the samples

    def __init__(
        self,
        name: str,
        splits: Mapping[str, AnySplit | LiveParts],
        data: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        previous: DataState | None = None,
        keeps_all: bool = False,
    ) -> None:
        """Put the ``train`` or ``validation`` splits of all components together, as the resolved ``data`` says.

        Each component is ordered by ``seed`` as if it were alone; ``global_batch_size`` turns steps into positions.
        From the state ``previous`` of a checkpoint on other data a new mixture begins. ``keeps_all`` draws samples
        without a target that counts too: in validation, and in runs from before these were left out.
        """
        self.name = name
        records = [split.records for split in splits.values() if isinstance(split, RecordSplit)]
        lengths = {part.sequence_length for part in records} or {data.sequence_length}
        self.sequence_length: int | None = lengths.pop() if len(lengths) == 1 else None  # None: no sequences
        self.sample_size: int = max([part.sample_size for part in records] or [data.sequence_length])
        """Numbers in a sample, by which the loader decides how many it prepares at a time."""
        self.components: dict[str, StoredSamples | LiveSamples] = {}
        most_samples = data.max_train_samples if name == "train" else None
        for part, split in splits.items():
            if isinstance(split, LiveParts):
                is_same = previous and previous.fingerprints.get(part) == split.fingerprint
                place = previous.places.get(part) if is_same else None
                self.components[part] = LiveSamples(split, data, seed=seed, place=place, keeps_all=keeps_all)
            else:
                self.components[part] = StoredSamples(split, data, seed, keeps_all=keeps_all, most_samples=most_samples)
        self._list = list(self.components.values())
        self._live = {part: c for part, c in self.components.items() if isinstance(c, LiveSamples)}
        self._stored = [(i, part) for i, part in enumerate(self._list) if isinstance(part, StoredSamples)]
        self._remote = [(i, part) for i, part in self._stored if part.split.is_remote]
        self.is_live = bool(self._live)  # whether samples are made on the fly, so that to know ids may mean to tokenise
        self.is_remote = bool(self._remote)  # whether shards may have to be fetched
        self.is_full = all(component.is_full for component in self._list)  # all places are targets that count
        self.has_answers = any(split.has_answers for split in splits.values())  # only answers count
        self.facts = next((dict(s.facts) for s in splits.values() if isinstance(s, RecordSplit) and s.facts), {})
        """What is recorded with a run: of images their ``label_names``, ``mean`` and ``deviation``."""
        self.fingerprint = _fingerprint(splits, data)  # and proportions
        kinds = sorted({packing_for(split, data.packing).name for split in splits.values()})
        cut = f"{data.sequence_length} {' '.join(kinds)} {'masked' * data.document_mask}"
        if self.num_cut and data.packing in (None, Packing.best_fit):
            cut += f" {data.long_chats.name} {self.num_cut}"
        if data.source_length is not None:
            cut += f" {data.source_length}"
        if data.max_train_samples is not None and name == "train":
            cut += f" {data.max_train_samples} samples"
        self.content = f"{' '.join(component.fingerprint for component in self._list)} {cut}"  # for the digest
        self.skipped = [list(positions) for positions in previous.skipped] if previous else []
        """Ranges of positions that the run leaves out; see :mod:`bigtrain.data.order.cursor`."""
        self._origin_samples, origin_counts = _origin(splits, self.fingerprint, previous)
        self._origin_counts = {key: origin_counts.get(key, 0) for key in splits}
        shares = [
            _share(data.mixture.get(key, ComponentConfig()), component.num_samples, global_batch_size)
            for key, component in self.components.items()
        ]
        self.mixture = Mixture(shares, origin=self._origin_samples, counts=list(self._origin_counts.values()))
        sizes = np.array([component.num_ids for component in self._list], dtype=np.int64)
        self._ends = np.cumsum(sizes)
        self._begins = self._ends - sizes
        self._pool = ArrayPool()

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that a target stands for; None unless the stream is one corpus whose tokens all count."""
        split = self._stored[0][1].split if len(self._list) == len(self._stored) == 1 else None
        if not isinstance(split, FileSplit) or split.has_answers or split.may_skip:
            return None
        return split.bytes_per_token or None  # of ids alone it is not known

    @property
    def num_samples(self) -> int:
        """Different samples of all components that are drawn; there may be fewer that are made on the fly."""
        return sum(component.num_samples for component in self._list)

    @property
    def num_ids(self) -> int:
        """Numbers of samples, those that are left out too."""
        return int(self._ends[-1])

    @property
    def num_left_out(self) -> int:
        """Samples without a target that counts, so far as they are known."""
        return sum(component.num_left_out for component in self._list)

    @property
    def num_cut(self) -> int:
        """Documents that are longer than the sample that each of them is."""
        return sum(part.num_cut for _, part in self._stored)

    @property
    def skipped_shards(self) -> list[tuple[int, int]]:
        """Shards that this rank could not have, as (component, shard)."""
        return [(i, shard) for i, part in self._stored for shard in sorted(getattr(part.split, "skipped", ()))]

    def ids(self, first: int, count: int) -> NDArray[np.int64]:
        """Return ``count`` samples of the run after the first ``first``, int64 ``(count,)``; DataError past the end."""
        parts = [self._ids_at(begin, end - begin) for begin, end in pieces(first, count, self.skipped)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def leave_out(self, first: int, end: int) -> None:
        self.skipped = extend(self.skipped, first, end)

    def _ids_at(self, first: int, count: int) -> NDArray[np.int64]:
        components, indices = self.mixture.locate(first, count)
        ids = np.empty(count, dtype=np.int64)
        for number, num_drawn in enumerate(np.bincount(components).tolist()):
            if num_drawn:
                inside = components == number
                # The indices of one component are consecutive.
                chosen = self._list[number].ids(int(indices[inside.argmax()]), num_drawn)
                ids[inside] = chosen + self._begins[number]
        return ids

    def gather(self, sample_ids: NDArray[np.int64], positions: NDArray[np.int64] | None = None) -> Batch:
        """Return samples, int64 ``(N,)``, as they are at positions of the run, in validation at their ids."""
        positions = sample_ids if positions is None else positions
        samples = self._gather(sample_ids, positions)
        if self.collation is not None:
            samples = self.collation.apply(samples, positions)
        if self.scores is not None:
            samples |= {name: column[sample_ids] for name, column in self.scores.columns.items()}
        return build_batch(samples)

    def _gather(self, sample_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Samples:
        if len(self._list) == 1:
            return self._list[0].gather(sample_ids, positions)
        numbers = np.searchsorted(self._ends, sample_ids, side="right")
        return gather_groups(
            numbers,
            lambda i, rows: self._list[i].gather(sample_ids[rows] - self._begins[i], positions[rows]),
            self._pool,
        )

    def collated(self, collation: Collation) -> None:
        """From now on pass all samples through ``collation``."""
        self.collation = collation
        self.content = f"{self.content} {collation.told}"
        self.is_full = False

    def scored(self, scores: Scores) -> None:
        """From now on give these columns with all samples."""
        self.scores = scores
        self.content = f"{self.content} {scores.told}"

    def keep(self, is_kept: NDArray[np.bool_], told: str) -> int:
        """Draw only the samples of which ``is_kept`` from now on, of one data set; return how many others were drawn."""
        self.content = f"{self.content} {told}"
        ((_, part),) = self._stored
        return part.keep(is_kept)

    def prefetch(self, samples: int) -> None:
        counts = self.mixture.counts(self._position(samples)) if self.is_remote else []
        for i, part in self._remote:
            part.prefetch(counts[i])

    def origin_of(self, sample_id: int) -> tuple[str, NDArray[np.int64]]:
        """Return the component of a sample, and the document of each of its places, -1 for padding."""
        number = int(np.searchsorted(self._ends, sample_id, side="right"))
        documents = self._list[number].documents(int(sample_id - self._begins[number]))
        return list(self.components)[number], documents

    def require_samples(self) -> None:
        """Refuse to train on a component, or to validate on data, without a single sample; says what would help."""
        short = [name for name, component in self.components.items() if component.num_samples < 1]
        if short and (self.name == "train" or not self.num_samples):
            which = "" if len(self.components) == 1 else f" of data.mixture.{short[0]}"
            component = self.components[short[0]]
            if isinstance(component, StoredSamples) and isinstance(component.split, RecordSplit):
                raise DataError(
                    f"the {self.name} side{which} has no row; use more data, or another data.validation_fraction"
                )
            raise DataError(no_samples(self.name, self.sequence_length, component.num_left_out, which))

    def require_steps(self, start: Cursor, steps: int, global_batch_size: int) -> None:
        self.require_samples()
        available = self.mixture.num_positions
        if available is None:
            return
        left = available - self._position(start.samples)
        if (steps - start.step) * global_batch_size > left:
            enough_for = start.step + max(left, 0) // global_batch_size
            raise DataError(
                f"train.steps={steps}: there is data for {enough_for} steps of {global_batch_size} samples, until every "
                f"component of data.mixture has reached its max_epochs; use train.steps={enough_for} or a larger max_epochs"
            )

    def state(self, before: Cursor, after: Cursor) -> DataState:
        before_step = dict(zip(self.components, self.mixture.counts(self._position(before.samples)), strict=True))
        return DataState(
            fingerprint=self.fingerprint,
            samples=after.samples,
            digest=after.digest,
            previous_samples=before.samples,
            previous_digest=before.digest,
            counts=dict(zip(self.components, self.mixture.counts(self._position(after.samples)), strict=True)),
            fingerprints={name: component.fingerprint for name, component in self.components.items()},
            origin_samples=self._origin_samples,
            origin_counts=self._origin_counts,
            skipped=self.skipped,
            places={name: part.place(before_step[name] - 1) for name, part in self._live.items() if before_step[name]},
        )

    def progress(self, samples: int) -> dict[str, tuple[int, float]]:
        """Return, of each component, what the first ``samples`` of the run drew: tokens, else samples, and epochs."""
        counts = self.mixture.counts(self._position(samples))
        return {
            name: (count * (self.sequence_length or 1), component.epochs(count))
            for (name, component), count in zip(self.components.items(), counts, strict=True)
        }

    def _position(self, samples: int) -> int:
        return pieces(samples, 1, self.skipped)[0][0]

    def continues(self, state: DataState) -> bool:
        """Return whether the last step before a checkpoint has the samples that the checkpoint records."""
        if not all(part.is_at(state.places[name]) for name, part in self._live.items() if name in state.places):
            return False
        ids = self.ids(state.previous_samples, state.samples - state.previous_samples)
        return chain_digest(state.previous_digest, ids, self.content) == state.digest


def _origin(
    splits: Mapping[str, AnySplit | LiveParts], fingerprint: str, previous: DataState | None
) -> tuple[int, dict[str, int]]:
    if previous is None:
        return 0, {}
    if previous.fingerprint == fingerprint:
        return previous.origin_samples, previous.origin_counts
    same = [part for part, split in splits.items() if previous.fingerprints.get(part) == split.fingerprint]
    return pieces(previous.samples, 1, previous.skipped)[0][0], {part: previous.counts[part] for part in same}


def _share(component: ComponentConfig, num_samples: int, global_batch_size: int) -> Share:
    changes = [(change.step * global_batch_size, change.weight) for change in component.later_weights]
    limit = None if component.max_epochs is None else component.max_epochs * num_samples
    return Share(((0, component.weight), *changes), limit)


def _fingerprint(splits: Mapping[str, AnySplit | LiveParts], data: DataConfig) -> str:
    """Return the identity of a single data set as it is; of a mixture, what it is made of, readably."""
    if not data.mixture:
        (split,) = splits.values()
        is_part = data.max_train_samples is not None and not isinstance(split, LiveParts) and split.name == "train"
        return f"{split.fingerprint} {data.max_train_samples} samples" if is_part else split.fingerprint
    parts = []
    for name, split in splits.items():
        component = data.mixture[name]
        facts = [f"{name}={split.fingerprint}", f"weight {component.weight}"]
        facts += [f"from step {change.step} {change.weight}" for change in component.later_weights]
        facts += [f"max_epochs {component.max_epochs}"] if component.max_epochs is not None else []
        parts.append(" ".join(facts))
    return "; ".join(parts)
