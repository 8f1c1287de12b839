#!/usr/bin/env bash
# Prepares and trains on machines that can be taken away: cloud/sky.yaml runs it on each of them.
#
# A bucket takes whole files; the program appends, renames and maps. So DATA_DIR is on the machine's own disk,
# and what is complete is copied to BUCKET_DIR, from where the next machine takes it.
set -euo pipefail
cd "$(dirname "$0")/.."
shopt -s nullglob
: "${DATA_DIR:?}" "${BUCKET_DIR:?}"
export DATA_DIR
python=.venv/bin/python
nodes=${SKYPILOT_NUM_NODES:-1} node=${SKYPILOT_NODE_RANK:-0}

{ read -r dataset && read -r run; } < <("$python" -c '
from app.sources import load_settings
settings = load_settings({}, "train")
for folder in (settings.train_dataset_dir, settings.run_dir):
    print(folder.relative_to(settings.general.data_dir))')

take() {
  [[ -e $BUCKET_DIR/$1/$2 && ! -e $DATA_DIR/$1 ]] || return 0
  echo "taking $1 from the bucket"
  rm -rf "$DATA_DIR/$1.partial"
  mkdir -p "$(dirname "$DATA_DIR/$1")"
  cp -r "$BUCKET_DIR/$1" "$DATA_DIR/$1.partial"
  mv "$DATA_DIR/$1.partial" "$DATA_DIR/$1"
}

keep_dataset() {
  [[ ! -e $BUCKET_DIR/$dataset/manifest.json ]] || return 0
  mkdir -p "$BUCKET_DIR/$dataset"
  # The manifest last: it says that the shards are there.
  cp "$DATA_DIR/$dataset"/*.bin "$BUCKET_DIR/$dataset"
  cp "$DATA_DIR/$dataset/manifest.json" "$BUCKET_DIR/$dataset"
}

# What fails here is told by cp, and done the next time.
keep_run() {
  local from=$DATA_DIR/$run to=$BUCKET_DIR/$run folder
  # Listed before the metrics are copied, which need a line for each of a checkpoint's steps.
  local checkpoints=("$from"/checkpoints/step-*[0-9])
  ((${#checkpoints[@]})) || return 0
  mkdir -p "$to/checkpoints"
  cp "$from"/*.json* "$from"/*.txt "$to" || return 0
  for folder in "${checkpoints[@]##*/}"; do
    [[ ! -e $to/checkpoints/$folder/state.json ]] || continue
    mkdir -p "$to/checkpoints/$folder"
    # One that is deleted meanwhile, because there are newer ones, is none to keep.
    cp "$from/checkpoints/$folder"/*.safetensors "$to/checkpoints/$folder" &&
      cp "$from/checkpoints/$folder/state.json" "$to/checkpoints/$folder" &&
      echo "kept $folder in the bucket" || true
  done
  for folder in "$to"/checkpoints/*; do
    [[ -e $from/checkpoints/${folder##*/} ]] || rm -r "$folder"
  done
}

take "$dataset" manifest.json
take "$run" settings.json
"$python" -m app prepare
train=("$python" -m app train)
if ((nodes > 1)); then
  # A node without it counts as one that sees another disk than the first one's, by mistake.
  mkdir -p "$DATA_DIR/$run"
  # Fixed ranks, so that the first node is the one that writes the run; and no restart among the nodes, since
  # their disks have other checkpoints than the first one's until all begin again from the bucket.
  train=("$python" -m torch.distributed.run --nnodes="$nodes" --node-rank="$node"
    --master-addr="${SKYPILOT_NODE_IPS%%$'\n'*}" --master-port="${MASTER_PORT:-29500}"
    --nproc-per-node="$SKYPILOT_NUM_GPUS_PER_NODE" --max-restarts=0 -m app train)
  # torchrun's 30 s are not enough for a large checkpoint.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540
fi
if ((node > 0)); then
  exec "${train[@]}"
fi

keep_dataset
"${train[@]}" &
training=$!
trap 'kill -TERM "$training"' TERM INT
while kill -0 "$training" 2>/dev/null; do
  sleep "${KEEP_SECONDS:-60}" &
  wait -n "$training" $! || true
  keep_run
done
kill %sleep 2>/dev/null || true
code=0
wait "$training" || code=$?
exit "$code"
