"""From text to batches, in three rooms of which each knows only those named before it.

``order``    position in the run -> which component of a mixture, which of its samples: pure functions of the seed, the
             same for every world size and micro-batch. No state but a cursor (steps, samples, their hash).
``read``     what every run does. ``corpus``: shards of tokens with their documents in memory maps, from a directory or
             by way of a ``cache`` from a URL (``remote``); or parts of a source that are tokenised when they are
             needed (``live``); or ``records``. ``packing``: a sample's tokens, targets and, for a document mask,
             positions. ``stream``: position in the run -> sample ids -> ``batch``. ``loader``: steps, prepared ahead
             in a background thread. ``tokenizer``: bpe, bytes or Hugging Face, always as one ``tokenizer.json``.
``prepare``  what is done once. ``sources``: parts of a source and their documents (``records``, ``chat``), in an order
             fixed by names. ``survey``: sizes, filters and duplicates, train or validation, BPE sample. ``corpus``:
             tokens on end (``tokenise``, ``encoder``), in shards of whole documents, and ``index.json``.

``streams`` opens what a run reads. Ranks arrive as plain integers; nothing here knows of process groups.
"""
