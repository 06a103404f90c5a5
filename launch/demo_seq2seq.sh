#!/usr/bin/env bash
# Names of places and languages, English to Ukrainian, by a small encoder and decoder: corpus, training on two processes,
# names that were never trained on, a report. Started by `make demo-seq2seq`; every command below can be typed as it stands.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks x threads = cores

names=$(python -c 'from importlib.util import find_spec; print(find_spec("pycountry").submodule_search_locations[0])' 2>/dev/null) ||
  { echo "the names are those of the package pycountry: pip install pycountry" >&2; exit 2; }
names="$names/locales/${LANGUAGE_OF_NAMES:-uk}/LC_MESSAGES"

step() {
  printf '\n\033[1m%s\033[0m\n' "$1"
  shift
  printf '$ %s\n' "$*"
  "$@"
}

step "1. Train on two processes, after the corpus is prepared" torchrun --standalone --nproc-per-node=2 launch/train.py \
  +model=transformer_mini +experiment=names run.name=demo-seq2seq data.path="$names"
step "2. Validate: all names that were never trained on" python launch/validate.py checkpoint=runs/demo-seq2seq batches=12
step "3. Write names that it has never seen" bash -c \
  'printf "%s\n" Kuamasi Bebeli Northhampton Zavaria Palmera Lower-Grenzberg | tee runs/demo-seq2seq/names.txt >/dev/null &&
   rm -f runs/demo-seq2seq/written.jsonl &&
   python launch/predict.py checkpoint=runs/demo-seq2seq inputs=runs/demo-seq2seq/names.txt out=runs/demo-seq2seq/written.jsonl &&
   cat runs/demo-seq2seq/written.jsonl'
step "4. Write a page about it" python launch/report.py runs/demo-seq2seq

printf '\nEverything is in runs/demo-seq2seq: report.html, written.jsonl, metrics.jsonl, checkpoints/.\n'
