#!/usr/bin/env python3
"""Makes tests/data/text/pocket_prompts.json from the pocket agent's goldens (NAME.json beside NAME.npz).

usage: make_text_fixtures.py GOLDENS_FOLDER OUTPUT
"""
import ast
import json
import pathlib
import struct
import sys
import zipfile


def read_npy(data):
    """Values and shape of an int32 array in numpy's file format, version 1."""
    assert data[:6] == b"\x93NUMPY"
    (header_size,) = struct.unpack_from("<H", data, 8)
    header = ast.literal_eval(data[10:10 + header_size].decode())
    assert not header["fortran_order"] and header["descr"] in ("<i4", "<i8"), header
    code = {"<i4": "i", "<i8": "q"}[header["descr"]]
    body = data[10 + header_size:]
    return list(struct.unpack(f"<{len(body) // struct.calcsize(code)}{code}", body)), header["shape"]


def main():
    folder, output = pathlib.Path(sys.argv[1]), sys.argv[2]
    prompts = []
    for path in sorted(folder.glob("*.json")):
        golden = json.loads(path.read_text())
        with zipfile.ZipFile(path.with_suffix(".npz")) as arrays:
            ids, _ = read_npy(arrays.read("input_ids.npy"))
            grids = []
            if "image_grid_thw.npy" in arrays.namelist():
                flat, _ = read_npy(arrays.read("image_grid_thw.npy"))
                grids = [flat[i + 1:i + 3] for i in range(0, len(flat), 3)]
        prompts.append({"name": golden["name"], "prompt": golden["prompt"], "tools": golden["tools"],
                        "messages": golden["messages"], "grids": grids, "ids": ids})
    with open(output, "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(json.dumps(p, ensure_ascii=False, separators=(",", ":")) for p in prompts)
                   + "\n]\n")


if __name__ == "__main__":
    main()
