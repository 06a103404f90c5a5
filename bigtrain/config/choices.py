"""What settings choose from; the fields of :mod:`bigtrain.config` say what each choice means."""

from enum import Enum, StrEnum

ModelKind = StrEnum("ModelKind", "native hf own")
Noise = StrEnum("Noise", "spans infilling")  # of a text that is to be restored
Inputs = StrEnum("Inputs", "tokens pixels features sequence audio")
Positions = StrEnum("Positions", "learned rope")
RopeKind = StrEnum("RopeKind", "llama3 linear yarn")
Norm = StrEnum("Norm", "layernorm rmsnorm")
Activation = StrEnum("Activation", "gelu swiglu")
RouterScores = StrEnum("RouterScores", "softmax sigmoid")  # of experts
Packing = StrEnum("Packing", "concat best_fit documents preferences")
TrainOn = StrEnum("TrainOn", "answers last_answer all")  # turns of a chat that count in the loss
LongChats = StrEnum("LongChats", "cut drop refuse split")  # than a sample
Duplicates = StrEnum("Duplicates", "keep exact near")
OnBad = StrEnum("OnBad", "stop skip")
EngineKind = StrEnum("EngineKind", "ddp fsdp hsdp zero1 zero2 zero3 accelerate")
AdapterKind = StrEnum("AdapterKind", "lora dora")
Offload = StrEnum("Offload", "none cpu")
Load = StrEnum("Load", "all weights")  # of another run's checkpoint
ActivationCheckpointing = StrEnum("ActivationCheckpointing", "none full selective")
OptimizerKind = StrEnum("OptimizerKind", "adamw muon sgd adam")
SchedulerKind = StrEnum("SchedulerKind", "constant linear cosine wsd inverse_sqrt")
Preflight = StrEnum("Preflight", "stop warn")
Verify = StrEnum("Verify", "full sizes off")  # how much of a checkpoint is compared with its manifest
WandbMode = StrEnum("WandbMode", "disabled auto online offline")
TaskKind = StrEnum(
    "TaskKind",
    "causal_lm masked_lm classification token_classification regression seq2seq "
    "denoise contrastive ctc speech preference reward distillation gan",
)
Quantisation = StrEnum("Quantisation", "int8 fp8 int4")  # of an export's linear layers
Scored = StrEnum("Scored", "log_probabilities logits embeddings")  # of each sample, by ``bigtrain score``
Divergence = StrEnum("Divergence", "forward reverse")  # of a student from its teacher
DataSource = StrEnum(
    "DataSource",
    "stdlib text jsonl csv gettext parquet arrow datasets prepared synthetic records images own tokens",
)
Head = StrEnum(
    "Head",
    "causal_lm masked_lm sequence_classification token_classification image_classification "
    "audio_classification seq2seq_lm ctc embedding speech_seq2seq",
)


class PreferenceLoss(Enum):
    """How pairs of answers are compared."""

    dpo = "dpo"
    ipo = "ipo"
    orpo = "orpo"
    simpo = "simpo"
    kto = "kto"

    @property
    def has_reference(self) -> bool:
        """Whether it compares with the model before training."""
        return self in (PreferenceLoss.dpo, PreferenceLoss.ipo, PreferenceLoss.kto)


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
    rated = "rated"

    @property
    def has_answers(self) -> bool:
        """Whether only part of a document counts as targets."""
        return self in (Content.chat, Content.pairs, Content.seq2seq, Content.preference, Content.rated)

    @property
    def is_chat(self) -> bool:
        """Whether a chat template writes its records."""
        return self in (Content.chat, Content.preference, Content.rated)

    @property
    def has_labels(self) -> bool:
        """Whether documents have labels beside their text."""
        return self in (Content.labelled, Content.numbers, Content.tagged, Content.rated)


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


class PpSchedule(Enum):
    """In which order the stages of a pipeline compute the micro-batches of a step."""

    one_f_one_b = "one_f_one_b"
    interleaved = "interleaved"


class CpMethod(Enum):
    """How ranks that share sequences attend to each other's tokens."""

    gather = "gather"
    ulysses = "ulysses"
