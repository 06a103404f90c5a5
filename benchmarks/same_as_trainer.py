"""Does a run have the losses of transformers' Trainer on the same ids, in the same order, from the same weights?

    python benchmarks/same_as_trainer.py
    python benchmarks/same_as_trainer.py --only llama --engine zero3

Small models (``small_configs.py``) in fp32 without dropout: ours on two ranks, Trainer in one process that accumulates
two micro-batches, each with AdamW at a constant rate. The order is our loader's, and so are the ids of texts; ids and
labels of chats are those of transformers' ``apply_chat_template``. Trainer shifts the labels by itself. Adapters are
peft's in both, and begin alike. ``sft`` (chats, ``packed`` several to a sample) and preferences are compared with TRL
(pip install trl), which makes ids and labels of the rows itself.

Shape suffixes: B batch, T tokens.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

# Ranks are forked from a server that is not started in this directory, but has to find these modules.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

from small_runs import call
from trainer_losses import PREFERENCES, SFT, STEPS, WORLD_SIZE, our_losses, prepare, trainer_losses
from trl_losses import sft_losses, trl_losses

from bigtrain.config import EngineKind
from bigtrain.errors import ConfigError

MODELS = (
    "gpt2",
    "llama",
    "mamba",
    "llama with chats",
    "llama with adapters",
    "gpt2 with adapters",
    "llama with sft",
    "llama with packed sft",
    "llama with dpo",
    "llama with ipo",
    "llama with orpo",
    "llama with kto",
    "llama with kto in micro-batches",
)
TOLERANCE = 1e-4
DIFFERENT = "llama with kto in micro-batches"  # TRL judges from a mean over a micro-batch; ours is one over the step


def compare(model: str, engine: EngineKind) -> tuple[list[float], list[float]]:
    """Return our losses and Trainer's.

    Raises:
        ConfigError: bigtrain refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="same-") as temporary:
        directory = Path(temporary)
        family, _, what = model.partition(" with ")
        call(prepare, 1, family, what, directory)
        (ours, refusal), (theirs, _) = (
            call(our_losses, WORLD_SIZE, directory, engine),
            call(sft_losses if what in SFT else trl_losses if what in PREFERENCES else trainer_losses, 1, directory),
        )
        if refusal:
            raise ConfigError(refusal)
        return ours, theirs


def main() -> int:
    """Print a row a model; return 0 if all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MODELS), help="models, with commas")
    parser.add_argument("--engine", default="fsdp", choices=[engine.name for engine in EngineKind])
    parser.add_argument("--json", type=Path, help="keeps the losses")
    args = parser.parse_args()
    print(f"{'model':<32} {'first loss':>10} {f'loss {STEPS}':>10} {'largest difference':>18}")
    rows, num_different = {}, 0
    for model in args.only.split(","):
        ours, theirs = compare(model, EngineKind[args.engine])
        difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        rows[model] = {"ours": ours, "trainer": theirs, "difference": difference}
        num_different += (difference <= TOLERANCE) == (model == DIFFERENT)  # a NaN is different
        print(f"{model:<32} {ours[0]:>10.4f} {ours[-1]:>10.4f} {difference:>18.1e}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
