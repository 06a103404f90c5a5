#!/usr/bin/env bash
# The whole way on one small machine: corpus, training on two processes, a stop, the same command again, validation,
# generated text, a report. Started by `make demo`; every command below can be typed as it stands.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks x threads = cores

train=(torchrun --standalone --nproc-per-node=2 launch/train.py +model=gpt_nano +experiment=demo)

step() {
  printf '\n\033[1m%s\033[0m\n' "$1"
  shift
  printf '$ %s\n' "$*"
  "$@"
}

step "1. Prepare the corpus: the source of this machine's Python standard library" python launch/prepare.py
step "2. Train on two processes, and stop half-way" "${train[@]}" run.stop_after_steps=160
step "3. The same command again continues to the end" "${train[@]}"
step "4. Validate: the loss on files that were never trained on" python launch/validate.py checkpoint=runs/demo
step "5. Generate five texts" python launch/generate.py checkpoint=runs/demo prompt="def main(" num_samples=5
step "6. Write a page about it" python launch/report.py runs/demo

cat <<'END'

Everything is in runs/demo: report.html, config.yaml, metrics.jsonl, checkpoints/. The prepared corpus is in data/.
Remove runs/demo to see it again.
END
