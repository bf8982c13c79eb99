#!/usr/bin/env python3
"""Writes tests/data/images/resize_golden.json: what Pillow makes of the test pictures.

Run from the repository root with Pillow installed: python3 tools/reference/make_resize_goldens.py

"resize": SHA-256 of the RGB bytes after Image.resize(BICUBIC) of pictures that decode without loss.
"decode": some pixels of pictures that are lossy, or stored turned or partly transparent, upright and on white;
"tolerance" is what decoders may differ by.
"""
import glob
import hashlib
import json
import os
import random

from PIL import Image, ImageOps, __version__

ROOT = "tests/data/images/"
RESIZES = [  # file, width, height
    ("tiny_1x1.png", 256, 256),
    ("tiny_9x7.png", 320, 256),
    ("tiny_9x7.png", 5, 7),
    ("tiny_9x7.png", 9, 3),
    ("photo.gif", 256, 256),
    ("photo.gif", 17, 300),
    ("photo.gif", 300, 17),
    ("animated_4frames.gif", 320, 224),
    ("palette_trns.png", 256, 256),
    ("ui_rgba_gradient_alpha.png", 640, 384),
    ("ui_palette64.png", 640, 384),
    ("interlaced_adam7.png", 800, 448),
    ("ui_1920x1080.png", 1920, 1088),
    ("ui_1920x1080.png", 1312, 736),
    ("ui_1920x1080.png", 640, 352),
    ("ui_1920x1080.png", 33, 17),
    ("very_wide_4000x32.png", 4000, 32),
    ("very_wide_4000x32.png", 1, 1),
]
LOSSY = [
    "alpha_lossless.webp", "cmyk_adobe.jpg", "exif_orientation6.jpg", "gray_333x517.jpg",
    "odd_333x517_420.jpg", "photo_lossy.webp", "photo_progressive.jpg", "ui_real_1024x768.jpg",
]
MADE = sorted(os.path.relpath(path, ROOT) for path in glob.glob(ROOT + "made/*"))


def load(name):
    """The upright picture as RGB on white."""
    image = ImageOps.exif_transpose(Image.open(ROOT + name))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resized(name, width, height):
    image = load(name)
    # Two calls: the processor's resize is horizontal first, Pillow 13 chooses the order by the sizes.
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    pixels = image.resize((width, height), Image.Resampling.BICUBIC).tobytes()
    return {"file": name, "width": width, "height": height, "sha256": hashlib.sha256(pixels).hexdigest()}


def samples(name, tolerance):
    image = load(name)
    rng = random.Random(name)
    points = [(rng.randrange(image.width), rng.randrange(image.height)) for _ in range(32)]
    return {"file": name, "width": image.width, "height": image.height, "tolerance": tolerance,
            "pixels": [[x, y, *image.getpixel((x, y))] for x, y in points]}


def main():
    golden = {"producer": f"Pillow {__version__}",
              "resize": [resized(*case) for case in RESIZES],
              "decode": [samples(name, 2) for name in LOSSY] + [samples(name, 0) for name in MADE]}
    lists = [f'"{key}": [\n' + ",\n".join(json.dumps(e) for e in golden[key]) + "\n]" for key in ("resize", "decode")]
    with open(ROOT + "resize_golden.json", "w", encoding="utf-8") as out:
        out.write(f'{{"producer": {json.dumps(golden["producer"])},\n' + ",\n".join(lists) + "}\n")


main()
