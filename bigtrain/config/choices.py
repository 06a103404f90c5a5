"""What settings choose from; the fields of :mod:`bigtrain.config` say what each choice means."""

from enum import Enum


class ModelKind(Enum):
    native = "native"
    hf = "hf"
    own = "own"


class TaskKind(Enum):
    causal_lm = "causal_lm"
    masked_lm = "masked_lm"
    classification = "classification"
    token_classification = "token_classification"
    regression = "regression"
    seq2seq = "seq2seq"
    denoise = "denoise"
    contrastive = "contrastive"
    ctc = "ctc"
    speech = "speech"
    preference = "preference"


class PreferenceLoss(Enum):
    """How pairs of answers are compared."""

    dpo = "dpo"
    ipo = "ipo"
    orpo = "orpo"
    simpo = "simpo"

    @property
    def has_reference(self) -> bool:
        """Whether it compares with the model before training."""
        return self in (PreferenceLoss.dpo, PreferenceLoss.ipo)


class Noise(Enum):
    """What is done to a text that is to be restored."""

    spans = "spans"
    infilling = "infilling"


class Inputs(Enum):
    tokens = "tokens"
    pixels = "pixels"
    features = "features"
    sequence = "sequence"
    audio = "audio"


class Head(Enum):
    causal_lm = "causal_lm"
    masked_lm = "masked_lm"
    sequence_classification = "sequence_classification"
    token_classification = "token_classification"
    image_classification = "image_classification"
    audio_classification = "audio_classification"
    seq2seq_lm = "seq2seq_lm"
    ctc = "ctc"
    embedding = "embedding"
    speech_seq2seq = "speech_seq2seq"


class Positions(Enum):
    learned = "learned"
    rope = "rope"


class Norm(Enum):
    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class Activation(Enum):
    gelu = "gelu"
    swiglu = "swiglu"


class DataSource(Enum):
    stdlib = "stdlib"
    text = "text"
    jsonl = "jsonl"
    csv = "csv"
    gettext = "gettext"
    parquet = "parquet"
    arrow = "arrow"
    datasets = "datasets"
    prepared = "prepared"
    synthetic = "synthetic"
    records = "records"
    images = "images"
    own = "own"


class Packing(Enum):
    concat = "concat"
    best_fit = "best_fit"
    documents = "documents"
    preferences = "preferences"


class Content(Enum):
    """What a record of a source is."""

    text = "text"
    chat = "chat"
    pairs = "pairs"
    labelled = "labelled"
    numbers = "numbers"
    tagged = "tagged"
    seq2seq = "seq2seq"
    preference = "preference"

    @property
    def has_answers(self) -> bool:
        """Whether only part of a document counts as targets."""
        return self in (Content.chat, Content.pairs, Content.seq2seq, Content.preference)

    @property
    def is_chat(self) -> bool:
        """Whether a chat template writes its records."""
        return self in (Content.chat, Content.preference)

    @property
    def has_labels(self) -> bool:
        """Whether documents have labels beside their text."""
        return self in (Content.labelled, Content.numbers, Content.tagged)


class Duplicates(Enum):
    keep = "keep"
    exact = "exact"
    near = "near"


class OnBad(Enum):
    """What happens when a shard is missing or damaged and stays so, or a row or file of a source is damaged."""

    stop = "stop"
    skip = "skip"


class EngineKind(Enum):
    """How the run is computed; the numbers are the same under all of them."""

    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    accelerate = "accelerate"


class AdapterKind(Enum):
    """How adapters change a linear layer."""

    lora = "lora"
    dora = "dora"


class Offload(Enum):
    none = "none"
    cpu = "cpu"


class Precision(Enum):
    """Precision of the forward and backward pass; master weights are fp32 in all."""

    bf16 = "bf16"
    fp32 = "fp32"
    tf32 = "tf32"
    fp8 = "fp8"

    @property
    def base(self) -> "Precision":
        """What is computed outside of the matrix products that are in ``tf32`` or ``fp8``."""
        return {Precision.tf32: Precision.fp32, Precision.fp8: Precision.bf16}.get(self, self)


class Load(Enum):
    """What a run takes of another run's checkpoint."""

    all = "all"
    weights = "weights"


class ActivationCheckpointing(Enum):
    none = "none"
    full = "full"
    selective = "selective"


class OptimizerKind(Enum):
    adamw = "adamw"
    muon = "muon"
    sgd = "sgd"


class SchedulerKind(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"
    inverse_sqrt = "inverse_sqrt"


class Preflight(Enum):
    stop = "stop"
    warn = "warn"


class Verify(Enum):
    """How much of a checkpoint is compared with its manifest before it is loaded."""

    full = "full"
    sizes = "sizes"
    off = "off"


class WandbMode(Enum):
    disabled = "disabled"
    auto = "auto"
    online = "online"
    offline = "offline"
