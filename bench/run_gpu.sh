#!/usr/bin/env bash
# Qwen3-VL-32B with random weights on this machine's GPU, served under several KV policies in OSWorld-shaped
# conversations, and where a decode step's time goes (docs/performance.md). In about eight minutes: first with the KV
# memory of an 80 GB card, then with all that this GPU has, then the steps. Results are rewritten after every
# measurement, so a run that is cut keeps what it had. Nothing is built here.
#
# Usage: bench/run_gpu.sh TRIAXIAL OUT_DIRECTORY      (in the repository's root)
#   TRIAXIAL   the binary, or a file of tools/pack.sh
# Environment:
#   MODEL      checkpoint directory (default: made with random weights of qwen3-vl-32b)
#   POLICIES, KV_MEMORY, CONCURRENCY, SECONDS_EACH        of the first part: bf16,fp8,paper,int4, 10G, 1,4,16,64, 6,6,8,12;
#                                                         a policy file may be among the policies
#   FREE_POLICIES, FREE_CONCURRENCY, FREE_SECONDS_EACH    of the second part: bf16,fp8,paper, 16,64, 8,12
#   WARMUP     at most so many seconds before each measurement (10)
#   TIME_LIMIT no part begins after so many seconds, and no measurement of it (430)
#   WORKLOAD, SERVER   osworld; more options of `triaxial serve`
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,19s/^# \{0,1\}//p' "$0" >&2; exit 2; }
binary=$1 out=$2
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
options=()
if [ -z "${MODEL:-}" ]; then
  MODEL=$work/qwen3-vl-32b
  python3 tools/dummy_checkpoint.py qwen3-vl-32b "$MODEL"
  options+=(--load-format dummy)
fi
if [[ $binary == *.tar.gz ]]; then
  tar -C "$work" -xzf "$binary"
  binary=$work/triaxial/bin/triaxial
  export LD_LIBRARY_PATH=$work/triaxial/lib:/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
read -ra more <<<"${SERVER:-}"
limit=${TIME_LIMIT:-430}
code=0

# serve NAME POLICIES KV_MEMORY CONCURRENCY SECONDS
serve() {
  [ "$SECONDS" -lt "$limit" ] || { echo "$1: no time left"; return 0; }
  "$binary" bench serve --workload "${WORKLOAD:-osworld}" --policies "$2" --kv-memory "$3" --concurrency "$4" \
    --seconds "$5" --warmup-seconds "${WARMUP:-10}" --time-limit $((limit - SECONDS)) --start-seconds 120 \
    --json "$out/$1.json" -- --model "$MODEL" "${options[@]}" --max-model-len 32768 --max-num-seqs 64 "${more[@]}" ||
    code=$?
  tail -n 15 "$out/$1.server.log" || true
}

serve serve-limited "${POLICIES:-bf16,fp8,paper,int4}" "${KV_MEMORY:-10G}" "${CONCURRENCY:-1,4,16,64}" \
  "${SECONDS_EACH:-6,6,8,12}"
serve serve-free "${FREE_POLICIES:-bf16,fp8,paper}" default "${FREE_CONCURRENCY:-16,64}" "${FREE_SECONDS_EACH:-8,12}"
if [ "$SECONDS" -lt "$limit" ]; then
  "$binary" bench model --model "$MODEL" "${options[@]}" --batches 1,16 --contexts 11264 --chunk 2048 --steps 24 \
    --seconds 0 --formats "${FORMATS:-bf16,fp8,k4v4,90k2v2+10k4v4}" --json "$out/model.json" || code=$?
fi
exit $code
