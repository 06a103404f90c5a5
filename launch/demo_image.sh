#!/usr/bin/env bash
# Three networks on the handwritten digits of scikit-learn, and a page with what each got wrong: minutes on two CPU cores.
# Started by `make demo-image`; every command below can be typed as it stands.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks x threads = cores

step() {
  printf '\n\033[1m%s\033[0m\n' "$1"
  shift
  printf '$ %s\n' "$*"
  "$@"
}

runs=()
for network in mlp cnn vit; do
  run="digits_$network"
  step "Train: $network" torchrun --standalone --nproc-per-node=2 launch/train.py "+model=${network}_digits" "+experiment=$run" run.name="$run"
  runs+=("runs/$run")
done
step "Write a page about all three" python launch/report.py "${runs[@]}" out=runs/digits.html

printf '\n%-12s %10s %10s\n' network accuracy 'at least'
for network in mlp:0.965 cnn:0.985 vit:0.940; do
  python - "${network%:*}" "${network#*:}" <<'END'
import json, pathlib, sys

counts = json.loads(pathlib.Path(f"runs/digits_{sys.argv[1]}/classification.json").read_text())["confusion"]
accuracy = sum(row[i] for i, row in enumerate(counts)) / sum(map(sum, counts))
print(f"{sys.argv[1]:<12} {accuracy:10.4f} {sys.argv[2]:>10}")
END
done
echo
echo "The page is runs/digits.html. Remove runs/digits_* to see it again."
