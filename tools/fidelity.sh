#!/usr/bin/env bash
# Measures what KV precision costs the pocket agent, on its own checkpoint and on five that are hard to quantize
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
tail -n 15 "$data/heldout.jsonl" >"$out/long.jsonl"

# The lanes NAME [--no-value-equalization] and what hard_checkpoint takes: makes a checkpoint, fits its calibration (the
# hard ones' on fewer conversations, to save time) and calibrates its policy (not v32's, whose is that of s1).
prepare() {
  local name=$1 fit=() measured=24
  shift
  if [[ $1 == --no-value-equalization ]]; then
    fit=("$1")
    shift
  fi
  if [[ $name != s1 ]]; then
    fit+=(--clip 3)
    measured=16
  fi
  build/release/bin/hard_checkpoint --output "$out/$name" "$@"
  build/release/bin/fit_kv_calibration --model "$out/$name" --conversations "$data/calibration.jsonl" --images "$data" \
    --output "$out/$name/kv_calibration.json" "${fit[@]}" >"$out/$name-fit.txt"
  if [[ $name == v32 ]]; then return; fi
  build/release/triaxial calibrate --model "$out/$name" --trajectories "$data/calibration.jsonl" --threads 1 \
    --max-conversations $measured --name calibrated --out "$out/$name.json" >"$out/$name-calibrate.txt"
}
# The lanes NAME PART POLICIES; C stands for the checkpoint's policy, S for the one that ships.
score() {
  local name=$1 part=$2 policies=$3 file=$data/heldout.jsonl count=$conversations
  if [[ $policies == random ]]; then policies=$(python3 tools/random_policies.py "$out/$name.json" "$out/random-$name" 20); fi
  policies=${policies//C:/$out/$name.json:}
  policies=${policies//S/models/pocket-agent/kv_policy.json}
  policies=${policies//k4v2/bench/policies/k4v2.json}
  if [[ $part == long ]]; then file=$out/long.jsonl; fi
  if [[ $part == random && $count -gt 8 ]]; then count=8; fi
  build/release/triaxial eval --model "$out/$name" --trajectories "$file" --images "$data" --threads 1 \
    --conversations "$count" --kv "$policies" \
    --json "$out/$name.$part.part.json" --html "$out/$name.$part.html" >"$out/$name.$part.txt"
}
export -f prepare score
parallel() { xargs -P "$cores" -I{} bash -c "set -euo pipefail; $1 {}"; }

# Key channels of the hard checkpoints: numpy.random.default_rng(0).choice(64, 4, replace=False), layer by layer.
channels=17,32,51,39/1,51,10,41/45,59,34,39/0,49,41,25/45,11,53,46/18,33,30,4
parallel prepare <<EOF
s1 --key-scale 1
d32 --key-scale 1 --value-scale 32 --dense-values
v32-left --no-value-equalization --key-scale 1 --value-scale 32
v32 --key-scale 1 --value-scale 32
s8 --key-scale 8 --key-channels $channels
s32 --key-scale 32 --key-channels $channels
EOF
# The rotated codec without its calibration.
build/release/bin/hard_checkpoint --output "$out/s32-no-calibration" --key-scale 32 --key-channels "$channels"
parallel score <<EOF
s1 main bf16,fp8,int4,int2,k4v2,paper,C:2.27,C:2.6,C:2.6+temporal,C:2.6+semantic,int4@paper,int2@paper,paper@paper,kivi@paper
d32 main bf16,int2,k4v2,paper,C:2.27,C:2.3,C:2.45,C:3.0,C:2.3+modal,C:2.3+semantic,C:2.6+semantic,C:2.6+temporal,C:2.8+temporal,C:2.45+temporal-semantic
v32-left main bf16,int2,k4v2,C:2.3,C:2.6,C:3.0,C:2.6+temporal
s32 main bf16,int4,int2,C:2.27,int4@paper,int2@paper,paper@paper
s8 main bf16,int2,C:2.27,int4@paper,int2@paper,paper@paper
s1 random random
d32 random random
s1 long bf16,int2,S
v32 main bf16,int2,k4v2
s32-no-calibration main int4
EOF
python3 tools/fidelity_report.py "$out" $((SECONDS - started))
