"""The section of the configuration about the data; see ``config/__init__.py``."""

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from bigtrain.config.bounds import Bound, OnlyIf
from bigtrain.config.choices import Content, DataSource, Duplicates, LongChats, OnBad, Packing, TrainOn, Verify
from bigtrain.config.convert import LocalPath, PathOrUrl

_WITH_RECORDS = ("jsonl", "csv", "parquet", "arrow", "datasets")
WITH_LABELS = ("labelled", "numbers", "tagged", "rated")
_TO_PREPARE = OnlyIf("source", not_in=("prepared", "tokens", "records", "images", "own"))
"""What was prepared has been prepared with its own; records are no text."""
_OF_IMAGES = OnlyIf("source", is_in=("images",))


@dataclass(kw_only=True, slots=True)
class WeightChangeConfig:
    """A weight that holds from some step on."""

    step: Annotated[int, Bound(ge=1)]
    """Optimizer step that is the first with this weight."""
    weight: Annotated[float, Bound(ge=0)]
    """Weight from there on."""


@dataclass(kw_only=True, slots=True)
class SetConfig:
    """Samples to measure on; what it leaves open is as in the ``data`` section."""

    source: DataSource | None = None
    """See ``data.source``."""
    path: PathOrUrl | None = None
    """See ``data.path``."""
    settings: dict[str, Any] | None = None
    """See ``data.settings``."""
    subset: str | None = None
    """See ``data.subset``."""
    split: str | None = None
    """See ``data.split``; alone, another split of what is trained on."""


@dataclass(kw_only=True, slots=True)
class ComponentConfig(SetConfig):
    """One of the data sets of a mixture; what it leaves open is as in the ``data`` section."""

    weight: Annotated[float, Bound(ge=0)] = 1.0
    """Share of the samples, in proportion to the weights of the other components."""
    later_weights: list[WeightChangeConfig] = field(default_factory=list)
    """Changes of the weight, in the order of their steps."""
    max_epochs: Annotated[int | None, Bound(ge=1)] = None
    """Passes over the component after which it is left out; by default any number."""
    streaming: bool | None = None
    """See ``data.streaming``."""
    on_the_fly: bool | None = None
    """See ``data.on_the_fly``."""
    content: Content | None = None
    """See ``data.content``."""
    text_field: str | None = None
    """See ``data.text_field``."""
    messages_field: str | None = None
    """See ``data.messages_field``."""
    chat_template: LocalPath | None = None
    """See ``data.chat_template``."""
    train_on: TrainOn | None = None
    """See ``data.train_on``."""
    prompt_field: str | None = None
    """See ``data.prompt_field``."""
    answer_field: str | None = None
    """See ``data.answer_field``."""
    label_field: str | None = None
    """See ``data.label_field``."""
    source_field: str | None = None
    """See ``data.source_field``."""
    target_field: str | None = None
    """See ``data.target_field``."""


@dataclass(kw_only=True, slots=True)
class HeldOutConfig(SetConfig):
    """One set, or several with names."""

    sets: dict[str, SetConfig] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which documents are left out of a corpus; each is counted in its ``report.json``."""

    min_characters: Annotated[int, Bound(ge=0)] = 0
    """Shorter documents are left out."""
    max_characters: Annotated[int | None, Bound(ge=1)] = None
    """Longer documents are left out."""
    max_repeated_line_share: Annotated[float, Bound(ge=0, le=1)] = 1.0
    """Largest share of a document's characters in lines that it has had before."""
    max_symbol_share: Annotated[float, Bound(ge=0, le=1)] = 1.0
    """Largest share of a document's visible characters that are neither letters nor digits."""
    duplicates: Duplicates = Duplicates.keep
    """``exact`` leaves out documents that are equal to an earlier one, ``near`` also those that are similar (MinHash)."""
    near_similarity: Annotated[float, Bound(gt=0, le=1), OnlyIf("duplicates", is_in=("near",))] = 0.8
    """Share of 5-word sequences in common (Jaccard) from which on documents count as similar."""


@dataclass(kw_only=True, slots=True)
class AugmentConfig:
    """Random changes of training images, a function of the seed and the sample's place in the run."""

    crop_padding: Annotated[int, Bound(ge=0, le=4096)] = 0
    """Pixels of black padding on each side, before a crop of the old size at a random place."""
    flip: bool = False
    """Mirror half of the images left to right."""
    rotation: Annotated[float, Bound(ge=0, le=180)] = 0.0
    """Largest angle in degrees, either way."""
    mixup: Annotated[float, Bound(ge=0, le=1)] = 0.0
    """Blend each image and its label with those of a random other one, in shares drawn from Beta(mixup, mixup); 0: never."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which tokens are trained on, and how they are cut."""

    source: DataSource = DataSource.stdlib
    """``stdlib`` is the embedded corpus: the Python standard library's source on this machine."""
    path: Annotated[PathOrUrl | None, OnlyIf("source", not_in=("stdlib", "synthetic"))] = None
    """File, directory or glob for ``text``, ``jsonl``, ``csv``, ``gettext`` (catalogues, ``.mo``), ``parquet`` and ``arrow``; ``.npz`` file with an array per column for ``records``; for ``images`` a directory with one of images per class, MNIST's files, parquet with image bytes, a URL of these, ``package:digits`` or ``package:fashion_mnist``; for ``own`` the name of an own part, such as ``ideas.stars``; dataset name or directory for ``datasets``; for ``tokens`` files of ids by Megatron-LM, datatrove, nanoGPT, llm.c and others; for ``prepared`` a corpus that was prepared before, as a directory or URL (``s3://``, ``gs://``, ``hf://``, ``https://`` and all that fsspec knows)."""
    settings: Annotated[dict[str, Any], OnlyIf("source", is_in=("own",))] = field(default_factory=dict)
    """Settings of an own part."""
    subset: Annotated[str | None, OnlyIf("source", is_in=("datasets",))] = None
    """The dataset's configuration name."""
    split: Annotated[str | None, OnlyIf("source", is_in=_WITH_RECORDS)] = None
    """Of ``datasets`` and ``arrow``, and of ``parquet`` and ``jsonl`` files named as ``train-00000-of-00002.parquet`` or ``train.jsonl``: the split; by default the only one, of ``datasets`` train."""
    streaming: Annotated[bool, OnlyIf("source", is_in=("datasets",))] = False
    """Read the rows as they arrive instead of downloading the dataset first."""
    on_the_fly: Annotated[
        bool, OnlyIf("source", not_in=("prepared", "tokens", "synthetic", "records", "images", "own"))
    ] = False
    """Tokenise while training, without preparing a corpus first; the order is as exact, but shuffled by windows."""
    content: Annotated[Content, _TO_PREPARE] = Content.text
    """``text``; or for supervised fine-tuning ``chat`` (messages with role and content) or ``pairs`` (prompt and answer), of which only the answers count in the loss; ``preference`` (messages ``chosen`` and ``rejected``, behind the same beginning or a ``prompt``) or ``rated`` (``prompt``, ``completion``, and a label that says if it is good); or for tasks on documents ``labelled`` (a text with a label, or a list of them; of ``text`` its directory, of ``stdlib`` its package), ``numbers`` (a text with a number, or a list of them) ``tagged`` (a list of words with a list of labels) or ``seq2seq`` (a text and what it becomes; of ``stdlib`` pieces in twos)."""
    text_field: Annotated[
        str,
        OnlyIf("source", is_in=_WITH_RECORDS),
        OnlyIf("content", not_in=("chat", "pairs", "seq2seq", "preference", "rated")),
    ] = "text"
    """Field that holds the text, of ``tagged`` the words, in ``jsonl``, ``csv``, ``parquet``, ``arrow`` and ``datasets``."""
    messages_field: Annotated[str, OnlyIf("content", is_in=("chat",))] = "messages"
    """Field with the messages of a ``chat``; rows without it may be of ShareGPT's, Alpaca's or TRL's form (docs/data.md)."""
    chat_template: Annotated[LocalPath | None, OnlyIf("content", is_in=("chat", "preference", "rated"))] = None
    """File of the Jinja template that writes a ``chat`` or ``preference``, as transformers reads it; by default the tokenizer's own, for ``bpe`` and ``bytes`` ChatML in plain text."""
    train_on: Annotated[TrainOn, OnlyIf("content", is_in=("chat",))] = TrainOn.answers
    """Turns of a ``chat`` that count in the loss: the ``answers``, of each chat the ``last_answer``, or ``all``; answers with ``weight: 0`` never do."""
    prompt_field: Annotated[str, OnlyIf("content", is_in=("pairs",))] = "prompt"
    """Field with the prompt of ``pairs``."""
    answer_field: Annotated[str, OnlyIf("content", is_in=("pairs",))] = "answer"
    """Field with the answer of ``pairs``."""
    label_field: Annotated[str, OnlyIf("source", is_in=_WITH_RECORDS), OnlyIf("content", is_in=WITH_LABELS)] = "label"
    """Field with the label, the labels or the numbers of a document."""
    source_field: Annotated[str, OnlyIf("content", is_in=("seq2seq",))] = "source"
    """Field with the text that an encoder reads."""
    target_field: Annotated[str, OnlyIf("content", is_in=("seq2seq",))] = "target"
    """Field with the text that a decoder writes."""
    image_size: Annotated[int | None, Bound(ge=1, le=8192), _OF_IMAGES] = None
    """Height and width to which ``images`` are resized (the shorter side, bilinear) and cropped at the centre; by default that of the first one, which all must have."""
    image_channels: Annotated[int | None, Bound(ge=1, le=3), _OF_IMAGES] = None
    """1 for grey, 3 for colour; by default as the first one."""
    augment: Annotated[AugmentConfig, _OF_IMAGES] = field(default_factory=AugmentConfig)
    filters: Annotated[FilterConfig, _TO_PREPARE] = field(default_factory=FilterConfig)
    root: LocalPath = "data"
    """Directory that holds prepared corpora."""
    tokenizer: Annotated[LocalPath, OnlyIf("source", not_in=("prepared", "images"))] = "bpe"
    """``bpe`` trains a byte-level BPE on the corpus (with pretrained weights it means theirs), ``bytes`` uses bytes; anything else is a Hugging Face tokenizer by name or path, or the directory of a run or prepared corpus. Of records only to read what is written."""
    tokenizer_vocab_size: Annotated[int, Bound(ge=257, le=10**7), _TO_PREPARE, OnlyIf("tokenizer", is_in=("bpe",))] = (
        4096
    )
    """Vocabulary size of the trained ``bpe``: 256 bytes, the end of a text, and merges."""
    shard_tokens: Annotated[int, Bound(ge=1), _TO_PREPARE] = 67_108_864
    """Prepared shards end with the document by which they hold so many tokens."""
    prepare_processes: Annotated[int | None, Bound(ge=1, le=1024)] = None
    """Processes that prepare a corpus, by default one per core; with ``on_the_fly`` of each rank, by default 2."""
    validation_fraction: Annotated[float, Bound(ge=0, lt=1), OnlyIf("source", not_in=("prepared", "tokens"))] = 0.02
    """Share of the documents or records that is kept for validation; 0 where ``validation`` names others."""
    validation: HeldOutConfig = field(default_factory=HeldOutConfig)
    """Sets of your own that are validated on, in place of a share of the training data."""
    test: HeldOutConfig = field(default_factory=HeldOutConfig)
    """Sets that are measured on once, when the run is finished."""
    cache_directory: LocalPath | None = None
    """Where shards from a URL and what was tokenised on the fly are kept, best on a disk of the node; by default ``<root>/cache``."""
    cache_gib: Annotated[float, Bound(gt=0)] = 100.0
    """Size of that cache; what was not used for longest makes room."""
    verify: Verify = Verify.full
    """``full`` compares local shards with their hashes before a run, ``sizes`` only their sizes; from a URL they are always hashed."""
    on_bad_row: Annotated[OnBad, OnlyIf("source", not_in=("prepared", "tokens", "records", "own"))] = OnBad.stop
    """``skip`` leaves out rows that are no documents, images that cannot be decoded, and files that cannot be read to their end, and counts them."""
    on_bad_shard: OnBad = OnBad.stop
    """``skip`` goes on when a shard is missing or damaged for good: the order stays, its tokens do not count in the loss."""
    sequence_length: Annotated[int | None, Bound(ge=1)] = None
    """Tokens per sample; by default the model's ``max_positions``. Sequences in records are filled up to it; with a model of yours that has no setting ``max_positions`` it is by default that of the first record."""
    packing: Annotated[Packing | None, OnlyIf("source", not_in=("synthetic", "records", "images", "own"))] = None
    """``concat`` cuts documents on end every so many tokens; ``best_fit`` cuts none that fits into a sample, and pads; by default ``best_fit`` where only answers count, which keeps them with their prompts, else ``concat``; ``documents``, of which classification and the like make samples, puts each into one of its own, and leaves out what is longer; ``preferences`` makes a pair of answers of each."""
    long_chats: LongChats = LongChats.cut
    """Of chats and pairs that are longer than a sample: ``cut`` keeps the beginning, in which an answer that the end parts does not count if another one is whole; ``drop`` leaves them out; ``refuse`` stops; ``split`` makes several samples, as of plain text. Not with ``packing=concat``."""
    source_length: Annotated[int | None, Bound(ge=1), OnlyIf("content", is_in=("seq2seq",))] = None
    """Tokens of a source; by default ``sequence_length``, which is that of targets."""
    document_mask: Annotated[bool, OnlyIf("source", not_in=("records", "images", "own"))] = False
    """Attention stays within documents and positions count from the beginning of each."""
    max_train_samples: Annotated[int | None, Bound(ge=1)] = None
    """Train on no more samples than these, the same ones with every seed; a larger number has them too."""
    scores: LocalPath | None = None
    """Directory of columns that ``bigtrain score`` has written beside the same samples, such as the log-probabilities of a reference or a teacher."""
    min_perplexity: Annotated[float | None, Bound(ge=1), OnlyIf("scores", not_in=(None,))] = None
    """Train on samples of which the model that wrote ``scores`` has at least this perplexity, with ``task=causal_lm``."""
    max_perplexity: Annotated[float | None, Bound(ge=1), OnlyIf("scores", not_in=(None,))] = None
    """At most this perplexity."""
    shuffle_window_shards: Annotated[int | None, Bound(ge=1)] = None
    """Shuffle within so many shards (on the fly: parts of the source, of 8 MB or a whole compressed file each) at a time; by default 8 for data that has to be fetched, about 64 MB on the fly, everything for prepared local data."""
    mixture: dict[str, ComponentConfig] = field(default_factory=dict)
    allow_change: bool = False
    """Continue a checkpoint although its data or mixture was another; components with the same name and data go on where they were."""
    prefetch_steps: Annotated[int, Bound(ge=1, le=1000)] = 4
    """Optimizer steps of batches prepared ahead in the background."""
    synthetic_ragged: Annotated[bool, OnlyIf("source", is_in=("synthetic",))] = False
    """Mask a random tail of each sample, so that ranks hold different numbers of targets."""


OF_RECORDS = (DataSource.records, DataSource.images, DataSource.own)
"""Sources whose samples are records of named columns."""
PERPLEXITIES = ("min_perplexity", "max_perplexity")
"""Settings of the perplexities of samples that are trained on."""
WITHOUT_TEXT = (DataSource.synthetic, *OF_RECORDS)
"""Sources of which nothing is tokenised."""


def is_live(data: DataConfig) -> bool:
    """Return whether a data set is tokenised while training."""
    return data.on_the_fly and data.source not in (DataSource.prepared, DataSource.tokens, *WITHOUT_TEXT)


def are_records(data: DataConfig) -> bool:
    return all(part.source in OF_RECORDS for part in component_data(data).values())


def component_data(data: DataConfig) -> dict[str, DataConfig]:
    """Return the ``data`` section of every component of a mixture by name; of a single data set, itself as ``data``."""
    if not data.mixture:
        return {"data": data}
    return {name: replace(data, mixture={}, **_given(part)) for name, part in sorted(data.mixture.items())}


def own_sets(data: DataConfig, which: str) -> dict[str, DataConfig]:
    """Return the ``data`` section of each set of ``data.validation`` or ``data.test`` by name; that without one is ``""``."""
    held: HeldOutConfig = getattr(data, which)
    unnamed = {"": held} if any(_given(held).values()) else {}
    return {name: set_data(data, part) for name, part in (unnamed | dict(sorted(held.sets.items()))).items()}


def set_data(data: DataConfig, part: SetConfig) -> DataConfig:
    """Return the ``data`` section of a set: all of it is measured on, and it is prepared whatever training does."""
    changes: dict[str, Any] = {"mixture": {}, "validation": HeldOutConfig(), "test": HeldOutConfig()}
    changes |= {"validation_fraction": 0.0, "on_the_fly": False}
    if part.path:  # these are of ``data.path``
        changes |= {"split": None, "subset": None, "settings": {}}
    return replace(data, **(changes | _given(part)))


def _given(part: SetConfig) -> dict[str, Any]:
    """Return what ``part`` says of settings that the ``data`` section has, too."""
    shared = [f.name for f in fields(part) if f.name in DataConfig.__dataclass_fields__]
    return {name: value for name in shared if (value := getattr(part, name)) is not None}
