"""What must not move, at two commits: losses, gradient norms, digests and checkpoints of the same runs, bit by bit.

    python tests/compare_commits.py OLD [NEW]     NEW is the working tree by default

Every run is made at both commits by the Python that runs this. What differs is printed and ends it with 1. Runs that
were begun at the old commit are also continued at the new one. Results of a commit are kept in ``--directory`` and
not computed again.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
STEPS = 6
TEXT = "the cat sat on a mat, and {} looked at it from far away\n"
COMMON = [
    f"train.steps={STEPS}",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
    "train.log_every_steps=1",
    "optimizer.lr=1e-3",
    "scheduler.warmup_steps=2",
    "checkpoint.every_steps=3",
    "validation.every_steps=3",
    "validation.batches=1",
    "engine.precision=fp32",
    "data.sequence_length=32",
]
SHAPE = [
    "model.vocab_size=320",
    "model.num_layers=2",
    "model.hidden_dim=24",
    "model.num_heads=3",
    "model.max_positions=32",
]
GPT = ["+model=gpt_nano", *SHAPE]
LLAMA = ["+model=llama3_1b", *SHAPE, "model.num_kv_heads=1", "model.head_dim=8", "model.ffn_dim=40"]
PREPARED = ["data=jsonl", "data.path={text}", "data.tokenizer=bytes"]
ON_THE_FLY = [*PREPARED, "data.on_the_fly=true"]
BEST_FIT = [*PREPARED, "data.packing=best_fit", "data.document_mask=true"]
DROPOUT = ["model.dropout=0.1"]


@dataclass(frozen=True, slots=True)
class Case:
    """A run: on how many ranks, with which settings, and whether the new commit continues the old one's."""

    world_size: int
    settings: list[str]
    continues: bool = False


CASES = {
    "gpt-ddp-1": Case(1, [*GPT, "engine=ddp", *PREPARED]),
    "gpt-ddp-2-dropout": Case(2, [*GPT, "engine=ddp", *PREPARED, *DROPOUT], continues=True),
    "gpt-fsdp-4": Case(4, [*GPT, "engine=fsdp", *PREPARED, *DROPOUT]),
    "gpt-zero3-2-on-the-fly": Case(2, [*GPT, "engine=zero3", *ON_THE_FLY], continues=True),
    "gpt-muon-fsdp-2": Case(2, [*GPT, "engine=fsdp", *PREPARED, "optimizer=muon"]),
    "llama-ddp-2-on-the-fly": Case(2, [*LLAMA, "engine=ddp", *ON_THE_FLY, *DROPOUT]),
    "llama-fsdp-2-best-fit": Case(2, [*LLAMA, "engine=fsdp", *BEST_FIT], continues=True),
    "llama-zero1-1": Case(1, [*LLAMA, "engine=zero1", *PREPARED, *DROPOUT]),
    "llama-zero2-2": Case(2, [*LLAMA, "engine=zero2", *PREPARED]),
    "llama-zero3-4": Case(4, [*LLAMA, "engine=zero3", *BEST_FIT, *DROPOUT]),
    "gpt-hsdp-4": Case(4, [*GPT, "engine=hsdp", "engine.dp_shard=2", *PREPARED]),
    "gpt-accelerate-2": Case(2, [*GPT, "engine=accelerate", *PREPARED]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", help="a commit; the working tree by default")
    parser.add_argument("--directory", type=Path, default=Path("compared"), help="where runs and results are kept")
    parser.add_argument("--only", default=",".join(CASES), help="names of cases, with commas between them")
    args = parser.parse_args()
    directory = args.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    text = directory / "text.jsonl"
    if not text.exists():
        text.write_text("".join(json.dumps({"text": TEXT.format(i * 7919)}) + "\n" for i in range(400)))
    old = checkout(args.old, directory)
    if args.new:
        new, where = checkout(args.new, directory), directory / f"at-{commit(args.new)}"
    else:
        new, where = ROOT, directory / "at-working-tree"
        shutil.rmtree(where, ignore_errors=True)
    differences = 0
    for name in args.only.split(","):
        before = result(name, old, directory / f"at-{commit(args.old)}", text)
        found = compare(before, result(name, new, where, text))
        if CASES[name].continues:
            found += compare(before, result(name, new, where, text, begun_by=old))
        print(f"{name}: {'equal' if not found else '; '.join(found)}", flush=True)
        differences += bool(found)
    print(f"{differences} of {len(args.only.split(','))} runs differ")
    return 1 if differences else 0


def commit(name: str) -> str:
    """Return the first digits of a commit."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def checkout(name: str, directory: Path) -> Path:
    """Return a directory with the files of a commit."""
    path = directory / f"tree-{commit(name)}"
    if not path.exists():
        path.mkdir()
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit(name)], check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", str(path)], check=True, input=archive.stdout)
    return path


def result(name: str, tree: Path, where: Path, text: Path, *, begun_by: Path | None = None) -> dict[str, Any]:
    """Return what a run has computed, and compute it first if that has not been done.

    Args:
        name: of the case.
        tree: the checkout that computes it.
        where: the directory for its results.
        text: the corpus.
        begun_by: the checkout that computes the first half.
    """
    label = f"{name}-continued" if begun_by else name
    kept = where / f"{label}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    case, runs = CASES[name], where / "runs"
    shutil.rmtree(runs / label, ignore_errors=True)
    settings = [setting.format(text=text) for setting in case.settings]
    settings += [
        *COMMON,
        f"run.name={label}",
        f"run.root={runs}",
        f"data.root={where / ('data-begun' if begun_by else 'data')}",
    ]
    if begun_by:
        train(begun_by, case.world_size, [*settings, f"run.stop_after_steps={STEPS // 2}"])
    train(tree, case.world_size, settings)
    kept.write_text(json.dumps(found := facts(runs / label), indent=1))
    return found


def train(tree: Path, world_size: int, settings: list[str]) -> None:
    """Run ``launch/train.py`` of a checkout to its end."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TORCHELASTIC"))}
    env |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command = [*torchrun, str(tree / "launch" / "train.py"), *settings]
    ended = subprocess.run(command, env=env, cwd=tree, capture_output=True, text=True, timeout=300)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\nended with {ended.returncode}:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")


def facts(run: Path) -> dict[str, Any]:
    """Return losses, norms, digests and checkpoint contents of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {key: [record[key] for record in records] for key in ("step", "loss", "grad_norm", "lr", "data_digest")}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    found["validation"] = [event["loss"] for event in events if event["event"] == "validation"]
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        found[checkpoint.name] = hash_of_tensors(checkpoint)
        files = sorted(checkpoint.glob("rank-*.safetensors"))
        found[f"{checkpoint.name} files"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return found


def hash_of_tensors(checkpoint: Path) -> str:
    """Return a hash of all tensors of a checkpoint, put together from their boxes."""
    digest = hashlib.sha256()
    manifest = json.loads((checkpoint / "manifest.json").read_text().partition("\n")[2])  # the first line is its hash
    for tensor in sorted(manifest["tensors"], key=lambda t: t["key"]):
        whole = np.zeros(tensor["shape"], np.float64)
        for chunk in tensor["chunks"]:
            box = tuple(slice(o, o + s) for o, s in zip(chunk["offsets"], chunk["sizes"], strict=True))
            whole[box] = _values(checkpoint / chunk["file"], chunk["start_byte"], tensor["dtype"], chunk["sizes"])
        digest.update(tensor["key"].encode() + whole.tobytes())
    return digest.hexdigest()


def _values(file: Path, start_byte: int, dtype: str, sizes: list[int]) -> np.ndarray:
    kinds = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32}
    if dtype not in kinds:
        raise SystemExit(f"{file}: {dtype} is not read by this script")
    count = int(np.prod(sizes, dtype=np.int64))
    return np.fromfile(file, kinds[dtype], count, offset=start_byte).reshape(sizes)


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what differs, a line each."""
    return [f"{key} differs" for key in before if before[key] != after.get(key)]


if __name__ == "__main__":
    sys.exit(main())
