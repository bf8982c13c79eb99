#!/usr/bin/env bash
# Times the attention kernels on this machine's GPU beside the attention of its own libraries, in one run. Needs the
# target kernel_bench; the libraries are those that python3 can import (torch, cudnn, flash_attn3_jax), or none.
# Usage: tools/bench_gpu.sh [more arguments of kernel_bench]; results in build/gpu/results.
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/gpu/results
mkdir -p "$out"
peers=()
if command -v python3 >/dev/null && python3 tools/peers/attention_peers.py --out "$out/peers.json"; then
  peers=(--peers "$out/peers.json")
fi
commit=$(git -c safe.directory='*' rev-parse --short HEAD 2>/dev/null || echo unknown)
"${KERNEL_BENCH:-build/gpu/bin/kernel_bench}" --commit "$commit" --out "$out/kernels.json" "${peers[@]}" "$@"
