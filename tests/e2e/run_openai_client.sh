#!/usr/bin/env bash
# Runs openai_client_test.py with the official client, installed into a virtual environment that is kept.
# Usage: tests/e2e/run_openai_client.sh VENV   (TRIAXIAL_BINARY names the binary)
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=$1
version=3.54.0

fail() {
  echo "run_openai_client: $*" >&2
  exit 1
}
if ! "$venv/bin/python" -c "import openai; assert openai.__version__ == '$version'" 2>/dev/null; then
  python3 -m venv --clear "$venv" || fail "python3 -m venv does not work; install python3-venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "openai==$version" ||
    fail "pip could not install openai==$version; this test needs PyPI (set PIP_INDEX_URL for a mirror)"
fi
PYTHONPATH=tests/e2e exec "$venv/bin/python" tests/e2e/openai_client_test.py
