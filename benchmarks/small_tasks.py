"""Samples of every task, with ragged counts, for ``tasks.py``, ``task_matrix.py`` and ``task_networks.py``."""

import json
from pathlib import Path

import numpy as np

NUM_SAMPLES, TOKENS, VOCABULARY = 60, 12, 97
TEXT = ["data=text", "data.path={}/text.txt", "data.tokenizer=bytes", "data.sequence_length=24"]
RECORDS = ["data=records", "data.validation_fraction=0.2"]
OF_TOKENS = [*RECORDS, f"data.sequence_length={TOKENS}"]
SAMPLES = {
    "causal_lm": TEXT,
    "distillation": ["task=distillation", *TEXT, "data.scores={}/scores"],
    "preference": [
        *("task=preference", "data=jsonl", "data.content=preference", "data.path={}/preference.jsonl"),
        *("data.tokenizer=bytes", "data.sequence_length=128", "data.validation_fraction=0.2"),
    ],
    "masked_lm": ["task=masked_lm", *TEXT],
    "texts": ["task=classification", "task.inputs=tokens", "task.num_labels=3", *OF_TOKENS],
    "tags": ["task=token_classification", "task.num_labels=5", *OF_TOKENS],
    "pairs": ["task=seq2seq", *OF_TOKENS],
    "images": ["task=classification", "task.inputs=pixels", "task.num_labels=10", *RECORDS],
    "grey": ["task=classification", "task.inputs=pixels", "task.num_labels=10", *RECORDS],
    "table": ["task=regression", "task.inputs=features", "task.num_values=2", *RECORDS],
    "sequences": ["task=classification", "task.inputs=sequence", "task.num_labels=2", *RECORDS],
    "audio": ["task=classification", "task.inputs=audio", "task.num_labels=3", *RECORDS],
    "ctc": ["task=ctc", *RECORDS, "data.sequence_length=4"],
    "speech": ["task=speech", *OF_TOKENS],
}
"""Settings of task and data by kind of samples."""


def settings_of(kind: str, directory: Path) -> list[str]:
    """Return the settings of the task and the data that :func:`write_samples` wrote."""
    given = [setting.format(directory) for setting in SAMPLES[kind]]
    path = [] if "data=records" not in given else [f"data.path={directory}/{kind}.npz"]
    return [*given, *path, f"data.root={directory}/data"]


def write_samples(directory: Path, *, image_size: int = 8) -> None:
    """Write the samples of all kinds; not every one has a label, and they are not equally long."""
    random = np.random.default_rng(0)
    lines = (f"def function_{n * j % 97}(x): return x + {n + j}" for n in range(40) for j in range(20))
    (directory / "text.txt").write_text("\n".join(lines))
    answers = {"chosen": "{0}, gladly, and {0}", "rejected": "no, not {0}"}
    pairs = [{"prompt": f"say {n}"} | {name: text.format(n) for name, text in answers.items()} for n in range(60)]
    (directory / "preference.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokens = random.integers(3, VOCABULARY, (NUM_SAMPLES, TOKENS))
    lengths = random.integers(1, TOKENS + 1, NUM_SAMPLES)
    is_token, numbers = np.arange(TOKENS) < lengths[:, None], np.arange(NUM_SAMPLES)
    targets, read = np.where(is_token, tokens, -100), np.roll(tokens, 1, axis=1)
    labels = np.where(numbers % 7 == 3, -100, tokens[:, 0])
    audio = random.standard_normal((NUM_SAMPLES, 1600), dtype=np.float32)
    audio_lengths = random.integers(800, 1601, NUM_SAMPLES)
    features = random.random((NUM_SAMPLES, 6), dtype=np.float32)
    pixels = random.random((NUM_SAMPLES, 3, image_size, image_size), dtype=np.float32)
    digits = {"labels": np.where(numbers % 10 == 3, -100, numbers % 10)}
    sequence = random.random((NUM_SAMPLES, 5, 1), dtype=np.float32)
    values = np.stack([features.sum(axis=1), np.where(numbers % 5, features[:, 0], np.nan)], axis=1)
    written = {
        "texts": {"tokens": tokens, "lengths": lengths, "labels": np.where(labels < 0, -100, labels % 3)},
        "tags": {"tokens": tokens, "lengths": lengths, "labels": np.where(is_token, tokens % 5, -100)},
        "pairs": {"source": tokens[:, ::-1], "source_lengths": lengths, "tokens": read, "targets": targets},
        "images": {"pixels": pixels, **digits},
        "grey": {"pixels": pixels[:, :1], **digits},
        "table": {"features": features, "values": values},
        "sequences": {"sequence": sequence, "labels": (sequence[:, -1, 0] > 0.5).astype(np.int64)},
        "audio": {"audio": audio, "audio_lengths": audio_lengths, "labels": np.where(labels < 0, -100, labels % 3)},
        "ctc": {
            "audio": audio,
            "audio_lengths": audio_lengths,
            "targets": np.where(is_token, tokens % 20 + 1, -100)[:, :4],
        },
        "speech": {
            "features": random.standard_normal((NUM_SAMPLES, 8, 40), dtype=np.float32),
            "tokens": read,
            "targets": targets,
        },
    }
    for kind, columns in written.items():
        np.savez(directory / f"{kind}.npz", **columns)
