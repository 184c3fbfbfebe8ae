#!/usr/bin/env bash
# Installs the locked dependencies and this project into a virtual environment.
# Usage: install.sh PYTHON VENV
set -euo pipefail
python=$1 venv=$2

if ! command -v "$python" >/dev/null; then
  echo "error: '$python' is not on PATH; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2
  exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $("$python" --version) is too old; modelswap needs Python 3.11 or newer: make PYTHON=python3.12" >&2
  exit 2
fi
if [ ! -x "$venv/bin/python" ]; then
  echo "==> creating $venv with $("$python" --version)"
  if ! "$python" -m venv "$venv"; then
    rm -rf "$venv"
    echo "error: the venv module is missing; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 2
  fi
fi
echo "==> installing the locked dependencies into $venv (about 500 MB, once; usually under two minutes)"
"$venv/bin/python" -m pip install --disable-pip-version-check --no-deps --require-hashes --progress-bar on \
    -r requirements/all.lock |
  awk '/^Collecting|^Requirement already/ {printf "\r    %d packages resolved", ++n; fflush()}
       /^Downloading|^  Downloading/ {printf "\r\033[K    downloading %s %s", $2, $3; fflush()}
       /^Installing collected/ {printf "\r\033[K    unpacking …\n"; fflush()}
       /^Successfully/ {print "    done"} /rror/ {print}'
"$venv/bin/python" -m pip install --disable-pip-version-check --no-deps --no-build-isolation -q -e .
echo "==> $("$venv/bin/python" -c 'import modelswap; print("modelswap", modelswap.__version__)') is installed in $venv"
