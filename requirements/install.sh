#!/usr/bin/env bash
# install.sh PYTHON TORCH ENVIRONMENT LOCK...: create ENVIRONMENT with PYTHON, and install torch and exactly the
# locked packages in it. TORCH: none, or see torch.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
base=$1 torch=$2 environment=$3 python=$3/bin/python locks=requirements
shift 3

fail() { echo "gpt-compose: $*" >&2; exit 2; }

"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "'$base' is not Python 3.11 or newer. Name one that is: make PYTHON=/path/to/python3.12"
"$base" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "'$base' lacks venv or ensurepip. On Debian and Ubuntu: apt-get install python3-venv"

"$base" -m venv --clear "$environment"
"$python" -m pip install -qq --disable-pip-version-check --require-hashes --no-deps -r $locks/uv.txt

echo "Installing the locked packages into $environment"
[[ $torch == none ]] || $locks/torch.sh "$PWD/$environment/bin" "$PWD/$environment" "$torch"
UV_FIND_LINKS='' UV_PYTHON_DOWNLOADS=never "$environment/bin/uv" pip install --quiet --python "$python" \
  --require-hashes --no-deps "${@/#/--requirement=$locks/}"
