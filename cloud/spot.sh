#!/usr/bin/env bash
# Prepares and trains on machines that can be preempted: cloud/sky.yaml runs it on each of them.
#
# A bucket stores whole files, but the program appends to, renames and maps files. So DATA_DIR is on the machine's
# own disk, and complete files are copied to BUCKET_DIR, from which the next machine copies them back.
set -euo pipefail
cd "$(dirname "$0")/.."
shopt -s nullglob
: "${DATA_DIR:?}" "${BUCKET_DIR:?}"
export DATA_DIR
python=.venv/bin/python
nodes=${SKYPILOT_NUM_NODES:-1} node=${SKYPILOT_NODE_RANK:-0}

{ read -r dataset && read -r run && read -r source; } < <("$python" -c '
from app.settings.sources import load_settings
settings = load_settings({}, "train")
for folder in (settings.train_dataset_dir, settings.run_dir):
    print(folder.relative_to(settings.general.data_dir))
print((settings.train.branch_from or "").partition("@")[0])')

take() {
  [[ -e $BUCKET_DIR/$1/$2 && ! -e $DATA_DIR/$1 ]] || return 0
  echo "taking $1 from the bucket"
  rm -rf "$DATA_DIR/$1.partial"
  mkdir -p "$(dirname "$DATA_DIR/$1")"
  cp -r "$BUCKET_DIR/$1" "$DATA_DIR/$1.partial"
  mv "$DATA_DIR/$1.partial" "$DATA_DIR/$1"
}

# The last file shows that the others are complete. Its content is compared, because a failed copy can be half a file.
keep_folder() {
  local from=$DATA_DIR/$1 to=$BUCKET_DIR/$1 files=$2 last=$3
  ! cmp -s "$from/$last" "$to/$last" || return 0
  mkdir -p "$to" && cp "$from"/*."$files" "$from"/*.jsonl "$to" && cp "$from/$last" "$to" &&
    echo "kept ${1##*/} in the bucket"
}

keep_run() {
  local from=$DATA_DIR/$run to=$BUCKET_DIR/$run newest_first folder
  # List the checkpoints before copying the metrics, which must have a line for each step of a checkpoint.
  mapfile -t newest_first < <(compgen -G "$from/checkpoints/step-*[0-9]/state.json" | sort -rV)
  ((${#newest_first[@]})) || return 0
  newest_first=("${newest_first[@]%/state.json}")
  mkdir -p "$to" && cp "$from"/*.json* "$from"/*.txt "$to" || return
  # Delete none from the bucket before the newest is complete there.
  keep_folder "$run/checkpoints/${newest_first[0]##*/}" safetensors state.json || return
  for folder in "${newest_first[@]:1}"; do
    # Training may delete an old checkpoint meanwhile, which then need not be copied.
    keep_folder "$run/checkpoints/${folder##*/}" safetensors state.json || true
  done
  for folder in "$to"/checkpoints/*; do
    [[ -e $from/checkpoints/${folder##*/} ]] || rm -r "$folder" || true
  done
}

# If something fails here, cp prints why, and the next call tries again.
keep() {
  # A shutdown sends SIGTERM to every process, also to a running cp.
  trap '' TERM INT
  keep_folder "$dataset" bin manifest.json || true
  keep_run
}

# Waits for a process and returns its exit code. bash loses the code if a signal arrives just when a process ends that
# `wait` waits for, so `wait` only gets the code of one that has ended; a signal may end the first `wait`.
finish() {
  while kill -0 "$1" 2>/dev/null; do sleep 0.2 || true; done
  wait "$1" || wait "$1"
}

take "$dataset" manifest.json
take "$run" settings.json
[[ ! $source || -e $DATA_DIR/$run ]] || take "runs/$source" settings.json
"$python" -m app prepare
train=("$python" -m app train)
if ((nodes > 1)); then
  # Without this folder, training refuses a node because it seems to have another DATA_DIR than the first node.
  mkdir -p "$DATA_DIR/$run"
  # A node that resolves its own name to 127.0.1.1 would send the others that address.
  mapfile -t addresses <<<"$SKYPILOT_NODE_IPS"
  if read -r _ interface _ < <(ip -o -4 addr show to "${addresses[node]}"); then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
  fi
  # Fixed ranks make the first node the one that writes the run. No restart by torchrun, because only the first
  # node's disk has the checkpoints until all nodes restart from the bucket. The timeout is an hour (3600 s),
  # because preparing may take much longer on one node than on another.
  train=("$python" -m torch.distributed.run --nnodes="$nodes" --node-rank="$node"
    --master-addr="${addresses[0]}" --master-port="${MASTER_PORT:-29500}" --rdzv-conf=timeout=3600
    --nproc-per-node="$SKYPILOT_NUM_GPUS_PER_NODE" --max-restarts=0 -m app train)
  # torchrun's 30 s are not enough for a large checkpoint.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540
fi

"${train[@]}" &
training=$! stopped=
trap 'stopped=yes; kill -TERM "$training" 2>/dev/null || true' TERM INT
next=0
while ((node == 0)) && kill -0 "$training" 2>/dev/null; do
  sleep 0.2 || true
  ((SECONDS >= next)) || continue
  # In the background, because bash handles no signal before a foreground command has ended.
  keep &
  finish $! || true
  next=$((SECONDS + ${KEEP_SECONDS:-60}))
done
code=0
finish "$training" || code=$?
# torchrun turns every exit code into 1, but SkyPilot must recognize a stop.
[[ $code == 0 || ! $stopped ]] || code=143
((node == 0)) || exit "$code"

for pause in 0 1 2 4 8; do
  sleep "$pause" || true
  keep &
  finish $! && exit "$code"
done
echo "the last checkpoint could not be copied to the bucket" >&2
exit $((code ? code : 1))
