#!/usr/bin/env python3
"""Writes tests/data/images/torchvision_golden.json: samples of what the reference processor's resize yields.

Run from the repository root with Pillow, torch and torchvision installed:
python3 tools/reference/make_torchvision_goldens.py
"""
import json
import random

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional

ROOT = "tests/data/images/"
CASES = [  # a file that decodes without loss, width, height
    ("photo.gif", 320, 224),
    ("tiny_9x7.png", 320, 256),
    ("bilevel_1bit_97x65.png", 320, 224),
    ("ui_palette64.png", 640, 384),
    ("ui_1920x1080.png", 1920, 1088),
    ("ui_1920x1080.png", 1312, 736),
    ("ui_1920x1080.png", 640, 352),
]
SAMPLES = 1000


def case(name, width, height):
    pixels = torch.from_numpy(np.array(Image.open(ROOT + name).convert("RGB"))).permute(2, 0, 1)
    out = functional.resize(pixels, [height, width], functional.InterpolationMode.BICUBIC, antialias=True)
    flat = out.permute(1, 2, 0).reshape(-1)
    indices = sorted(random.Random(name).sample(range(flat.numel()), SAMPLES))
    return {"file": name, "width": width, "height": height, "indices": indices,
            "values": [int(flat[i]) for i in indices]}


def main():
    producer = f"torchvision {torchvision.__version__}, torch {torch.__version__}"
    cases = ",\n".join(json.dumps(case(*c), separators=(",", ":")) for c in CASES)
    with open(ROOT + "torchvision_golden.json", "w", encoding="utf-8") as out:
        out.write(f'{{"producer": "{producer}", "cases": [\n{cases}\n]}}\n')


main()
