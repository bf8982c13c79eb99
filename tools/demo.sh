#!/usr/bin/env bash
# Plays recorded computer-use sessions against the server, once with a BF16 cache and once with the paper's policy, and
# writes demo-report.html. Called by `make demo` after the build; arguments go to `triaxial demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
exec build/release/triaxial demo --html demo-report.html "$@"
