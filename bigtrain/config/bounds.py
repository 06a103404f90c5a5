"""What must hold of each number of the configuration by itself."""

from collections.abc import Callable

from bigtrain.config.convert import flatten, to_dict

SMALLEST_FP32 = 2.0**-126
"""Smaller numbers lose bits in fp32, or are 0."""
HOLDS: dict[str, Callable[[float], bool]] = {
    "must be at least 1": lambda value: value >= 1,
    "must be at least 8": lambda value: value >= 8,
    "must be positive": lambda value: value > 0,
    "must be at least 1.2e-38; what is smaller is 0 in fp32": lambda value: value >= SMALLEST_FP32,
    "must not be negative": lambda value: value >= 0,
    "must be 0 (off) or positive": lambda value: value >= 0,
    "must be 0 (never) or positive": lambda value: value >= 0,
    "must be 0 (only at the end) or positive": lambda value: value >= 0,
    "must be 0 (off) or more than 1": lambda value: value == 0 or value > 1,
    "must be from 0 to 1": lambda value: 0 <= value <= 1,
    "must be above 0 and at most 1": lambda value: 0 < value <= 1,
    "must be at least 0 and less than 1": lambda value: 0 <= value < 1,
    "must be above 0 and below 1": lambda value: 0 < value < 1,
}
RANGES = {
    "run.stop_after_steps": "must be at least 1",
    "run.max_minutes": "must be positive",
    "model.vocab_size": "must be at least 1",
    "model.num_layers": "must be at least 1",
    "model.hidden_dim": "must be at least 1",
    "model.num_heads": "must be at least 1",
    "model.num_kv_heads": "must be at least 1",
    "model.head_dim": "must be at least 1",
    "model.ffn_dim": "must be at least 1",
    "model.max_positions": "must be at least 1",
    "model.dropout": "must be at least 0 and less than 1",
    "model.rope_theta": "must be positive",
    "model.rope_scaling.factor": "must be at least 1",
    "model.rope_scaling.low_freq_factor": "must be positive",
    "model.rope_scaling.high_freq_factor": "must be positive",
    "model.rope_scaling.original_max_positions": "must be at least 1",
    "model.norm_eps": "must not be negative",
    "model.init_std": "must not be negative",
    "data.sequence_length": "must be at least 1",
    "data.shuffle_window_shards": "must be at least 1",
    "data.validation_fraction": "must be above 0 and below 1",
    "data.prefetch_steps": "must be at least 1",
    "data.shard_tokens": "must be at least 1",
    "data.cache_gib": "must be positive",
    "data.prepare_processes": "must be at least 1",
    "data.filters.max_repeated_line_share": "must be from 0 to 1",
    "data.filters.max_symbol_share": "must be from 0 to 1",
    "data.filters.near_similarity": "must be above 0 and at most 1",
    "data.filters.min_characters": "must not be negative",
    "engine.dp_shard": "must be at least 1",
    "engine.fsdp.prefetch_blocks": "must be at least 1",
    "engine.deepspeed.bucket_elements": "must be at least 1",
    "engine.deepspeed.persistence_threshold_elements": "must not be negative",
    "engine.activation_checkpointing_every": "must be at least 1",
    "train.seed": "must not be negative",
    "train.steps": "must be at least 1",
    "train.global_batch_size": "must be at least 1",
    "train.micro_batch_size": "must be at least 1",
    "train.log_every_steps": "must be at least 1",
    "optimizer.lr": "must be positive",
    "optimizer.eps": "must be at least 1.2e-38; what is smaller is 0 in fp32",
    "optimizer.weight_decay": "must be 0 (off) or positive",
    "optimizer.grad_clip": "must be 0 (off) or positive",
    "scheduler.warmup_steps": "must not be negative",
    "scheduler.min_lr_ratio": "must be from 0 to 1",
    "validation.every_steps": "must be 0 (never) or positive",
    "validation.batches": "must be at least 1",
    "logging.layer_norms_every_steps": "must be 0 (never) or positive",
    "checkpoint.every_steps": "must be 0 (only at the end) or positive",
    "checkpoint.max_failures": "must be at least 1",
    "supervision.hang_seconds": "must be 0 (off) or positive",
    "supervision.straggler_factor": "must be 0 (off) or more than 1",
    "supervision.max_failed_attempts": "must be at least 1",
    "bad_numbers.max_bad_steps": "must not be negative",
    "bad_numbers.max_rollbacks": "must not be negative",
    "bad_numbers.spike_zscore": "must be 0 (off) or positive",
    "bad_numbers.spike_window_steps": "must be at least 8",
}
"""What must hold of a number by itself; unset ones (null) are right."""


def out_of_range(name: str, section: object) -> list[str]:
    """Return which numbers of a section of the configuration are not as :data:`RANGES` says."""
    values = flatten({name: to_dict(section)})
    numbers = [(key, bound, values[key]) for key, bound in RANGES.items() if values.get(key) is not None]
    return [f"{key}={value}: {bound}" for key, bound, value in numbers if not HOLDS[bound](value)]
