#!/usr/bin/env bash
# What the choice of loud key channels is worth: DRAWS hard checkpoints (key channels times 32), each with its own four random
# channels a layer, scored with the paper's codec on the first CONVERSATIONS held-out conversations. Prints steps exact of each draw, then
# the quartiles (docs/fidelity.md, "The reference figures"). Needs what `make fidelity` builds.
# Usage: tools/loud_channels.sh [DRAWS] [CONVERSATIONS]
set -euo pipefail
cd "$(dirname "$0")/.."
draws=${1:-40}
export conversations=${2:-20} out=build/loud-channels data=models/pocket-agent/trajectories OMP_NUM_THREADS=1
rm -rf "$out"
mkdir -p "$out"
draw() {
  local channels
  channels=$(python3 -c "
import random
r = random.Random($1)
print('/'.join(','.join(map(str, r.sample(range(64), 4))) for _ in range(6)))")
  build/release/bin/hard_checkpoint --output "$out/$1" --key-scale 32 --key-channels "$channels" >/dev/null
  build/release/triaxial eval --model "$out/$1" --trajectories "$data/heldout.jsonl" --images "$data" --threads 1 \
    --conversations "$conversations" --kv int4@paper,paper@paper --json "$out/$1.json" --html "$out/$1.html" >/dev/null
  rm -r "${out:?}/$1"
}
export -f draw
seq 0 $((draws - 1)) | xargs -P "$(nproc)" -I{} bash -c 'set -euo pipefail; draw {}'
python3 - "$out" <<'EOF'
import glob, json, statistics, sys
rows = {}
for path in sorted(glob.glob(sys.argv[1] + "/*.json")):
    with open(path) as file:
        found = {p["name"]: p["action_match"] for p in json.load(file)["policies"]}
    print(path.split("/")[-1], *(f"{name} {rate:.3f}" for name, rate in found.items() if name != "bf16"))
    for name, rate in found.items():
        if name != "bf16":
            rows.setdefault(name, []).append(rate)
for name, rates in rows.items():
    quarters = statistics.quantiles(rates, n=4)
    print(f"{name}: least {min(rates):.3f}, quartiles {quarters[0]:.3f} {quarters[1]:.3f} {quarters[2]:.3f}, most {max(rates):.3f}, "
          f"mean {statistics.mean(rates):.3f} of {len(rates)} draws")
EOF
