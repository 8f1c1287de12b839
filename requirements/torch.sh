#!/usr/bin/env bash
# torch.sh TOOLS ENVIRONMENT TORCH: install the locked torch into ENVIRONMENT with the uv and pip of TOOLS.
# TORCH: cpu; cuda (the default build); auto: cpu if pip is configured to find that build, else cuda.
# With TORCH_INDEX, the URL of an index that has other builds, TORCH names one of them: cpu, cu126, …
set -euo pipefail
cd "$(dirname "$0")"
tools=$1 environment=$2 torch=$3

fail() { echo "gpt-compose: $*" >&2; exit 2; }

install() {
  UV_PYTHON_DOWNLOADS=never "$tools/uv" pip install --quiet --python "$environment" "$@"
}

install_cpu() {
  local find_links # because uv does not read pip's configuration
  find_links=$("$tools/pip" config list | sed -n "s/.*find-links='\(.*\)'/\1/p" | sed 's/\\n/ /g')
  UV_FIND_LINKS=${UV_FIND_LINKS-${find_links//[[:space:]]/,}} \
    install --require-hashes --no-deps -r torch-cpu.txt
}

install_cuda() {
  # If uv finds a local CPU wheel, it prefers it to the CUDA build, and then fails on its hash.
  UV_FIND_LINKS='' install --require-hashes --no-deps -r torch-cuda.txt
}

if [[ -n ${TORCH_INDEX:-} ]]; then
  version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' torch-cuda.txt)
  echo "Taking torch $version+$torch from TORCH_INDEX: its version is locked, its hash is not"
  install --index "$TORCH_INDEX" "torch==$version+$torch"
  exit
fi
case $torch in
  cpu) install_cpu ;;
  cuda) install_cuda ;;
  auto)
    errors=$(install_cpu 2>&1) || {
      grep -q 'torch' <<<"$errors" || { echo "$errors" >&2; fail "the installation failed"; }
      echo "pip finds no locked CPU build of torch: installing the default build, on Linux gigabytes with CUDA"
      install_cuda
    }
    ;;
  *) fail "TORCH=$torch is unknown: use auto, cpu or cuda; or name a build of TORCH_INDEX." ;;
esac
