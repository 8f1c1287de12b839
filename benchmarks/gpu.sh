#!/usr/bin/env bash
# gpu.sh [PART...]: training.py on a GPU machine without network, within LIMIT seconds.
#
#   OUT=results ORIGINAL=DIR [DATASET=DIR] [WHEELS=DIR] [PYTHON=python3] benchmarks/gpu.sh
#
# writes $OUT/gpu.json after each measurement, and $OUT/table.md at the end. Run again with the same
# OUT, it continues where it stopped. It uses the machine's Python and torch; $WHEELS holds the packages
# that the machine lacks. $DATASET is a folder that `prepare` wrote: 20M tokens and some held-out ones.
# DEVICE=cpu QUICK=1 LIMIT=1800 checks everything with a small model on any machine.
set -euo pipefail

: "${OUT:?a folder for the results}" "${ORIGINAL:?the folder of the original scripts}"
python=${PYTHON:-python3} limit=${LIMIT:-480}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
options=(
  --original "$(realpath "$ORIGINAL")" --device "${DEVICE:-auto}" --out "$OUT/gpu.json"
)
[[ -z ${DATASET:-} ]] || options+=(--dataset-dir "$(realpath "$DATASET")")
[[ -z ${QUICK:-} ]] || options+=(--quick)
if (($#)); then
  parts=$*
  options+=(--only "${parts// /,}")
fi
[[ $python != */* ]] || python=$(realpath --no-symlinks "$python")
[[ -z ${WHEELS:-} ]] || WHEELS=$(realpath "$WHEELS")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# As on a machine that has run the program before, modules are not compiled again by each process.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$work/bytecode
if [[ -n ${WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/packages" \
    "$WHEELS"/*.whl
  export PYTHONPATH=$work/packages${PYTHONPATH:+:$PYTHONPATH}
fi

trap 'kill "$measuring"' INT TERM
"$python" benchmarks/training.py "${options[@]}" --work "$work/bench" \
  --seconds "$((limit - SECONDS))" &
measuring=$!
code=0
wait "$measuring" || code=$?
wait "$measuring" 2>/dev/null || true
[[ ! -e $OUT/gpu.json ]] || "$python" benchmarks/gpu_table.py "$OUT/gpu.json" | tee "$OUT/table.md"
exit "$code"
