#!/usr/bin/env bash
# gpu.sh [PART...]: parts of training.py on a GPU machine without network, one JSON each under $OUT.
#
#   OUT=results ORIGINAL=DIR DATASET=DIR [WHEELS=DIR] benchmarks/gpu.sh speed profile
#
# Python is what the machine has, with its torch; $WHEELS holds the packages that it lacks. $DATASET
# is what `prepare` wrote. All ends within LIMIT seconds: a part that is cut off keeps what it has
# measured, one for which no time is left is named. More calls do the rest; all parts take a GPU
# about 25 minutes. DEVICE=cpu QUICK=1 checks this script on any machine.
set -euo pipefail

started=$SECONDS
: "${OUT:?a folder for the results}" "${ORIGINAL:?the folder of the original scripts}"
limit=${LIMIT:-540} python=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
ORIGINAL=$(realpath "$ORIGINAL")
[[ $python != */* ]] || python=$(realpath --no-symlinks "$python")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [[ -n ${WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --find-links "$WHEELS" \
    --target "$work/packages" "$WHEELS"/*.whl
  export PYTHONPATH=$work/packages${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" -c 'import app.train.job; from app.train.provenance import versions; print(versions())'

options=(--device "${DEVICE:-auto}" --original "$ORIGINAL" --work "$work/bench")
[[ -z ${DATASET:-} ]] || options+=(--dataset-dir "$DATASET")
[[ -z ${REPEATS:-} ]] || options+=(--repeats "$REPEATS")
[[ -z ${QUICK:-} ]] || options+=(--quick)

# Seconds a part may take, about twice what is expected of it on a GPU.
declare -A longest=(
  [speed]=450 [profile]=120 [ladder]=500 [heldout]=300 [startup]=300 [micro_batch]=300
  [correctness]=240 [loader]=150 [ddp]=150
)
parts=("$@")
((${#parts[@]})) || parts=(speed profile ladder heldout startup micro_batch correctness loader ddp)

failed=0
for part in "${parts[@]}"; do
  left=$((limit - (SECONDS - started) - 15))
  allowed=${longest[$part]:?there is no such part: $part}
  [[ -z ${QUICK:-} ]] || allowed=$left
  if ((left < 20)); then
    echo "gpu.sh: no time left for $part"
    failed=1
    continue
  fi
  code=0
  timeout --kill-after=10 "$((left < allowed ? left : allowed))" \
    "$python" benchmarks/training.py "${options[@]}" --only "$part" --out "$OUT/$part.json" \
    >/dev/null || code=$?
  echo "gpu.sh: $part ended with $code after $((SECONDS - started)) seconds in all"
  ((code == 0)) || failed=1
done
exit "$failed"
