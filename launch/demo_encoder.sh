#!/usr/bin/env bash
# An encoder that learns the standard library without labels, by hidden tokens and by which pieces of it are neighbours,
# and then from which package a piece is: with all labels, and with 1,000 of them, where another one begins from scratch.
# Minutes on two CPU cores.
# Started by `make demo-encoder`; every command below can be typed as it stands.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks x threads = cores

step() {
  printf '\n\033[1m%s\033[0m\n' "$1"
  shift
  printf '$ %s\n' "$*"
  "$@"
}

train=(torchrun --standalone --nproc-per-node=2 launch/train.py +model=modernbert_mini)
neighbours=("${train[@]}" +experiment=neighbours data.tokenizer=runs/encoder)
packages=("${train[@]}" +experiment=packages data.tokenizer=runs/encoder)
few=("${packages[@]}" data.max_train_samples=1000 train.steps=60 train.global_batch_size=32 train.micro_batch_size=16
  optimizer.lr=1e-3 validation.every_steps=20 validation.batches=268)
step "1. Train on hidden tokens, after the corpus is prepared" "${train[@]}" +experiment=encoder run.name=encoder
step "2. Train on neighbours, from there" "${neighbours[@]}" model.init_from=runs/encoder run.name=neighbours
step "3. Packages, all labels, from there" "${packages[@]}" model.init_from=runs/neighbours run.name=packages_all
step "4. Packages, 1,000 labels, from there" "${few[@]}" model.init_from=runs/neighbours run.name=packages_1000
step "5. Packages, 1,000 labels, from scratch" "${few[@]}" run.name=packages_1000_scratch
step "6. Write a page about the two" python launch/report.py runs/packages_1000 runs/packages_1000_scratch out=runs/packages.html
step "7. Write a page about all labels" python launch/report.py runs/packages_all

python - <<'END'
import json, pathlib

def accuracy(run):
    rows = map(json.loads, pathlib.Path("runs", run, "events.jsonl").read_text().splitlines())
    return [row["accuracy"] for row in rows if row["event"] == "validation"][-1]

counts = json.loads(pathlib.Path("runs/packages_all/classification.json").read_text())["confusion"]
majority = max(map(sum, counts)) / sum(map(sum, counts))
everything, few, scratch = map(accuracy, ("packages_all", "packages_1000", "packages_1000_scratch"))
print(f"\n{'accuracy on held-out files':<34}")
for what, reached in (
    ("the commonest package", majority),
    ("all labels, from the encoder", everything),
    ("1,000 labels, from scratch", scratch),
    ("1,000 labels, from the encoder", few),
):
    print(f"{what:<34}{reached:>9.4f}")
END
echo
echo "The pages are runs/packages.html and runs/packages_all/report.html. Remove runs/{encoder,neighbours,packages_*} to see it again."
