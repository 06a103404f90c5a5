#!/usr/bin/env bash
# Everything that needs one GPU, in one call of at most eight minutes:
#
#   benchmarks/gpu.sh [directory]                       by default benchmarks/results/<device>-<date>/
#   ONLY='tests|checkpoint' benchmarks/gpu.sh rest      the parts whose names match, to catch up with what had no time left
#
# Needs python3 with torch and what bigtrain itself imports; no internet, no virtual environment (PYTHON=... takes another
# interpreter). Each part has a time-out of its own, and one that fails leaves the others alone. The directory gets
# gpu.txt, with the tables, and gpu.json, with the figures. TINY=1 tries the script out, in small, on a CPU too.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TINY=${TINY:-}
readonly DEADLINE=475 # seconds from the start; what is least important comes last
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")') || exit 1
readonly device out=${1:-benchmarks/results/$(tr -c 'a-zA-Z0-9\n' '-' <<<"$device" | tr 'A-Z' 'a-z')-$(date +%F)}
mkdir -p "$out" || exit 1
work=$(mktemp -d)
readonly work
trap 'rm -rf "$work"' EXIT
: >"$work/rows"
: >"$work/parts"

has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))" "$@"; }

# part <name> <seconds> <command ...>: its output goes to the table, how it ended to the JSON.
part() {
  local name=$1 limit=$2 begin=$SECONDS code state
  shift 2
  [[ $name =~ ${ONLY:-.} ]] || return
  ((limit < DEADLINE - SECONDS)) || limit=$((DEADLINE - SECONDS))
  if ((limit < 5)); then
    printf '%s\tno time left\t0\n' "$name" | tee --append "$work/parts"
    return
  fi
  printf '\n=== %s ===\n%s\n\n' "$name" "$*"
  timeout --kill-after=10 "$limit" "$@" 2>"$work/stderr"
  code=$?
  case $code in 0) state=done ;; 124 | 137) state="not done within $limit s" ;; *) state="failed ($code)" ;; esac
  [ "$code" = 0 ] || tail --lines=25 "$work/stderr"
  printf '\n--- %s: %s, %d s\n' "$name" "$state" $((SECONDS - begin))
  printf '%s\t%s\t%d\n' "$name" "$state" $((SECONDS - begin)) >>"$work/parts"
}

bench() { # bench <name> <seconds> <script> <options ...>
  local name=$1 limit=$2 script=$3
  shift 3
  part "$name" "$limit" "$PYTHON" "benchmarks/$script" "$@" --json "$work/rows"
}

main() {
  printf '%s, %s\n' "$device" "$(date --utc '+%F %T UTC')"
  nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv 2>/dev/null
  local tests=(-k 'not zero')
  has deepspeed && tests=() || echo 'not installed: deepspeed; zero1, zero2 and zero3 are left out'
  if [ "$TINY" ]; then tiny; else full; fi
}

full() {
  local gpt2=(--model gpt2_124m --sequence-length 2048 --batch 16 --compile)
  local gpt3=(--model gpt3_1b --sequence-length 2048 --compile) large=''
  # Sides that wait keep weights and moments, 16 GB each.
  "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.get_device_properties(0).total_memory < 120e9)' && large=yes
  bench roofline 60 roofline.py "${gpt3[@]}" --batch 4 --steps 5
  bench 'step, gpt2_124m' 150 step.py "${gpt2[@]}" --turns 5 --steps 15 --together 3 --sides bare nanogpt hf hf-gpt2 lightning
  if [ "$large" ]; then
    bench 'step, gpt3_1b' 140 step.py "${gpt3[@]}" --batch 8 --turns 4 --steps 6 --sides bare nanogpt hf-gpt2
  else
    bench 'step, gpt3_1b' 100 step.py "${gpt3[@]}" --batch 6 --turns 4 --steps 8 --sides nanogpt
  fi
  # Beside two more sides it would not fit a smaller GPU.
  [ "$large" ] || bench 'step, gpt3_1b, HF' 90 step.py "${gpt3[@]}" --batch 4 --turns 4 --steps 8 --sides hf-gpt2
  bench 'loss memory' 40 loss_memory.py --turns 3 --steps 3 --width 768
  part overhead 40 "$PYTHON" benchmarks/overhead.py --engine ddp --no-op --steps 400
  if has torchao; then # beside itself in bf16
    bench 'step, gpt3_1b, fp8' 80 step.py "${gpt3[@]}" --batch 6 --precision fp8 --turns 3 --steps 8 --sides
  else
    echo 'not installed: torchao; fp8 is left out'
  fi
  bench engines 90 engines.py "${gpt2[@]}" --turns 4 --steps 10 --together 3
  has pytest && part tests 180 "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider "${tests[@]}"
  part checkpoint 60 "$PYTHON" benchmarks/checkpoint.py --ranks 1 --rounds 2
}

tiny() {
  local small=(--model gpt_nano --sequence-length 32 --batch 1 --turns 1 --steps 1)
  bench roofline 120 roofline.py "${small[@]}"
  bench 'step, gpt_nano' 120 step.py "${small[@]}" --together 2 --sides bare nanogpt
  has torchao || echo 'not installed: torchao; fp8 is left out'
  bench 'loss memory' 60 loss_memory.py --batch 1 --sequence-length 64 --vocabulary 512 --width 32 --turns 1
  bench engines 120 engines.py "${small[@]}" --engines ddp fsdp
  part overhead 60 "$PYTHON" benchmarks/overhead.py --engine ddp --no-op --steps 40
  part 'a failing part' 10 "$PYTHON" -c 'raise SystemExit("on purpose")'
  part 'a slow part' 5 sleep 60
  has pytest && part tests 60 "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider -k document_mask
}

main | tee "$out/gpu.txt"
"$PYTHON" - "$out/gpu.json" "$work/rows" "$work/parts" <<'PY'
import json, sys
out, rows, parts = sys.argv[1:]
ended = [dict(zip(("part", "state", "seconds"), line.rstrip("\n").split("\t"))) for line in open(parts)]
json.dump({"parts": ended, "benchmarks": [json.loads(line) for line in open(rows)]}, open(out, "w"), indent=1)
PY
echo "written: $out/gpu.txt and $out/gpu.json"
