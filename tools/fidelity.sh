#!/usr/bin/env bash
# Measures what KV precision costs the pocket agent, on its own checkpoint and on three that are hard to quantize
# (docs/fidelity.md): fits the codec's calibration, calibrates policies, both on calibration.jsonl, and scores them and the
# baselines on heldout.jsonl. Called by `make fidelity` after the build; writes bench/results/fidelity-*.json, the tables
# and plots of docs/fidelity.md, and build/fidelity/*.html. CONVERSATIONS=N scores the first N only (default: 60, the
# standard ones).
set -euo pipefail
cd "$(dirname "$0")/.."
# One process a core, one thread each: the model is too small for more.
cores=$(nproc)
export OMP_NUM_THREADS=1
export data=models/pocket-agent/trajectories
export out=build/fidelity
export conversations=${CONVERSATIONS:-60}
started=$SECONDS
rm -rf "$out"
mkdir -p "$out"

# Makes a checkpoint, fits its calibration and calibrates two policies.
prepare() {
  local name=$1
  shift
  build/release/bin/hard_checkpoint --output "$out/$name" "$@"
  build/release/bin/fit_kv_calibration --model "$out/$name" --conversations "$data/calibration.jsonl" --images "$data" \
    --output "$out/$name/kv_calibration.json" >"$out/$name-fit.txt"
  build/release/triaxial calibrate --model "$out/$name" --trajectories "$data/calibration.jsonl" --threads 1 \
    --max-conversations 24 --name calibrated --out "$out/$name.json" >"$out/$name-calibrate.txt"
  build/release/triaxial calibrate --model "$out/$name" --trajectories "$data/calibration.jsonl" --threads 1 \
    --max-conversations 24 --tags-at end --name published --out "$out/$name-end.json" >"$out/$name-calibrate-end.txt"
}
# The lanes NAME PART POLICIES; C and P stand for the checkpoint's policies.
score() {
  local policies=${3//C:/$out/$1.json:}
  policies=${policies//P:/$out/$1-end.json:}
  policies=${policies//k4v2/bench/policies/k4v2.json}
  build/release/triaxial eval --model "$out/$1" --trajectories "$data/heldout.jsonl" --threads 1 \
    ${conversations:+--conversations "$conversations"} --kv "$policies" \
    --json "$out/$1.$2.part.json" --html "$out/$1.$2.html" >"$out/$1.$2.txt"
}
export -f prepare score
parallel() { xargs -P "$cores" -I{} bash -c "set -euo pipefail; $1 {}"; }

# Key channels of the hard checkpoints: numpy.random.default_rng(0).choice(64, 4, replace=False), layer by layer.
channels=17,32,51,39/1,51,10,41/45,59,34,39/0,49,41,25/45,11,53,46/18,33,30,4
parallel prepare <<EOF
s1 --key-scale 1
s8 --key-scale 8 --key-channels $channels
s32 --key-scale 32 --key-channels $channels
v32 --key-scale 1 --value-scale 32
EOF
# The rotated codec without its calibration.
build/release/bin/hard_checkpoint --output "$out/s32-no-equalization" --key-scale 32 --key-channels "$channels"
parallel score <<EOF
s1 rotated bf16,int4,int2,k4v2,paper,C:2.27,C:2.35,C:2.45
v32 rotated bf16,int4,int2,k4v2,paper,C:2.3,C:2.45,C:2.6,C:3.0
s1 axes C:2.6,C:3.25,P:2.6,C:2.6+semantic,C:2.6+temporal,C:2.6+modal,C:2.6+temporal-semantic
v32 axes P:2.6,C:2.3+semantic,C:2.6+semantic,C:2.8+temporal,C:3.0+modal,C:2.45+temporal-semantic
s1 more fp8
v32 more C:2.4+temporal,C:2.6+temporal,C:2.4
s1 paper int4@paper,int2@paper,paper@paper,kivi@paper
s8 rotated bf16,int4,int2,paper,C:2.27
s32 rotated bf16,int4,int2,paper,C:2.27
s8 paper int4@paper,int2@paper,paper@paper
s32 paper int4@paper,int2@paper,paper@paper
v32 paper int2@paper,paper@paper
s32-no-equalization rotated int4
EOF
python3 tools/fidelity_report.py "$out" $((SECONDS - started))
