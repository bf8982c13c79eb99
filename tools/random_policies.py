#!/usr/bin/env python3
"""Draws allocations at random, to see whether losses of tags add up (docs/fidelity.md).

    python3 tools/random_policies.py POLICY.json FOLDER COUNT

Writes FOLDER/random-NN.json: fixed policies in which every tag of the calibrated POLICY has a format of its own, drawn
with chances that are drawn for each policy. Prints the files, separated by commas.
"""

import json
import os
import random
import sys

FORMATS = ["k2v2", "k4v2", "k4v4"]


def main():
    source, folder, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with open(source) as file:
        tags = sorted(json.load(file)["distortion"])
    generator = random.Random(1)
    os.makedirs(folder, exist_ok=True)
    paths = []
    for i in range(count):
        chances = [generator.gammavariate(0.5, 1) + 1e-9 for _ in FORMATS]
        rules = [{"match": tag, "format": generator.choices(FORMATS, chances)[0]} for tag in tags]
        paths.append(os.path.join(folder, f"random-{i:02}.json"))
        with open(paths[-1], "w") as file:
            json.dump({"version": 1, "name": f"random-{i:02}", "description": "Drawn at random.", "rules": rules}, file)
    print(",".join(paths))


if __name__ == "__main__":
    main()
