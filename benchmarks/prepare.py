"""Speed of preparing a corpus: ``python benchmarks/prepare.py [text_mb=8] [rounds=5]``.

Encoding, per core: ours (tiktoken with the trained merges) against ``encode_batch`` of the tokenizers library on one
thread, on the same documents of the embedded corpus, both sides in turn; CPU seconds, ratio of medians, ids
compared. Then the preparation with one process and with one per core; wall seconds, which need idle cores. The
tokenizer is there already: to train it is work for one process.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np

from bigtrain.config import DataConfig
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.prepare.encoder import fast_encoder
from bigtrain.data.prepare.sources import read_part, source_parts
from bigtrain.data.prepare.survey import cut
from bigtrain.data.read.tokenizer import load_tokenizer

BATCH_DOCUMENTS = 50


def timed(clock: Callable[[], float], function: Callable[[], Any]) -> tuple[float, Any]:
    start = clock()
    value = function()
    return clock() - start, value


def encoding(corpus: Path, text_mb: float, rounds: int) -> None:
    tokenizer = load_tokenizer(corpus)
    fast, texts, num_bytes = fast_encoder(tokenizer), [], 0
    config = DataConfig()
    for document in (document for part in source_parts(config) for document in read_part(config, part)):
        if num_bytes < text_mb * 1e6:
            texts += cut(document.text)
            num_bytes += len(document.text.encode())

    def library() -> list[np.ndarray]:
        batches = (texts[i : i + BATCH_DOCUMENTS] for i in range(0, len(texts), BATCH_DOCUMENTS))
        encodings = (e for batch in batches for e in tokenizer.encode_batch(batch, add_special_tokens=False))
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    times: dict[str, list[float]] = {"encode_batch": [], "ours": []}
    for _ in range(rounds):
        seconds, expected = timed(time.process_time, library)
        times["encode_batch"].append(seconds)
        seconds, found = timed(time.process_time, lambda: [fast(text) for text in texts])
        times["ours"].append(seconds)
        assert all(map(np.array_equal, expected, found)), "other ids"
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"{num_bytes / 1e6:.1f} MB, {sum(map(len, found)):,} tokens, identical ids, {rounds} rounds")
    for name, seconds in median.items():
        print(f"  {name:<13} {num_bytes / 1e6 / seconds:6.2f} MB per CPU second")
    print(f"  ours / encode_batch: {median['encode_batch'] / median['ours']:.2f}")


def scaling(corpus: Path, rounds: int) -> None:
    num_cores = len(os.sched_getaffinity(0))
    times: dict[int, list[float]] = {1: [], num_cores: []}
    for _ in range(rounds):
        for num_processes, seconds in times.items():
            with tempfile.TemporaryDirectory() as root:
                config = DataConfig(root=root, tokenizer=str(corpus), prepare_processes=num_processes)
                seconds.append(timed(time.monotonic, lambda config=config: prepare(config, progress=False))[0])
    one, all_cores = (statistics.median(seconds) for seconds in times.values())
    print(f"embedded corpus, tokenizer given: 1 process {one:.1f} s, {num_cores} processes {all_cores:.1f} s")
    print(f"  ratio {one / all_cores:.2f}, load {os.getloadavg()[0]:.1f}")


def main() -> None:
    settings = {"text_mb": 8.0, "rounds": 5.0} | {
        key: float(value) for key, value in (arg.split("=") for arg in sys.argv[1:])
    }
    root = Path(tempfile.mkdtemp())
    try:
        corpus = prepare(DataConfig(root=str(root)), progress=False)
        encoding(corpus, settings["text_mb"], int(settings["rounds"]))
        scaling(corpus, int(settings["rounds"]) // 2 + 1)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
