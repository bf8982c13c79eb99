#!/usr/bin/env python3
"""Independent float64 reference of the sensitivities that `triaxial calibrate` measures (src/calib/tag_attention.h).

    python3 calibration_reference.py DUMP [--tags 3] [--seed 1]    checks D of a dumped conversation
    python3 calibration_reference.py --golden > tests/data/kv/sensitivity_golden.json

A dump is what `triaxial calibrate ... --dump DUMP` leaves: Q, K and V as attention read them, the tags, and D.
Every tag is replayed by its definition: scores of all queries and keys, softmax in float64, keys and values of the
one tag as the codec of kv_codec_reference.py stores them. Needs numpy.
"""

import argparse
import json
import pathlib
import random
import sys

import numpy as np

import kv_codec_reference as codec_reference

BITS = {name: bits for name, bits in codec_reference.BITS.items() if name != "bf16"}
AGES = ["current", "m1", "m2", "older"]


def to_bf16(x):
    word = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return (((word + 0x7FFF + ((word >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def stored(codec, side, bits, clip, x):
    """x [tokens, head_dim] float32, BF16 values: as the cache gives it back, in float64."""
    out = np.empty(x.shape, dtype=np.float64)
    quantize = codec_reference.quantize

    def back(part, axis, ratio=(1.0, 1.0)):
        codes, scale, minimum = quantize(part, axis, bits, *ratio)
        return np.expand_dims(minimum.astype(float), axis) + np.expand_dims(scale.astype(float), axis) * codes

    for begin in range(0, len(x), 64):
        block = x[begin : begin + 64] + np.float32(0)
        if bits == 8:
            codes, scale = codec_reference.quantize_fp8(block)
            numbers = np.append(codec_reference.E4M3, np.nan)[codes & 0x7F]
            out[begin : begin + 64] = scale.astype(float)[:, None] * np.where(codes & 0x80, -numbers, numbers)
        elif codec == "rotated":
            out[begin : begin + 64] = back(block, 1, clip if bits == 2 else (1.0, 1.0))
        elif side == "k" and bits == 2:
            for group in range(0, len(block), 32):
                out[begin + group : begin + min(group + 32, len(block))] = back(block[group : group + 32], 0)
        else:
            parts = block.reshape(len(block), -1, 32)
            out[begin : begin + 64] = back(parts, 2).reshape(block.shape)
    return out


def tag_masks(tokens, tags_at):
    """{tag: [queries, keys] bool} of (turn, modal, semantic) tokens, causal."""
    turn = np.array([t[0] for t in tokens])
    n = len(tokens)
    now = np.full(n, turn[-1]) if tags_at == "end" else turn
    age = np.clip(now[:, None] - turn[None, :], 0, 3)
    causal = np.tril(np.ones((n, n), dtype=bool))
    kinds = np.array([f"{t[1]}/{t[2]}" for t in tokens])
    masks = {}
    for a, name in enumerate(AGES):
        for kind in sorted(set(kinds)):
            mask = causal & (age == a) & (kinds == kind)[None, :]
            if mask.any():
                masks[f"{name}/{kind}"] = mask
    return masks


def attend(q, k, v, mask, k_stored, v_stored, causal):
    """Outputs of one head; where mask says so, keys and values are the stored ones."""
    scale = 1 / np.sqrt(q.shape[1])
    scores = np.where(mask, q @ k_stored.T, q @ k.T) * scale
    scores = np.where(causal, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.where(mask, 0, weights) @ v + np.where(mask, weights, 0) @ v_stored


def output_columns(model, layer, heads, dim, codec):
    """What o_proj makes of a head's output, [heads][dim, hidden], in the basis in which the cache has values."""
    raw = (model / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    name = next(n for n in header if n.endswith(f"layers.{layer}.self_attn.o_proj.weight") and "visual" not in n)
    begin, end = header[name]["data_offsets"]
    words = np.frombuffer(raw[8 + size + begin : 8 + size + end], dtype="<u2")
    assert header[name]["dtype"] == "BF16"
    w = (words.astype(np.uint32) << 16).view(np.float32).astype(float).reshape(-1, heads, dim)
    if codec == "rotated":
        calibration = model / "kv_calibration.json"
        factors = json.loads(calibration.read_text()).get("value_equalization") if calibration.exists() else None
        if factors:
            own = np.array(factors[layer]).reshape(-1, dim)
            w = w * np.repeat(own, heads // len(own), axis=0)
        rotation = np.ones((1, 1))
        while len(rotation) < dim:
            rotation = np.block([[rotation, rotation], [rotation, -rotation]])
        w = w @ (rotation / np.sqrt(dim))
    return w.transpose(1, 2, 0)


def head_errors(q, k, v, codec, clips, masks, formats, columns=None):
    """q [n, heads, d], k and v [n, kv_heads, d] float32: {tag: {format: sums over queries for each head}}. With the
    columns of o_proj: of what it makes of each head."""
    n, heads, _ = q.shape
    group = heads // k.shape[1]
    causal = np.tril(np.ones((n, n), dtype=bool))
    nothing = np.zeros((n, n), dtype=bool)
    out = {tag: {f: [] for f in formats} for tag in masks}
    for h in range(heads):
        qh = q[:, h].astype(float)
        kh, vh = to_bf16(k[:, h // group]), to_bf16(v[:, h // group])
        k_exact, v_exact = kh.astype(float), vh.astype(float)
        exact = attend(qh, k_exact, v_exact, nothing, k_exact, v_exact, causal)
        for f in formats:
            k_stored = stored(codec, "k", BITS[f][0], clips[0], kh)
            v_stored = stored(codec, "v", BITS[f][1], clips[1], vh)
            for tag, mask in masks.items():
                error = attend(qh, k_exact, v_exact, mask, k_stored, v_stored, causal) - exact
                if columns is not None:
                    error = error @ columns[h]
                out[tag][f].append(float((error**2).mean(axis=1).sum()))
    return out


def check(directory, count, seed):
    directory = pathlib.Path(directory)
    dump = json.loads((directory / "dump.json").read_text())
    n, heads, kv_heads, dim = (dump[key] for key in ("tokens", "num_heads", "num_kv_heads", "head_dim"))
    tokens = []
    for span in dump["spans"]:
        tokens += [(span["turn"], span["modal"], span["semantic"])] * (span["end"] - span["begin"])
    masks = tag_masks(tokens, dump["tags_at"])
    if set(masks) != set(dump["tags"]):
        print("other tags:", sorted(set(masks) ^ set(dump["tags"])))
        return 1
    tags = random.Random(seed).sample(sorted(masks), min(count, len(masks)))
    formats = [f for f in dump["tags"][tags[0]] if f in BITS]
    total = {tag: dict.fromkeys(formats, 0.0) for tag in tags}
    over_heads = max if dump["aggregate"] == "max" else np.mean
    for layer in dump["layers"]:
        def read(name, width):
            return np.fromfile(directory / f"{name}.{layer}.f32", dtype="<f4").reshape(n, width, dim)

        columns = None
        if dump.get("metric") == "output":
            columns = output_columns(pathlib.Path(dump["model"]), layer, heads, dim, dump["codec"])
        errors = head_errors(read("q", heads), read("k", kv_heads), read("v", kv_heads), dump["codec"],
                             ((dump["clip_k2"], dump["gain_k2"]), (dump["clip_v2"], dump["gain_v2"])), {tag: masks[tag] for tag in tags}, formats, columns)
        for tag in tags:
            for f in formats:
                total[tag][f] += over_heads(errors[tag][f]) / n
    worst = 0.0
    for tag in tags:
        for f in formats:
            reference, measured = total[tag][f], dump["tags"][tag][f]
            off = abs(measured / reference - 1)
            worst = max(worst, off)
            print(f"{tag:28} {f}  reference {reference:.6e}  calibrate {measured:.6e}  {100 * off:.4f}%")
    print(f"largest difference {100 * worst:.4f}%: {'agrees' if worst <= 0.01 else 'DIFFERS'} within 1%")
    return int(worst > 0.01)


def golden():
    """The cases of src/calib/tag_attention_test.cc; inputs are drawn from the same generator on both sides."""
    cases = []
    for codec, tokens, seed, scale, tags_at in (("rotated", 150, 11, 2.0, "end"), ("rotated", 150, 21, 1.0, "turn"),
                                                ("paper", 130, 31, 2.0, "end"), ("paper", 100, 41, 4.0, "turn")):
        labels, length = [], 23
        for i in range(tokens):
            turn, at = divmod(i, length)
            if at < length // 4:
                labels.append((turn, "text", "inst" if turn == 0 else "delim"))
            elif at < length // 2:
                labels.append((turn, "image", "obs"))
            else:
                labels.append((turn, "text", "tool_call" if at >= 3 * length // 4 else "user"))

        def draw(offset, heads, factor):
            flat = codec_reference.draw("uniform", seed + offset, tokens, heads * 64)
            return (flat * np.float32(factor)).reshape(tokens, heads, 64)

        errors = head_errors(draw(0, 6, scale), draw(1, 2, scale), draw(2, 2, 1), codec, ((0.9, 1.0), (0.96, 1.0)),
                             tag_masks(labels, tags_at), list(BITS))
        cases.append(dict(codec=codec, tokens=tokens, seed=seed, scale=scale, tags_at=tags_at, errors=errors))
    lines = ",\n".join(json.dumps(case) for case in cases)
    print('{"source": "tools/reference/calibration_reference.py --golden",\n"cases": [\n' + lines + "\n]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dump", nargs="?")
    parser.add_argument("--tags", type=int, default=3, help="how many, chosen at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--golden", action="store_true")
    args = parser.parse_args()
    if args.golden:
        golden()
        return 0
    if args.dump is None:
        parser.error("give a directory that triaxial calibrate --dump made, or --golden")
    return check(args.dump, args.tags, args.seed)


if __name__ == "__main__":
    sys.exit(main())
