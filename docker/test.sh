#!/usr/bin/env bash
# Builds the CPU image and lets two containers train together, as docker/compose.yaml does:
#
#   docker/test.sh
#
# With a Docker daemon that is all. Without one it needs root, buildah and runc, and no registry either: the
# base image is then made of Debian's packages (mmdebstrap) and stands in for the one that the Dockerfile names. Takes
# minutes and some GB in ${TMPDIR:-/tmp}; TEST_IMAGE_CACHE=<directory> keeps base and layers for the next time.
# Exit codes: 0 passed, 1 failed, 77 skipped, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "skipped: $*" >&2; exit 77; }
say() { printf '\n== %s\n' "$*"; }

training=(/opt/bigtrain/launch/train.py +model=gpt_nano data=synthetic model.vocab_size=97 model.num_layers=2
  model.hidden_dim=24 model.num_heads=3 model.max_positions=16 train.steps=20 train.global_batch_size=8 train.micro_batch_size=2)
agent=(torchrun --nnodes=2 --nproc-per-node=1 --master-addr=127.0.0.1 --master-port=29517)
checks='test "$(id -u)" != 0 && python -c "import bigtrain, torch, deepspeed; print(bigtrain.__file__, torch.__version__)"
  ! ls -A /opt/bigtrain | grep -E "^\.git$|^\.env|^runs$|^tests$" && ! touch /opt/bigtrain/x 2>/dev/null'

main() {
  scratch=$(mktemp --directory)
  cache=${TEST_IMAGE_CACHE:-$scratch/cache}
  trap clean_up EXIT
  mkdir --parents "$cache" "$scratch/work"
  chmod 777 "$scratch/work"
  if docker info >/dev/null 2>&1; then engine=docker; else engine=buildah; prepare_buildah; fi
  say "building with $engine"
  build_with_"$engine"
  say 'the image: not root, no stray files, nothing writable but /work'
  run_with_"$engine" sh -euc "$checks"
  say 'two containers train together'
  run_with_"$engine" "${agent[@]}" --node-rank=1 "${training[@]}" >"$scratch/node1.log" 2>&1 &
  local other=$!
  run_with_"$engine" "${agent[@]}" --node-rank=0 "${training[@]}"
  wait "$other" || { cat "$scratch/node1.log"; exit 1; }
  grep --quiet '"world_size": 2' "$scratch/work/runs/gpt_nano/events.jsonl"
  grep --quiet '"event": "finished", "step": 20' "$scratch/work/runs/gpt_nano/events.jsonl"
  say passed
}

build_with_docker() { docker build --file docker/Dockerfile --tag bigtrain:test .; }

run_with_docker() {
  timeout 300 docker run --rm --network host --env OMP_NUM_THREADS=1 --volume "$scratch/work:/work" bigtrain:test "$@"
}

prepare_buildah() {
  [ "$(id -u)" = 0 ] || skip 'no Docker daemon, and building without one needs root'
  local program
  for program in buildah runc mmdebstrap; do
    command -v "$program" >/dev/null || skip "no Docker daemon, and no $program: apt-get install buildah runc mmdebstrap"
  done
  buildah=(buildah --storage-driver overlay --root "$cache/storage" --runroot "$scratch/run")
  base=localhost/bigtrain-base
  "${buildah[@]}" inspect --type image "$base" >/dev/null 2>&1 || make_base
}

# Debian with Python, and with what this machine needs to reach package indexes: its certificates and pip's settings.
make_base() {
  say 'a base image of Debian packages'
  local container mirror
  mirror=$(grep --no-filename --only-matching --recursive --extended-regexp 'https?://[^ ]+/debian/?$' /etc/apt/sources.list* |
    head --lines=1) || true
  mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-dev,python3-venv,python3-pip bookworm \
    "$scratch/base.tar" ${mirror:+"$mirror"}
  container=$("${buildah[@]}" from scratch)
  "${buildah[@]}" add --quiet "$container" "$scratch/base.tar" / >/dev/null
  "${buildah[@]}" copy --quiet "$container" /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ >/dev/null
  { echo '[global]'; pip config list | sed --quiet --regexp-extended "s/^(global|:env:)\.([a-z-]+)='(.*)'$/\2 = \3/p" |
    sort --unique --key=1,1; } >"$scratch/pip.conf"
  "${buildah[@]}" copy --quiet "$container" "$scratch/pip.conf" /etc/pip.conf >/dev/null
  "${buildah[@]}" commit --quiet --rm --format docker "$container" "$base" >/dev/null
  rm "$scratch/base.tar"
}

# Prints a --volume for every directory in which this machine keeps packages for pip; an index points out of simple/.
package_volumes() {
  pip config list 2>/dev/null | grep --only-matching --extended-regexp "/[^' ]+" | sed 's:^//*:/:; s:/simple$::' | sort --unique |
    while read -r path; do
      if [ -d "$path" ]; then echo "--volume=$path:$path:ro"; fi
    done
}

build_with_buildah() {
  local volumes=()
  mapfile -t volumes < <(package_volumes)
  timeout 1800 "${buildah[@]}" bud --isolation chroot --network host --format docker --pull-never --layers "${volumes[@]}" \
    --build-arg BASE_IMAGE="$base" --file docker/Dockerfile --tag bigtrain:test .
}

run_with_buildah() {
  local container code=0
  container=$("${buildah[@]}" from --pull-never bigtrain:test)
  timeout 300 "${buildah[@]}" run --isolation oci --runtime runc --network host --env OMP_NUM_THREADS=1 \
    --volume "$scratch/work:/work" "$container" -- "$@" || code=$?
  "${buildah[@]}" rm "$container" >/dev/null
  return "$code"
}

clean_up() {
  local mount
  # buildah leaves its layers mounted.
  awk -v root="$cache/" -v scratch="$scratch/" 'index($2, root) == 1 || index($2, scratch) == 1 { print $2 }' /proc/mounts |
    sort --reverse | while read -r mount; do umount "$mount" || true; done
  rm --recursive --force --one-file-system "$scratch"
}

main "$@"
