"""Numbers and events as text."""

import math
from typing import Any

from bigtrain.telemetry import names

SHORT = {names.TOKENS: "tok", names.SAMPLES: "samples"}


def describe(record: dict[str, Any]) -> str:
    """Return the numbers of a step in at most 80 columns, and the metrics of an own objective."""
    own = [key for key in record if key.startswith("train/") and key != names.TRAIN_PERPLEXITY]
    unit = names.unit_of(record)
    return "  ".join(
        (
            f"loss {number(record, names.LOSS):.4f}",
            f"grad norm {number(record, names.GRAD_NORM):.3g}",
            f"lr {number(record, names.LR):.2e}",
            f"{format_count(number(record, unit))} {unit}",
            f"{format_count(number(record, names.rate_of(record)))} {SHORT[unit]}/s",
            *(f"{key.removeprefix('train/')} {number(record, key):.4g}" for key in own),
        )
    )


def number(record: dict[str, Any], key: str) -> float:
    """Return a number of a record, NaN for null or missing."""
    value = record.get(key)
    return math.nan if value is None else value


def pace(records: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean seconds of a step and the mean throughput of some steps."""
    seconds = [number(record, names.STEP_SECONDS) for record in records]
    sizes = [one * number(record, names.rate_of(record)) for one, record in zip(seconds, records, strict=True)]
    return math.fsum(seconds) / len(records), math.fsum(sizes) / max(math.fsum(seconds), 1e-9)


def task_metrics(event: dict[str, Any]) -> dict[str, float]:
    """Return loss and metrics of a validation or a test."""
    return {key: value for key, value in event.items() if isinstance(value, float)}


def describe_metrics(event: dict[str, Any]) -> str:
    """Return loss and metrics of a validation or a test in words."""
    others = [f"{key} {value:.4g}" for key, value in task_metrics(event).items() if key != names.LOSS]
    loss = number(event, names.LOSS)
    return ", ".join([f"loss {loss:.4f}" if math.isfinite(loss) else "loss not a number", *others])


def format_count(number: float) -> str:
    """Return ``number`` with three digits and a unit: 1234567 -> ``1.23M``."""
    if not math.isfinite(number):
        return str(number)
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            decimals = 0 if not unit or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
            return f"{number:.{decimals}f}{unit}"
        number /= 1000
    return f"{number:.0f}P"


def format_duration(seconds: float) -> str:
    """Return ``h:mm:ss``, with days in front if there are any."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def format_bytes(number: float) -> str:
    """Return ``number`` of bytes in GiB, below one in MiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def describe_machine(record: dict[str, Any]) -> str:
    """Return MFU, memory, sensors and goodput, as far as ``record`` has them."""
    shown = (
        (names.MFU_DOCUMENTS if names.MFU_DOCUMENTS in record else names.MFU_CAUSAL, lambda value: f"mfu {value:.1%}"),
        (names.PEAK_BYTES, lambda value: f"device memory {format_bytes(value)}"),
        (names.HOST_RSS_BYTES, lambda value: f"host memory {format_bytes(value)}"),
        (names.UTILISATION_PERCENT, lambda value: f"gpu {value:.0f}%"),
        (names.POWER_WATTS, lambda value: f"{value:.0f} W"),
        (names.TEMPERATURE_CELSIUS, lambda value: f"{value:.0f} °C"),
        (names.DATA_WAIT_FRACTION, lambda value: f"data wait {value:.1%}"),
        (names.GOODPUT, lambda value: f"goodput {value:.1%}"),
    )
    return "  ".join(text(record[key]) for key, text in shown if record.get(key) is not None)


def describe_communication(event: dict[str, Any]) -> str:
    """Return the communication times of a profile event; empty without any."""
    if names.COMMUNICATION_SECONDS not in event:
        return ""
    seconds, exposed = event[names.COMMUNICATION_SECONDS], event[names.EXPOSED_COMMUNICATION_SECONDS]
    return f"communication {seconds * 1e3:.4g} ms of a step, {exposed * 1e3:.4g} ms of it while nothing was computed"


def describe_event(event: dict[str, Any]) -> str:
    """Return an event in one line: time, kind, step, and what it is about."""
    kind, step = event.get("event"), event.get(names.STEP)
    about = next(
        (
            str(event[key])
            for key in ("reason", "error", "why", "after", "path", "checkpoint", "message")
            if event.get(key)
        ),
        "",
    )
    if isinstance(event.get(names.LOSS), float):
        about = f"loss {event[names.LOSS]:.4f}"
    when = f"{str(event[names.TIME])[11:19]}Z" if event.get(names.TIME) else ""
    return "  ".join(part for part in (when, str(kind), f"step {step}" if step is not None else "", about) if part)
