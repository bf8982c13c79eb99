"""Packs reference runs of a checkpoint (NAME.json with NAME.npz) into tests/data/model/NAME.golden.

The runs were made with transformers (Qwen3VLForConditionalGeneration, float32 from bf16 weights); the arrays
are documented in tests/data/model/README.md. A packed file is little endian:
  "TXGOLD1\\0", then per array: u8 length of the name, name, u8 kind (0: int32, 1: float32), u8 dimensions,
  u32 per dimension, values in C order.
Images are copied beside it, under images/.

Usage: python convert_goldens.py GOLDENS EPISODES OUTPUT   (needs numpy)
"""
import json
import pathlib
import shutil
import struct
import sys

import numpy

SKIPPED = {"pixel_slice"}  # pixel values are tested by tests/golden/image_golden_test.cc


def pack(arrays):
    out = bytearray(b"TXGOLD1\0")
    for name in sorted(arrays.files):
        if name in SKIPPED:
            continue
        array = arrays[name]
        is_float = array.dtype.kind == "f"
        out += struct.pack("<B", len(name)) + name.encode()
        out += struct.pack("<BB", int(is_float), array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        out += array.astype("<f4" if is_float else "<i4").tobytes()
    return bytes(out)


def main():
    goldens, episodes, output = map(pathlib.Path, sys.argv[1:4])
    prompts = []
    for meta_path in sorted(goldens.glob("*.json")):
        meta = json.loads(meta_path.read_text())
        with numpy.load(meta_path.with_suffix(".npz")) as arrays:
            (output / f"{meta['name']}.golden").write_bytes(pack(arrays))
        for image in meta["images"]:
            target = output / "images" / image
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(episodes / image, target)
        prompts.append({"name": meta["name"], "images": meta["images"], "rope_delta": meta["rope_delta"]})
    (output / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")


if __name__ == "__main__":
    main()
