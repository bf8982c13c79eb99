#!/usr/bin/env bash
# All replays of docs/replay.md, about a minute. Usage: bench/run_replay.sh TRACES [TRIAXIAL]   (in the repository's root)
# TRACES holds conversation_trace.jsonl and synthetic_trace.jsonl of Mooncake (github.com/kvcache-ai/Mooncake at
# 3b5a594133958449a1feaf1c9e0fc1b553e34a28, FAST25-release/traces, Apache-2.0), of which the first 3,000 and 1,500 requests are used.
set -euo pipefail
traces=${1:?directory of the traces, see the first lines of this script}
triaxial=${2:-build/release/triaxial}
results=bench/results
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for size in 8b 32b; do tools/dummy_checkpoint.py "qwen3-vl-$size" "$work/qwen3-vl-$size"; done
head -n 3000 "$traces/conversation_trace.jsonl" >"$work/conversation_trace_first3000.jsonl"
head -n 1500 "$traces/synthetic_trace.jsonl" >"$work/synthetic_trace_first1500.jsonl"

policies=bf16,int4,int2,paper,bench/policies/pocket-calibrated-12.json
replay() {  # NAME ARGUMENTS...: prints the table, writes the JSON
  local name=$1
  shift
  echo "== $name: triaxial replay ${*//$work\//}"
  "$triaxial" replay "$@"
  "$triaxial" replay "$@" --json >"$results/replay-$name.json" 2>/dev/null
}
conversation=(--trace "$work/conversation_trace_first3000.jsonl" --model "$work/qwen3-vl-8b" --speedup 0.5)
agents=(--trace tests/data/text/trajectories.jsonl --images tests/data/trajectories --model "$work/qwen3-vl-32b" --requests 2000)
replay mooncake-conversation "${conversation[@]}" --kv-policy "$policies"
replay mooncake-synthetic --trace "$work/synthetic_trace_first1500.jsonl" --model "$work/qwen3-vl-8b" --speedup 0.7 \
  --kv-policy "$policies"
for count in 64 96 128; do replay "agents-$count" "${agents[@]}" --agents "$count" --kv-policy "$policies"; done

# From all INT4 to all INT2: the tags named get 2 bits, the others 4.
mixes=int4
for tags in user user,assistant assistant,tool_call,delim obs,delim obs,assistant obs,assistant,tool_call \
  obs,user,assistant,tool_call,reasoning; do
  policy="$work/${tags//,/-}.json"
  printf '{"version": 1, "name": "%s", "rules": [{"match": "*/*/{%s}", "format": "k2v2"}, {"match": "*/*/*", "format": "k4v4"}]}\n' \
    "${tags//,/-}" "$tags" >"$policy"
  mixes+=",$policy"
done
mixes+=,int2
replay mixes-mooncake "${conversation[@]}" --kv-policy "$mixes"
replay mixes-agents "${agents[@]}" --agents 128 --kv-policy "$mixes"
