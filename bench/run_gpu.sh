#!/usr/bin/env bash
# Serves Qwen3-VL-32B with random weights on this machine's GPU under several KV policies and measures OSWorld-shaped
# conversations (docs/performance.md). Results are rewritten after every measurement, so a run that is cut keeps what
# it had. Nothing is built here.
#
# Usage: bench/run_gpu.sh TRIAXIAL OUT_DIRECTORY      (in the repository's root)
#   TRIAXIAL       the binary, or a file of tools/pack.sh
# Environment:
#   MODEL          checkpoint directory (default: made with random weights of qwen3-vl-32b)
#   POLICIES       default bf16,fp8,paper,int4; a policy file may be among them
#   KV_MEMORY      default 10G,default: as on an 80 GB card, and all that this GPU has beside the weights
#   CONCURRENCY, SECONDS_EACH, WARMUP   default 1,4,16,64, 7,7,9,12 and 12
#   TIME_LIMIT     no measurement begins after so many seconds (default 450)
#   SERVER         more options of `triaxial serve`
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; }
binary=$1 out=$2
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ $binary == *.tar.gz ]]; then
  tar -C "$work" -xzf "$binary"
  binary=$work/triaxial/bin/triaxial
  export LD_LIBRARY_PATH=$work/triaxial/lib:/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
options=()
if [ -z "${MODEL:-}" ]; then
  MODEL=$work/qwen3-vl-32b
  python3 tools/dummy_checkpoint.py qwen3-vl-32b "$MODEL"
  options+=(--load-format dummy)
fi
read -ra more <<<"${SERVER:-}"
exec_bench() {
  "$binary" bench serve --workload "${WORKLOAD:-osworld}" --policies "${POLICIES:-bf16,fp8,paper,int4}" \
    --kv-memory "${KV_MEMORY:-10G,default}" --concurrency "${CONCURRENCY:-1,4,16,64}" --seconds "${SECONDS_EACH:-7,7,9,12}" \
    --warmup-seconds "${WARMUP:-12}" --time-limit "${TIME_LIMIT:-450}" --start-seconds 120 --json "$out/serve.json" \
    -- --model "$MODEL" "${options[@]}" --max-model-len 32768 --max-num-seqs 64 "${more[@]}"
}
code=0
exec_bench || code=$?
tail -n 40 "$out/serve.server.log" || true
exit $code
