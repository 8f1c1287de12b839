#!/usr/bin/env bash
# install.sh PYTHON TORCH: make .venv with PYTHON and install exactly what is locked.
# TORCH: cpu; cuda (what registries have); auto: cpu if pip is set up to find that build, else cuda.
set -euo pipefail
cd "$(dirname "$0")/.."
base=$1 torch=$2 python=.venv/bin/python locks=requirements

fail() { echo "gpt-compose: $*" >&2; exit 2; }

case $torch in auto | cpu | cuda) ;; *) fail "TORCH=$torch is unknown: use auto, cpu or cuda." ;; esac
"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "'$base' is not Python 3.11 or newer. Name one that is: make PYTHON=/path/to/python3.12"
"$base" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "'$base' lacks venv or ensurepip. On Debian and Ubuntu: apt-get install python3-venv"

"$base" -m venv --clear .venv
$python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps -r $locks/uv.txt

install() { # cpu | cuda
  local find_links=
  if [[ $1 == cpu ]]; then # uv does not read pip's configuration
    find_links=${UV_FIND_LINKS-${PIP_FIND_LINKS-$($python -m pip config get global.find-links || true)}}
  fi
  # With a local CPU wheel in sight uv prefers it to the CUDA build, and then fails on its hash.
  UV_FIND_LINKS=${find_links//[[:space:]]/,} UV_PYTHON_DOWNLOADS=never \
    .venv/bin/uv pip install --quiet --python $python --require-hashes --no-deps \
    -r $locks/lock.txt -r $locks/lock-dev.txt -r $locks/vocabulary.txt -r $locks/torch-"$1".txt
}

echo "Installing the locked packages into .venv"
if [[ $torch == auto ]]; then
  errors=$(install cpu 2>&1) || {
    grep -q 'torch' <<<"$errors" || { echo "$errors" >&2; fail "the installation failed"; }
    echo "No locked CPU build of torch is at hand: taking the registry's, on Linux gigabytes with CUDA"
    install cuda
  }
else
  install "$torch"
fi
