#!/usr/bin/env bash
# Builds the CPU image and lets two containers train together:
#
#   docker/test.sh
#
# With a Docker daemon that is all (BASE_IMAGE=... builds on another base), and where docker has compose the two nodes of
# docker/compose.yaml train, are stopped and go on. Without a daemon it needs root, buildah and runc, and no registry
# either: the base image is then made of Debian's packages (mmdebstrap) and stands in for the one that the Dockerfile
# names. Takes minutes and some GB in ${TMPDIR:-/tmp}; TEST_IMAGE_CACHE=<directory> keeps base and layers for the next
# time.
# Exit codes: 0 passed, 1 failed, 77 skipped, with the reason.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "skipped: $*" >&2; exit 77; }
say() { printf '\n== %s\n' "$*"; }

training=(+model=gpt_nano data=synthetic model.vocab_size=97 model.num_layers=2 model.hidden_dim=24 model.num_heads=3
  model.max_positions=16 train.global_batch_size=8 train.micro_batch_size=2)
agent=(torchrun --nnodes=2 --nproc-per-node=1 --master-addr=127.0.0.1 --master-port=29517)
node=(/opt/bigtrain/launch/train.py "${training[@]}" train.steps=20)
checks='test "$(id -u)" != 0 && python -c "import bigtrain, torch, deepspeed; print(bigtrain.__file__, torch.__version__)"
  test -z "$(find /opt/bigtrain -name ".*" -o -name runs -o -name tests)" && ! touch /opt/bigtrain/x 2>/dev/null'

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
  run_with_"$engine" "${agent[@]}" --node-rank=1 "${node[@]}" >"$scratch/node1.log" 2>&1 &
  local other=$!
  run_with_"$engine" "${agent[@]}" --node-rank=0 "${node[@]}"
  wait "$other" || { cat "$scratch/node1.log"; exit 1; }
  grep --quiet '"world_size": 2' "$scratch/work/runs/gpt_nano/events.jsonl"
  grep --quiet '"event": "finished", "step": 20' "$scratch/work/runs/gpt_nano/events.jsonl"
  if [ "$engine" = docker ] && docker compose version >/dev/null 2>&1; then test_compose; fi
  say passed
}

build_with_docker() {
  docker build ${BASE_IMAGE:+--build-arg "BASE_IMAGE=$BASE_IMAGE"} --file docker/Dockerfile --tag bigtrain:test .
}

# In a project of its own, which leaves other runs of compose.yaml alone.
test_compose() {
  say 'docker compose: two nodes train on their own network, are stopped, which saves, and go on'
  export BIGTRAIN_IMAGE=bigtrain:test TRAINING="${training[*]} train.steps=1000000 checkpoint.every_steps=10"
  compose=(docker compose --project-name bigtrain-test --file docker/compose.yaml)
  local saved
  "${compose[@]}" up --detach --no-build
  wait_for_event checkpoint
  no_way_in
  "${compose[@]}" stop
  saved=$(in_volume cat runs/gpt_nano/exit.json)
  echo "$saved"
  [[ $saved == *'"code": 75'* ]]
  "${compose[@]}" up --detach --no-build
  wait_for_event resume
  "${compose[@]}" down --volumes
}

in_volume() { docker run --rm --volume bigtrain-test_work:/work:ro bigtrain:test "$@"; }

wait_for_event() {
  for _ in $(seq 60); do
    if in_volume grep --no-messages "\"event\": \"$1\"" runs/gpt_nano/events.jsonl | cut --characters=-100; then return; fi
    sleep 2
  done
  "${compose[@]}" logs
  exit 1
}

# A container on Docker's usual network does not reach the node with the rendezvous.
no_way_in() {
  local address
  address=$("${compose[@]}" exec -T node1 python -c "import socket; print(socket.gethostbyname('node0'))")
  "${compose[@]}" exec -T node1 python -c "import socket; socket.create_connection(('$address', 29500), 5)"
  ! docker run --rm bigtrain:test python -c "import socket; socket.create_connection(('$address', 29500), 5)" 2>/dev/null
}

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
  if [ -v compose ]; then "${compose[@]}" down --volumes --timeout 5 >/dev/null 2>&1 || true; fi
  # buildah leaves its layers mounted.
  awk -v root="$cache/" -v scratch="$scratch/" 'index($2, root) == 1 || index($2, scratch) == 1 { print $2 }' /proc/mounts |
    sort --reverse | while read -r mount; do umount "$mount" || true; done
  rm --recursive --force --one-file-system "$scratch"
}

main "$@"
