"""Names of the metrics: the keys of ``metrics.jsonl`` and their sections on a dashboard."""

STEP = "step"  # optimizer steps done
TOKENS = "tokens"  # tokens trained on so far, over all ranks
LOSS = "loss"  # mean cross-entropy per target token, nats
GRAD_NORM = "grad_norm"  # global norm before clipping
LR = "lr"
STEP_SECONDS = "step_seconds"
TOKENS_PER_SECOND = "tokens_per_second"  # over all ranks
DATA_WAIT_SECONDS = "data_wait_seconds"  # part of step_seconds in which rank 0 waited for the batch
DATA_DIGEST = "data_digest"  # hash of all sample ids up to this step, over all ranks

PERPLEXITY = "perplexity"

_SECTIONS = {STEP_SECONDS: "perf", TOKENS_PER_SECOND: "perf", DATA_WAIT_SECONDS: "perf"}
_AXES = (STEP, TOKENS)


def dashboard_name(key: str, section: str = "train") -> str:
    """Return the name of metric ``key`` on a dashboard: ``loss`` -> ``train/loss``; axes and sectioned names stay."""
    if key in _AXES or "/" in key:
        return key
    return f"{_SECTIONS.get(key, section)}/{key}"
