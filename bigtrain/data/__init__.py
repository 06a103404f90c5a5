"""From text to batches, in stages; each is a module that knows only those above it.

1. ``sources``    parts of a source and their documents (``records``), in an order fixed by names.
2. ``survey``     first pass: sizes, filters and duplicates (``quality``), train or validation, BPE sample.
3. ``tokenizer``  bpe, bytes or Hugging Face, always as one ``tokenizer.json``.
4. ``prepare``    second pass (``tokenise``, ``encoder``), on all cores (``workers``): tokens on end,
                  end-of-text after each document, in shards of whole documents, and ``index.json``
                  (``index``) with sizes and hashes.
   ------------------------------------------------------------------ once; below: every run
5. ``corpus``     shards of tokens with their documents, in memory maps, from a directory or, by way
                  of a cache, from a URL (``remote``). Or synthetic samples.
6. ``packing``    shards cut into samples: sample id -> tokens, targets and, for a document mask, positions.
7. ``order``      position -> sample id of one data set; global batch -> this rank's part.
8. ``mixture``    position in the run -> which data set, and which of its samples.
9. ``stream``     6 to 8 put together: position in the run -> sample ids -> ``batch``.
10. ``loader``    steps, prepared ahead in a background thread; ``state`` is what a checkpoint keeps of it.

No state but a cursor (steps, samples, their hash): order is a pure function, the same for every world
size and micro-batch. Ranks arrive as plain integers; nothing here knows of process groups.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from bigtrain.config import DataConfig, DataSource, component_data
from bigtrain.cursor import DataState
from bigtrain.data.corpus import Split, SyntheticSplit
from bigtrain.data.index import read_index
from bigtrain.data.prepare import open_corpus, prepared_directory
from bigtrain.errors import DataError

if TYPE_CHECKING:
    from bigtrain.data.stream import SampleStream

SPLITS = ("train", "validation")


def open_splits(config: DataConfig, *, vocab_size: int) -> dict[str, Split]:
    """Open both splits of what ``config`` names; a corpus must have been prepared before.

    Raises:
        DataError: not prepared, damaged, or the tokenizer has more than ``vocab_size`` ids.
    """
    if config.source is DataSource.synthetic:
        return {name: SyntheticSplit(name, vocab_size, config.synthetic_ragged) for name in SPLITS}
    corpus = open_corpus(config, vocab_size=vocab_size)
    return {name: corpus.split(name) for name in SPLITS}


def open_streams(
    data: DataConfig, *, vocab_size: int, seed: int, global_batch_size: int, previous: DataState | None = None
) -> dict[str, "SampleStream"]:
    """Open both splits of all components as streams of samples; arguments as for :func:`build_stream`.

    Raises:
        DataError: as :func:`open_splits`.
    """
    from bigtrain.data.stream import build_stream  # torch: those who only prepare do not wait for it

    opened = {name: open_splits(part, vocab_size=vocab_size) for name, part in component_data(data).items()}
    _require_one_tokenizer(data)
    streams = {}
    for which in SPLITS:
        splits = {name: _named(name, component[which], data) for name, component in opened.items()}
        streams[which] = build_stream(
            which, splits, data, seed=seed, global_batch_size=global_batch_size, previous=previous
        )
    return streams


def _require_one_tokenizer(data: DataConfig) -> None:
    """Refuse a mixture in which the same number is another token in another component.

    Raises:
        DataError: which have which tokenizer.
    """
    parts = component_data(data).items()
    texts = {name: part for name, part in parts if part.source is not DataSource.synthetic}
    if len(texts) < 2:
        return
    found = {name: read_index(prepared_directory(part), check_sizes=False).tokenizer for name, part in texts.items()}
    if len({tokenizer.file.xxh3 for tokenizer in found.values()}) > 1:
        names = ", ".join(f"{name}: {tokenizer.name}" for name, tokenizer in found.items())
        raise DataError(
            f"data.mixture: the components were prepared with different tokenizers ({names}); prepare them with one"
        )


def _named(component: str, split: Split, data: DataConfig) -> Split:
    """Return a split of a mixture; synthetic ones of different components hold different samples."""
    if data.mixture and isinstance(split, SyntheticSplit):
        return replace(split, name=f"{component}/{split.name}")
    return split
