#!/usr/bin/env bash
# All measurements of docs/performance.md that need no GPU, about ten minutes; nothing else should run on the machine.
# Usage: bench/run_cpu.sh [TRIAXIAL] [NAME]     (in the repository's root; NAME ends the names of the results)
set -euo pipefail
triaxial=${1:-build/release/triaxial}
name=${2:-cpu}
results=bench/results
"$triaxial" bench decode --seconds 0.5 --json "$results/decode-$name.json"
"$triaxial" bench prefill --seconds 0.5 --json "$results/prefill-$name.json"
"$triaxial" bench codec --seconds 0.3 --json "$results/codec-$name.json"
"$triaxial" bench model --json "$results/model-pocket-agent-$name.json" --batches 1,16 --formats bf16,k4v4,75k2v2+25k4v4
"$triaxial" bench model --json "$results/model-qwen3-vl-2b-$name.json" --model bench/configs/qwen3-vl-2b --load-format dummy
# So little memory that BF16 holds three of the recorded conversations.
"$triaxial" bench serve --json "$results/serve-pocket-agent-$name.json" --policies bf16,int4,paper --kv-memory 24M \
  --workload models/pocket-agent/episodes/heldout.jsonl --concurrency 1,4,16 --seconds 15,20,30 --warmup-seconds 10 \
  -- --model models/pocket-agent
for what in decode prefill serve-pocket-agent; do
  "$triaxial" bench plot "$results/$what-$name.json" --out docs/plots
done
