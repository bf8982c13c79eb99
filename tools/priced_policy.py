#!/usr/bin/env python3
"""Gives a calibrated policy a price in place of its budget (docs/fidelity.md).

    python3 tools/priced_policy.py POLICY.json FOLDER PRICE

Writes FOLDER/price-PRICE.json and prints that path. Budgets move whole tags; a price between those of two tags also
moves blocks that hold some tokens of the one and some of the other, so a policy that sees few tags has more to choose from.
"""

import json
import os
import sys


def main():
    source, folder, price = sys.argv[1], sys.argv[2], sys.argv[3]
    with open(source) as file:
        policy = json.load(file)
    del policy["budget_bits"]
    policy |= {"name": f"price-{price}", "price": float(price)}
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"price-{price}.json")
    with open(path, "w") as file:
        json.dump(policy, file)
    print(path)


if __name__ == "__main__":
    main()
