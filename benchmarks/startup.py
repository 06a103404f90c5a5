"""What it costs to start: CPU seconds from the command to the answer or the first step. ``python benchmarks/startup.py``.

Every command is a process of its own; they take turns, figures are medians. CPU seconds are those of all threads and of
all processes that the command waited for, so other work on the machine hardly changes them. *First step* is
everything from the command to the end of a training of one step: ours writes its checkpoint and report as well.
Compilation is the first forward and backward pass of twelve layers, less what the same command takes without it;
*cold* begins with an empty cache, *warm* with what the cold one left there, as after a restart on the same node.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import turns

SHAPE = "vocab_size=4096, num_layers=4, hidden_dim=128, num_heads=4, max_positions=256"
"""Of ``gpt_nano``."""
HF_TRAINER = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
rows = [{"input_ids": row, "labels": row} for row in torch.randint(4096, (32, 256))]
model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_layer=4, n_embd=128, n_head=4, n_positions=256))
settings = TrainingArguments(output_dir=sys.argv[1], max_steps=1, per_device_train_batch_size=4,
    gradient_accumulation_steps=8, report_to="none", save_strategy="no", disable_tqdm=True)
Trainer(model, settings, train_dataset=rows).train()
"""
LIGHTNING = f"""
import sys, lightning, torch
from bigtrain.config import ModelConfig
from bigtrain.models import build_model
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build_model(ModelConfig({SHAPE}))
        for parameter in self.model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    def training_step(self, batch, _index):
        loss = self.model(batch[0], batch[0]) / batch[0].numel()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4, fused=True)
rows = torch.utils.data.TensorDataset(torch.randint(4096, (32, 256)))
lightning.Trainer(max_steps=1, accumulate_grad_batches=8, gradient_clip_val=1.0, default_root_dir=sys.argv[1],
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
).fit(Module(), torch.utils.data.DataLoader(rows, batch_size=4))
"""
FIRST_PASS = """
import sys, torch
from bigtrain.config import ModelConfig
from bigtrain.models import build_model
model = build_model(ModelConfig(vocab_size=4096, num_layers=int(sys.argv[2]), hidden_dim=128, num_heads=4))
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
if sys.argv[1] == "blocks":
    for block in model.blocks:
        block.compile()
tokens = torch.randint(4096, (4, 256))
(torch.compile(model) if sys.argv[1] == "whole" else model)(tokens, tokens).backward()
"""
PYTHON = sys.executable


def run(command: list[str], environ: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a command; return its CPU and wall-clock seconds.

    Raises:
        SystemExit: it has failed; with what it said.
    """
    paths = [str(turns.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (environ or {})
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environ, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)[:200]} has failed:\n{said.read()}")
    return usage.ru_utime + usage.ru_stime, seconds


def commands(scratch: Path) -> dict[str, Callable[[], list[str]]]:
    """Return what is started, by name; runs get a fresh directory each time."""
    launch = turns.REPOSITORY / "launch"

    def train() -> list[str]:
        overrides = ["+model=gpt_nano", "data=synthetic", "train.steps=1", f"run.root={tempfile.mkdtemp(dir=scratch)}"]
        return [PYTHON, str(launch / "train.py"), *overrides]

    found: dict[str, Callable[[], list[str]]] = {"import torch": lambda: [PYTHON, "-c", "import torch"]}
    if find_spec("hydra"):
        found |= {
            "train.py --help": lambda: [PYTHON, str(launch / "train.py"), "--help"],
            "configuration check (where.py)": lambda: [PYTHON, str(launch / "where.py"), "+model=gpt_nano"],
            OURS: train,
        }
    if find_spec("transformers") and find_spec("accelerate"):
        found[HF] = lambda: [PYTHON, "-c", HF_TRAINER, str(scratch / "hf")]
    if find_spec("lightning"):
        found[LIGHTNING_NAME] = lambda: [PYTHON, "-c", LIGHTNING, str(scratch / "lightning")]
    return found


OURS, HF, LIGHTNING_NAME = "first step, train.py", "first step, HF Trainer", "first step, Lightning Trainer"


def measure_commands(scratch: Path, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the medians of CPU and wall-clock seconds; the first round, which fills caches, does not count."""
    times: dict[str, list[tuple[float, float]]] = {}
    for number in range(1 + rounds):
        for name, command in commands(scratch).items():
            taken = run(command())
            if number:
                times.setdefault(name, []).append(taken)
    return {name: tuple(map(statistics.median, zip(*taken, strict=True))) for name, taken in times.items()}


def measure_compilation(scratch: Path, rounds: int, layers: int) -> dict[str, float]:
    """Return the median CPU seconds of compilation, by what is compiled and the state of the cache."""
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        eager, _ = run([PYTHON, "-c", FIRST_PASS, "eager", str(layers)])
        for way in ("blocks", "whole"):
            cache = scratch / f"inductor-{way}"
            for state in ("cold", "warm"):
                cpu, _ = run([PYTHON, "-c", FIRST_PASS, way, str(layers)], {"TORCHINDUCTOR_CACHE_DIR": str(cache)})
                times.setdefault(f"{way}, {state}", []).append(cpu - eager)
            shutil.rmtree(cache)
    return {name: statistics.median(values) for name, values in times.items()}


def report(times: dict[str, tuple[float, float]], compilation: dict[str, float]) -> str:
    lines = [f"{'':<36}{'CPU s':>8}{'wall s':>8}"]
    lines += [f"{name:<36}{cpu:>8.2f}{wall:>8.2f}" for name, (cpu, wall) in times.items()]
    for peer in (HF, LIGHTNING_NAME):
        if OURS in times and peer in times:
            lines.append(f"{OURS}: {times[OURS][0] / times[peer][0]:.2f} x the CPU seconds of {peer}")
    if compilation:
        lines += ["", f"{'compilation':<36}{'cold':>8}{'warm':>8}{'ratio':>8}"]
        for way in ("blocks", "whole"):
            cold, warm = compilation[f"{way}, cold"], compilation[f"{way}, warm"]
            lines.append(f"{way:<36}{cold:>8.1f}{warm:>8.1f}{cold / warm:>8.1f}")
        ratio = compilation["whole, cold"] / compilation["blocks, cold"]
        lines.append(f"block by block, cold: {ratio:.1f} x cheaper than the whole model")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of every command, after one to warm up (default 5)")
    parser.add_argument("--compile-rounds", type=int, default=1, help="of the compilations; 0 leaves them out")
    parser.add_argument("--layers", type=int, default=12, help="of the model that is compiled (default 12)")
    turns.add_json_argument(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as scratch:
        times = measure_commands(Path(scratch), args.rounds)
        compilation = measure_compilation(Path(scratch), args.compile_rounds, args.layers)
    facts = f"{turns.machine()}; {turns.versions('transformers', 'lightning')}\n{args.rounds} rounds, {args.layers} layers\n"
    print(f"{facts}\n{report(times, compilation)}")
    turns.write_json(args.json, "startup", conditions=facts, commands=times, compilation=compilation)


if __name__ == "__main__":
    main()
