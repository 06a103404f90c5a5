"""Names of the metrics: the keys of ``metrics.jsonl`` and their sections on a dashboard.

Every record has the plain names. The sectioned ones are in the records of logging steps (every
``train.log_every_steps``) and describe the steps since the last one; ``docs/metrics.md`` lists them.
"""

from typing import Any

STEP = "step"  # optimizer steps done
TOKENS = "tokens"  # tokens trained on so far, over all ranks
SAMPLES = "samples"  # in place of tokens: records trained on so far, where they are no sequences
LOSS = "loss"  # mean cross-entropy per target token, nats
GRAD_NORM = "grad_norm"  # global norm before clipping
LR = "lr"
STEP_SECONDS = "step_seconds"
TOKENS_PER_SECOND = "tokens_per_second"  # over all ranks
SAMPLES_PER_SECOND = "samples_per_second"
DATA_WAIT_SECONDS = "data_wait_seconds"  # part of step_seconds in which rank 0 waited for the batch
DATA_DIGEST = "data_digest"  # hash of all sample ids up to this step, over all ranks

TRAIN_PERPLEXITY = "train/perplexity"
SYNC_BYTES = "perf/sync_bytes"  # of weights that a worker has averaged with the others so far
SYNC_BYTES_SAVED = "perf/sync_bytes_saved"  # that averaging gradients in every step would have added
EXPERT_LOAD = "train/expert_load"  # tokens of the busiest expert by the mean of its block, in the worst block
TIME = "time"  # of a logging step, ISO 8601, UTC

# Mean seconds per step.
DATA_SECONDS = "perf/data_seconds"  # waiting for the next batch
FORWARD_BACKWARD_SECONDS = "perf/forward_backward_seconds"  # with the communication that overlaps it
CHECKPOINT_STALL_SECONDS = "perf/checkpoint_stall_seconds"  # waiting for the copy of a checkpoint in memory
OPTIMIZER_SECONDS = "perf/optimizer_seconds"
LOGGING_SECONDS = "perf/logging_seconds"  # reading back, writing, showing, agreeing whether to stop
PHASES = (DATA_SECONDS, FORWARD_BACKWARD_SECONDS, OPTIMIZER_SECONDS, CHECKPOINT_STALL_SECONDS, LOGGING_SECONDS)

# Of a profile's event: seconds per traced step in which collectives ran, and in which nothing else did.
COMMUNICATION_SECONDS = "communication_seconds"
EXPOSED_COMMUNICATION_SECONDS = "exposed_communication_seconds"

TFLOPS_PER_DEVICE = "perf/causal_tflops_per_device"
MFU_CAUSAL = "perf/mfu_causal"
MFU_FULL_ATTENTION = "perf/mfu_full_attention"
MFU_DOCUMENTS = "perf/mfu_documents"  # where a mask keeps documents apart: with the pairs that it leaves
GOODPUT = "perf/goodput"  # share of this launch's time, from the start of its process, that trained: no start-up, validation, stall, logging
PAIRS_PER_TOKEN = "data/attention_pairs_per_token"  # that a document mask leaves, in rank 0's samples
DATA_WAIT_FRACTION = "data/wait_fraction"
SKIPPED_SHARDS = "data/skipped_shards"  # that any rank could not have so far; with data.on_bad_shard=skip only

ALLOCATED_BYTES = "memory/allocated_bytes"
RESERVED_BYTES = "memory/reserved_bytes"
PEAK_BYTES = "memory/peak_allocated_bytes"
HOST_RSS_BYTES = "memory/host_rss_bytes"

UTILISATION_PERCENT = "system/gpu_utilisation_percent"
POWER_WATTS = "system/gpu_power_watts"
ENERGY_JOULES = "system/gpu_energy_joules"  # of this launch so far
TEMPERATURE_CELSIUS = "system/gpu_temperature_celsius"

# Followed by /<name>, that of a component of data.mixture; of a single data set it is "data".
SOURCE_TOKENS = "data/tokens"
SOURCE_EPOCHS = "data/epochs"  # passes over the component so far

# Followed by /<layer>
LAYER_GRAD_NORM = "optim/grad_norm"
LAYER_PARAM_NORM = "optim/param_norm"
LAYER_UPDATE_RATIO = "optim/update_ratio"

SECTIONS = ("train", "val", "test", "perf", "memory", "optim", "system", "data")

# Events
LAUNCH_EVENTS = ("start", "resume")
REPEATED_EVENTS = ("validation", "test", "checkpoint")  # belong to a step: a run that goes back writes them anew
SUPERSEDED_EVENT = "superseded"  # from this step on, numbers differ from those before the run went back
LOGGER_FAILED_EVENT = "logger_failed"
ALARMS = (
    *("fault", "hang", "bad_step", "rollback", "straggler", "checkpoint_failed", "damaged_checkpoint"),
    LOGGER_FAILED_EVENT,
)

_SECTIONS = {STEP_SECONDS: "perf", TOKENS_PER_SECOND: "perf", SAMPLES_PER_SECOND: "perf", DATA_WAIT_SECONDS: "perf"}
AXES = (STEP, TOKENS, SAMPLES)


def unit_of(record: dict[str, Any]) -> str:
    """Return what a record counts: ``tokens`` or ``samples``."""
    return SAMPLES if SAMPLES in record else TOKENS


def rate_of(record: dict[str, Any]) -> str:
    """Return the name of a record's throughput: ``tokens_per_second`` or ``samples_per_second``."""
    return f"{unit_of(record)}_per_second"


def dashboard_name(key: str, section: str = "train") -> str:
    """Return the name of a metric on a dashboard: ``loss`` -> ``train/loss``; axes and sectioned names stay."""
    if key in AXES or "/" in key:
        return key
    return f"{_SECTIONS.get(key, section)}/{key}"
