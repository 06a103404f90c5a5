"""The configuration of a run: plain dataclasses, one docstring under each field.

Hydra composes them; nothing below ``cli`` knows about Hydra. ``convert.py`` builds them strictly from plain data, and
``check.py`` fills in derived values and finds contradictions. Some sections have a module of their own.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from bigtrain.config.bounds import Bound, OnlyIf
from bigtrain.config.choices import (
    Activation,
    ActivationCheckpointing,
    AdapterKind,
    Content,
    CpMethod,
    DataSource,
    Divergence,
    Duplicates,
    EngineKind,
    Head,
    Inputs,
    Load,
    LongChats,
    ModelKind,
    Noise,
    Norm,
    Offload,
    OnBad,
    OptimizerKind,
    Packing,
    Positions,
    PpSchedule,
    Precision,
    PreferenceLoss,
    Preflight,
    Quantisation,
    RopeKind,
    RouterScores,
    SchedulerKind,
    Scored,
    TaskKind,
    TrainOn,
    Verify,
    WandbMode,
)
from bigtrain.config.convert import LocalPath
from bigtrain.config.data import (
    OF_RECORDS,
    PERPLEXITIES,
    WITHOUT_TEXT,
    AugmentConfig,
    ComponentConfig,
    DataConfig,
    FilterConfig,
    HeldOutConfig,
    SetConfig,
    WeightChangeConfig,
    are_records,
    component_data,
    is_live,
    own_sets,
    set_data,
)
from bigtrain.config.moe import MoeConfig
from bigtrain.config.parallel import ParallelConfig
from bigtrain.config.privacy import PrivacyConfig
from bigtrain.config.sync import SyncConfig
from bigtrain.config.task import TaskConfig


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Identity and place of the run."""

    name: str | None = None
    """Directory of the run below ``root``; by default that of the model, `model.name`."""
    root: LocalPath = "runs"
    """Directory that holds the runs."""
    stop_after_steps: Annotated[int | None, Bound(ge=1)] = None
    """End this launch, saved and resumable, after so many optimizer steps."""
    max_minutes: Annotated[float | None, Bound(gt=0, le=10**8)] = None
    """End this launch, saved and resumable, so early that its last save is done after so many minutes."""

    @property
    def directory(self) -> Path:
        return Path(self.root) / str(self.name)


@dataclass(kw_only=True, slots=True)
class RopeScalingConfig:
    """Scaling of rotary frequencies for contexts longer than those of the original pre-training."""

    kind: RopeKind = RopeKind.llama3
    """``llama3`` stretches long wavelengths, ``linear`` all, ``yarn`` all but those that turn often in the original context."""
    factor: Annotated[float, Bound(ge=1)]
    """Context extension factor."""
    low_freq_factor: Annotated[float, Bound(gt=0), OnlyIf("kind", is_in=("llama3",))] = 1.0
    """Wavelengths above ``original_max_positions / low_freq_factor`` are scaled fully."""
    high_freq_factor: Annotated[float, Bound(gt=0), OnlyIf("kind", is_in=("llama3",))] = 4.0
    """Wavelengths below ``original_max_positions / high_freq_factor`` are left alone."""
    original_max_positions: Annotated[int, Bound(ge=1), OnlyIf("kind", not_in=("linear",))] = 8192
    """Context length of the original pre-training."""


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """Low-rank adapters beside linear layers, by peft: only they are trained. Presets are in ``configs/adapter``."""

    kind: AdapterKind = AdapterKind.lora
    """``lora``, or ``dora``, which also trains the norm of each row."""
    rank: Annotated[int, Bound(ge=1, le=10**4)] = 16
    """Columns of the smaller factor."""
    alpha: Annotated[float, Bound(gt=0, le=10**6)] = 32.0
    """What an adapter adds is multiplied by ``alpha / rank``."""
    rslora: bool = False
    """Multiply by ``alpha / sqrt(rank)`` instead."""
    dropout: Annotated[float, Bound(ge=0, lt=1)] = 0.0
    """Dropout probability on the input of the adapters."""
    targets: list[str] = field(default_factory=list)
    """Names of linear layers that get one, with ``*`` and ``?``, such as ``[*.q_proj, *.v_proj]``; by default all in the blocks."""
    also_train: list[str] = field(default_factory=list)
    """Names of parameters that are trained too, such as ``[*norm*]``; the new head of a classifier always is."""
    nf4: bool = False
    """Keep the frozen linear layers of the blocks in 4 bits (QLoRA), under ``ddp``, ``fsdp`` and ``hsdp``."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Shape of the Transformer. Presets are in ``configs/model``."""

    name: LocalPath | None = None
    """Preset name; with ``kind: hf`` a hub id or a local directory; with ``kind: own`` the name of an own part, such as ``ideas.resnet``."""
    kind: ModelKind = ModelKind.native
    """``native`` for bigtrain's own decoder, ``hf`` for a model of transformers, ``own`` for a network of yours."""
    pretrained: Annotated[bool, OnlyIf("kind", is_in=("hf",))] = False
    """Start from the published weights."""
    architecture: Annotated[str | None, OnlyIf("kind", is_in=("hf",))] = None
    """In place of a name: an architecture of transformers (its ``model_type``, such as ``qwen3``) from scratch."""
    settings: Annotated[dict[str, Any], OnlyIf("kind", is_in=("hf", "own"))] = field(default_factory=dict)
    """Settings of ``architecture``'s configuration in transformers, such as ``{hidden_size: 512, num_hidden_layers: 8}``, or of an own model."""
    head: Annotated[Head, OnlyIf("kind", is_in=("hf",))] = Head.causal_lm
    """What a model of transformers ends with; follows from the task."""
    num_outputs: Annotated[int | None, Bound(ge=1), OnlyIf("kind", is_in=("hf",))] = None
    """Labels or values that a model of transformers returns; follows from the task."""
    init_from: LocalPath | None = None
    """Start from other weights of the same shape. ``native``: those of this GPT-2 or Llama, a hub id or a local directory; ``hf``: the trunk of a run or published model, with a new head for the task."""
    vocab_size: Annotated[int, Bound(ge=1, le=10**8)] = 4096
    """Rows of the token embedding."""
    num_layers: Annotated[int, Bound(ge=1, le=10_000)] = 4
    """Number of Transformer blocks."""
    hidden_dim: Annotated[int, Bound(ge=1, le=10**6)] = 128
    """Width of the residual stream."""
    num_heads: Annotated[int, Bound(ge=1, le=100_000)] = 4
    """Query heads per block."""
    num_kv_heads: Annotated[int | None, Bound(ge=1)] = None
    """Key/value heads per block (grouped-query attention); by default ``num_heads``."""
    head_dim: Annotated[int | None, Bound(ge=1)] = None
    """Width of one head; by default ``hidden_dim / num_heads``."""
    ffn_dim: Annotated[int | None, Bound(ge=1)] = None
    """Inner width of the feed-forward layer; by default ``4 * hidden_dim``."""
    max_positions: Annotated[int, Bound(ge=1)] = 256
    """Longest sequence the model is made for."""
    positions: Positions = Positions.learned
    """Learned absolute positions or rotary ones."""
    rope_theta: Annotated[float, Bound(gt=0), OnlyIf("positions", is_in=("rope",))] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Annotated[RopeScalingConfig | None, OnlyIf("positions", is_in=("rope",))] = None
    norm: Norm = Norm.layernorm
    """Normalisation layer."""
    norm_eps: Annotated[float, Bound(ge=0)] = 1e-5
    """Epsilon of the normalisation layers."""
    activation: Activation = Activation.gelu
    """Feed-forward non-linearity."""
    moe: Annotated[MoeConfig | None, OnlyIf("kind", is_in=("native",))] = None
    """A mixture of experts in place of the feed-forward layers."""
    qk_norm: Annotated[bool, OnlyIf("kind", is_in=("native",))] = False
    """Normalise the queries and keys of each head, before they are rotated, by an RMSNorm (Qwen3)."""
    bias: bool = True
    """Biases in linear and normalisation layers."""
    tie_embeddings: bool = True
    """Output projection shares the token embedding."""
    dropout: Annotated[float, Bound(ge=0, lt=1), OnlyIf("kind", is_in=("native",))] = 0.0
    """Dropout probability on embeddings, attention and residual branches."""
    freeze: list[str] = field(default_factory=list)
    """Names of parameters that are neither trained nor saved, with ``*`` and ``?``, such as ``[embed_*, blocks.0.*]``."""
    freeze_batch_norm: Annotated[bool, OnlyIf("kind", is_in=("hf",))] = False
    """Batch normalisation uses the means and variances of the weights that the run begins with, in training too."""
    adapter: AdapterConfig | None = None
    """Adapters beside frozen weights; checkpoints hold them alone: ``+adapter=lora``."""
    init_std: Annotated[float, Bound(ge=0)] = 0.02
    """Standard deviation of the initial weights; residual outputs use ``init_std / sqrt(2 * num_layers)``."""


@dataclass(kw_only=True, slots=True)
class FsdpConfig:
    """How FSDP2 gathers and reduces."""

    reshard_after_forward: bool = True
    """Free the gathered parameters of a block after its forward pass (ZeRO-3); false keeps them (ZeRO-2)."""
    accumulate_whole_gradients: bool = False
    """Communicate gradients once per step instead of once per micro-batch; each rank then holds a whole gradient."""
    prefetch_blocks: Annotated[int, Bound(ge=1)] = 1
    """Blocks that are gathered ahead of the one that computes; more than one helps where the network is slow to answer."""


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """DeepSpeed's buckets."""

    bucket_elements: Annotated[int, Bound(ge=1)] = 50_000_000
    """Elements per reduce and all-gather bucket."""
    persistence_threshold_elements: Annotated[int, Bound(ge=0)] = 100_000
    """``zero3`` only: smaller parameters stay gathered."""


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How the run is spread over devices."""

    kind: EngineKind = EngineKind.fsdp
    """Sharding engine."""
    offload: Offload = Offload.none
    """``cpu`` keeps sharded optimizer state (and FSDP parameters) in host memory."""
    precision: Precision | None = None
    """``bf16`` or ``fp32``; by default bf16 on a GPU and fp32 on a CPU. On GPUs also ``tf32``, which is fp32 with rounded factors in matrix products, and ``fp8``, which is bf16 with fp8 in products that are large enough to gain from it."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """``full`` recomputes blocks, ``selective`` keeps the matrix products and attention."""
    activation_checkpointing_every: Annotated[
        int, Bound(ge=1), OnlyIf("activation_checkpointing", not_in=("none",))
    ] = 1
    """Apply it to every n-th block."""
    compile: bool = False
    """``torch.compile`` each block."""
    dp_shard: Annotated[int | None, Bound(ge=1), OnlyIf("kind", is_in=("hsdp",))] = None
    """Ranks per shard group; by default the ranks of one node."""
    fsdp: Annotated[FsdpConfig, OnlyIf("kind", is_in=("fsdp", "hsdp"))] = field(default_factory=FsdpConfig)
    deepspeed: Annotated[DeepSpeedConfig, OnlyIf("kind", not_in=("ddp", "fsdp", "hsdp"))] = field(
        default_factory=DeepSpeedConfig
    )
    """Settings of ``zero1``, ``zero2`` and ``zero3``."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """The update rule."""

    kind: OptimizerKind = OptimizerKind.adamw
    """``adamw``; ``muon`` for the matrices of the blocks, with AdamW for the rest; or, with decay that is part of the gradient, ``adam`` and ``sgd`` with momentum ``betas[0]``."""
    lr: Annotated[float, Bound(gt=0)] = 3e-4
    """Peak learning rate."""
    betas: Annotated[list[float], Bound(ge=0, lt=1)] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the two moment estimates."""
    eps: Annotated[float, Bound(ge=1.2e-38), OnlyIf("kind", not_in=("sgd",))] = 1e-8
    """Added to the root of the second moment; what is smaller is 0 in fp32."""
    nesterov: Annotated[bool, OnlyIf("kind", is_in=("sgd",))] = True
    """Whether the momentum is Nesterov's, which looks one step ahead, or the plain one."""
    weight_decay: Annotated[float, Bound(ge=0)] = 0.1
    """Decay of matrices, decoupled from the gradient but for ``adam`` and ``sgd``; vectors (biases, norms) are not decayed."""
    l1: Annotated[float, Bound(ge=0), OnlyIf("kind", not_in=("muon",))] = 0.0
    """Weight of the L1 norm of matrices: after an update each number moves to 0 by ``lr * l1`` and stops there."""
    keep_zeros: bool = False
    """Numbers of matrices that are 0 stay 0, so that a pruned model is trained on: ``bigtrain prune``."""
    grad_clip: Annotated[float, Bound(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    average: Annotated[float | None, Bound(gt=0, lt=1)] = None
    """Decay per step of a moving average of the weights, such as 0.999: part of the state, in fp32; ``bigtrain export average=moving`` writes it."""


@dataclass(kw_only=True, slots=True)
class SchedulerConfig:
    """Learning rate as a function of the step."""

    kind: SchedulerKind = SchedulerKind.cosine
    """Shape after warm-up."""
    warmup_steps: Annotated[int, Bound(ge=0)] = 100
    """Steps of linear warm-up from 0."""
    decay_fraction: Annotated[float, Bound(ge=0, le=1), OnlyIf("kind", is_in=("wsd",))] = 0.2
    """Share of ``train.steps`` in which the rate falls linearly at the end."""
    min_lr_ratio: Annotated[float, Bound(ge=0, le=1), OnlyIf("kind", not_in=("constant", "inverse_sqrt"))] = 0.1
    """Final learning rate as a share of the peak."""


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """Length and size of the training."""

    seed: Annotated[int, Bound(ge=0, le=2**63 - 1)] = 0
    """Seed of the weights, the sample order and dropout."""
    steps: Annotated[int, Bound(ge=1)] = 1000
    """Optimizer steps of the whole run."""
    epochs: Annotated[float | None, Bound(gt=0, le=10**6)] = None
    """In place of ``steps``: passes over the samples of the training data, rounded up to whole batches."""
    tokens: Annotated[int | None, Bound(ge=1, le=10**16)] = None
    """In place of ``steps``: tokens of the whole run, rounded up to whole batches."""
    global_batch_size: Annotated[int, Bound(ge=1, le=10**6)] = 32
    """Sequences per optimizer step, over all ranks; any number of them."""
    micro_batch_size: Annotated[int | None, Bound(ge=1, le=10**6)] = None
    """Sequences per rank and forward pass, from which accumulation follows; by default as many as fit a rank's part of
    the step, up to 4. Where the parts do not come out even, padding that counts for nothing fills them up."""
    log_every_steps: Annotated[int, Bound(ge=1)] = 10
    """Steps between two console lines."""

    @property
    def is_open(self) -> bool:
        """Whether only the data says how many steps there are."""
        return self.epochs is not None or self.tokens is not None

    def micro_batches(self, dp_size: int) -> int:
        """Return how many micro-batches each of ``dp_size`` ranks computes in a step, padding included."""
        return math.ceil(math.ceil(self.global_batch_size / dp_size) / self.micro_batch_size)


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """Loss on documents that are never trained on."""

    every_steps: Annotated[int, Bound(ge=0)] = 0
    """Steps between validations, besides the one at the end; 0 = never, not even at the end."""
    batches: Annotated[int, Bound(ge=1, le=10**6), OnlyIf("every_steps", not_in=(0,))] = 8
    """Global batches per validation."""
    metric: Annotated[str, OnlyIf("every_steps", not_in=(0,))] = "loss"
    """``loss`` or a metric of the task, by which validations are compared; whether more of it is better is the metric's own."""
    patience: Annotated[int | None, Bound(ge=1), OnlyIf("every_steps", not_in=(0,))] = None
    """The run ends, as finished, after so many validations in a row without a better ``metric``."""
    stop_at: Annotated[float | None, OnlyIf("every_steps", not_in=(0,))] = None
    """The run ends, as finished, when ``metric`` reaches this value."""
    written_samples: Annotated[int, Bound(ge=0, le=10**6), OnlyIf("every_steps", not_in=(0,))] = 0
    """With ``task=seq2seq``, ``denoise``, ``ctc`` and ``speech``: for so many samples a text is written, and compared with the target (exact, BLEU, chrF, ROUGE-L, word and character error rates)."""
    fgsm: Annotated[list[float], Bound(gt=0, le=1), OnlyIf("every_steps", not_in=(0,))] = field(default_factory=list)
    """Of images, also the accuracy when each pixel is moved so far against the label (fast gradient sign), as a share of the range from black to white, such as ``[0.01, 0.1]``."""
    frechet: Annotated[LocalPath | None, OnlyIf("every_steps", not_in=(0,))] = None
    """With ``task=gan``: run of a classifier of the same images, by whose features the Fréchet distance of what is made from what is held out is measured."""
    prompts: Annotated[LocalPath | None, OnlyIf("every_steps", not_in=(0,))] = None
    """Text file with a prompt a line, each of which a causal language model continues as it stands, without a chat template; the texts are in the report and wandb."""
    prompt_tokens: Annotated[int, Bound(ge=1, le=10**5), OnlyIf("prompts", not_in=(None,))] = 50
    """Longest continuation of a prompt, by the likeliest tokens."""
    lm_eval: Annotated[list[str], OnlyIf("every_steps", not_in=(0,))] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, such as ``[arc_easy, hellaswag]``, whose scores are metrics: ``lm_eval/arc_easy/acc``."""
    lm_eval_tasks: Annotated[LocalPath | None, OnlyIf("lm_eval", not_in=([],))] = None
    """Directory with tasks of your own, in the harness' YAML."""
    lm_eval_limit: Annotated[int | None, Bound(ge=1), OnlyIf("lm_eval", not_in=([],))] = None
    """Documents of each task; by default all."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: Annotated[int, Bound(ge=0)] = 500
    """Steps between checkpoints, besides the one at the end; 0 = only at the end."""
    keep: str = "latest 2"
    """``all``, ``latest N``, ``every N`` (steps), ``best`` (by ``validation.metric``; saved when it is found), or several with commas; the two newest always are."""
    resume: LocalPath = "auto"
    """``auto`` continues if there is a checkpoint, ``never`` refuses to, ``must`` insists; anything else is the path of another run, or of one of its checkpoints, with which this one begins."""
    load: Load = Load.all
    """Of that other run: ``all`` goes on at its step; ``weights`` begins at step 0 with a fresh optimizer. A run's own checkpoints are always loaded whole."""
    verify: Verify = Verify.full
    """Before loading: ``full`` reads and hashes every file, ``sizes`` compares sizes, ``off`` trusts."""
    asynchronous: bool = True
    """Write behind the training loop, which then waits for a copy in memory only."""
    max_failures: Annotated[int, Bound(ge=1)] = 3
    """Failed saves in a row after which the run stops."""


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """What besides the console and the files is written."""

    wandb: WandbMode = WandbMode.disabled
    """``auto`` is online with a key and offline without one."""
    wandb_project: Annotated[str | None, OnlyIf("wandb", not_in=("disabled",))] = None
    """Weights & Biases project; by default that of ``WANDB_PROJECT``, or ``bigtrain``."""
    wandb_entity: Annotated[str | None, OnlyIf("wandb", not_in=("disabled",))] = None
    """Weights & Biases user or team; by default that of ``WANDB_ENTITY``, or your own."""
    tensorboard: bool = False
    """Write ``tensorboard/`` in the run directory."""
    also: list[str] = field(default_factory=list)
    """Own loggers, such as ``[ideas.csv_logger]``."""
    layer_norms_every_steps: Annotated[int, Bound(ge=0)] = 100
    """Steps between norms of gradients, weights and updates per layer; 0 = never."""


@dataclass(kw_only=True, slots=True)
class SupervisionConfig:
    """Hangs, slow ranks, and failures that come again."""

    hang_seconds: Annotated[float, Bound(ge=0, le=10**8)] = 300.0
    """A rank hangs when a phase of its step takes longer than this and than three times the longest of the phase's last 200; 0 switches the watchdog off."""
    first_hang_seconds: Annotated[float, Bound(le=10**8)] = 1800.0
    """The limit, at least ``hang_seconds``, for a phase that has been seen fewer than three times: starting, compiling, the first saves, a profile's export; and for a file that is fetched and of which nothing comes, for which ranks wait without being hung."""
    straggler_factor: Annotated[float, Bound(ge=0)] = 1.5
    """A rank is named when it is so many times slower, more than 1, than the median of the ranks; 0 switches that off."""
    max_failed_attempts: Annotated[int, Bound(ge=1)] = 3
    """After so many launches in a row that failed without a new checkpoint, a launcher's restart is refused."""


@dataclass(kw_only=True, slots=True)
class BadNumbersConfig:
    """Steps whose numbers are not to be trained on."""

    max_bad_steps: Annotated[int, Bound(ge=0)] = 3
    """Non-finite or spiking steps tolerated per 100 before rolling back; non-finite ones change no weight."""
    max_rollbacks: Annotated[int, Bound(ge=0)] = 3
    """Rollbacks before the run stops for good; each leaves out the samples of its bad steps."""
    spike_zscore: Annotated[float, Bound(ge=0)] = 0.0
    """A loss so many (robust) standard deviations above the median counts as bad too; 0 = off, 6 is usual."""
    spike_window_steps: Annotated[int, Bound(ge=8, le=10**6), OnlyIf("spike_zscore", not_in=(0,))] = 128
    """Steps of which the median and the deviation are taken; none counts as a spike before there are so many."""


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """A look inside some steps, into ``profile/`` of the run."""

    steps: Annotated[list[int], Bound(ge=1)] = field(default_factory=list)
    """``[first, last]``: optimizer steps that torch's profiler traces on rank 0; empty = none."""
    memory: bool = False
    """Record GPU allocations with their stacks and save them after those steps, or when memory runs out."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Everything that defines a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    bad_numbers: BadNumbersConfig = field(default_factory=BadNumbersConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    preflight: Preflight = Preflight.stop
    """``warn`` goes on although the memory estimate says that the run does not fit."""
    imports: dict[str, str] = field(default_factory=dict)
    """Recorded, not set: the content of what ``--import`` has brought in."""
