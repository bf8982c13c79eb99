#!/usr/bin/env bash
# Measures what KV precision costs the pocket agent, on its own checkpoint and on two that are hard to quantize
# (docs/fidelity.md): fits the codec's calibration, calibrates a policy, both on calibration.jsonl, and scores it and the
# baselines on heldout.jsonl. Called by `make fidelity` after the build; writes bench/results/fidelity-*.json and
# build/fidelity/*.html. CONVERSATIONS=N evaluates the first N only (default: 60, the standard ones; 0: all 75).
set -euo pipefail
cd "$(dirname "$0")/.."
# Compute threads that wait must not take the cores from those that work.
export OMP_WAIT_POLICY=passive
triaxial=build/release/triaxial
bin=build/release/bin
data=models/pocket-agent/trajectories
out=build/fidelity
conversations=${CONVERSATIONS:-60}
mkdir -p "$out"

baselines=bf16,fp8,int4,int2,paper,bench/policies/k4v2.json
baselines+=,int4@paper,int2@paper,paper@paper,kivi@paper
for axes in temporal modal semantic temporal-modal temporal-semantic; do baselines+=,bench/policies/$axes.json; done

for scale in 1 8 32; do
  name=fidelity-s$scale
  model=$out/checkpoint-s$scale
  echo "== key channels times $scale"
  "$bin/hard_checkpoint" --output "$model" --key-scale "$scale"
  "$bin/fit_kv_calibration" --model "$model" --conversations "$data/calibration.jsonl" --images "$data" \
    --output "$model/kv_calibration.json" >"$out/$name-fit.txt"
  policy=$out/calibrated-s$scale.json
  "$triaxial" calibrate --model "$model" --trajectories "$data/calibration.jsonl" --max-conversations 8 \
    --out "$policy" --name calibrated >"$out/$name-calibrate.txt"
  policies=$baselines
  for bits in 2.4 2.6 2.8 3.25; do policies+=,$policy:$bits; done
  for axes in temporal modal semantic temporal-semantic; do policies+=,$policy:2.6+$axes; done
  "$triaxial" eval --model "$model" --trajectories "$data/heldout.jsonl" --conversations "$conversations" \
    --kv "$policies" --json "bench/results/$name.json" --html "$out/$name.html"
done
