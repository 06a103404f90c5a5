"""From text to batches, in stages; each is a module that knows only those above it.

1. ``sources``    documents (id, text) of a source, in an order fixed by names.
2. ``survey``     first pass: sizes, train or validation by a hash of the document's id, BPE sample.
3. ``tokenizer``  bpe, bytes or Hugging Face, always as one ``tokenizer.json``.
4. ``prepare``    second pass: tokens on end, end-of-text after each document -> ``train.bin``,
   (``writer``)   ``validation.bin``, document offsets, and ``index.json`` (``index``) with sizes and hashes.
   ------------------------------------------------------------------ once; below: every run
5. ``corpus``     memory maps cut every T tokens: sample id -> T + 1 tokens. Or synthetic samples.
6. ``order``      (seed, optimizer step) -> sample ids of the global batch -> this rank's part.
7. ``loader``     ids -> micro-batches (``batch``: tokens, targets), in a background thread.

No state but the number of the step: order is a pure function, the same for every world size and
micro-batch. Ranks arrive as plain integers; nothing here knows of process groups.
"""

from bigtrain.config import DataConfig, DataSource
from bigtrain.data.corpus import Corpus, Split, SyntheticSplit
from bigtrain.data.prepare import prepared_directory

SPLITS = ("train", "validation")


def open_splits(config: DataConfig, *, vocab_size: int) -> dict[str, Split]:
    """Open both splits of what ``config`` names; a corpus must have been prepared before.

    Raises:
        DataError: not prepared, damaged, or the tokenizer has more than ``vocab_size`` ids.
    """
    if config.source is DataSource.synthetic:
        return {name: SyntheticSplit(name, vocab_size, config.synthetic_ragged) for name in SPLITS}
    corpus = Corpus.open(prepared_directory(config), vocab_size=vocab_size)
    return {name: corpus.split(name) for name in SPLITS}
