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

# The lanes NAME [--no-value-equalization] and what hard_checkpoint takes: makes a checkpoint, fits its calibration and
# calibrates its policy (not that of v32, which is scored without). Where nothing hangs on it, on fewer conversations, to save time.
prepare() {
  local name=$1 fit=() measured=24
  shift
  if [[ $1 == --no-value-equalization ]]; then
    fit=("$1")
    shift
  fi
  case $name in
    d32 | v32-left) fit+=(--clip 3) measured=16 ;;
    s8 | s32 | v32) fit+=(--clip 3 --fit 20) measured=8 ;;
  esac
  build/release/bin/hard_checkpoint --output "$out/$name" "$@"
  build/release/bin/fit_kv_calibration --model "$out/$name" --conversations "$data/calibration.jsonl" \
    --output "$out/$name/kv_calibration.json" "${fit[@]}" >"$out/$name-fit.txt"
  if [[ $name == v32 ]]; then return; fi
  build/release/triaxial calibrate --model "$out/$name" --trajectories "$data/calibration.jsonl" --threads 1 \
    --max-conversations $measured --name calibrated --out "$out/$name.json" >"$out/$name-calibrate.txt"
}
# The lanes NAME PART POLICIES; C stands for the checkpoint's policy, at a budget or, as C@PRICE, at a price; S for the
# one that ships.
score() {
  local name=$1 part=$2 policies=$3 file=$data/heldout.jsonl count=$conversations
  if [[ $policies == random ]]; then policies=$(python3 tools/random_policies.py "$out/$name.json" "$out/random-$name" 20); fi
  while [[ $policies =~ C@([0-9.e-]+) ]]; do
    policies=${policies//${BASH_REMATCH[0]}/$(python3 tools/priced_policy.py "$out/$name.json" "$out/priced-$name" "${BASH_REMATCH[1]}")}
  done
  policies=${policies//C:/$out/$name.json:}
  policies=${policies//S/models/pocket-agent/kv_policy.json}
  policies=${policies//k4v2/bench/policies/k4v2.json}
  if [[ $part == long ]]; then file=$out/long.jsonl; fi
  if [[ $part == random && $count -gt 6 ]]; then count=6; fi
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
d32 main bf16,int2,k4v2,paper,C:2.285,C:2.3,C:3.0,C:2.3+semantic,C@9e-4+semantic,C:2.6+semantic,C@1.51e-3+temporal,C:2.6+temporal,C@3.6e-4+modal
v32-left main bf16,int2,k4v2,C:2.3,C:2.6,C:3.0,C:2.6+temporal,C:2.3+semantic,C:2.6+semantic
s32 main bf16,int4,int2,C:2.27,int4@paper,int2@paper,paper@paper
s8 main bf16,int2,C:2.27,int4@paper,int2@paper,paper@paper
s1 random random
d32 random random
s1 long bf16,int2,S
v32 main bf16,int2
s32-no-calibration main int4
EOF
times >"$out/times.txt" # of this shell, and of all that it waited for
processor=$(awk 'NR == 2 { split($1, user, /[ms]/); split($2, kernel, /[ms]/)
  print int(60 * (user[1] + kernel[1]) + user[2] + kernel[2]) }' "$out/times.txt")
python3 tools/fidelity_report.py "$out" $((SECONDS - started)) "$processor"
