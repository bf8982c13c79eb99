#!/usr/bin/env python3
"""Reference of the KV codec in NumPy, written from docs/kv-format.md alone; makes tests/data/kv/codec_golden.json.

    python3 tools/reference/kv_codec_reference.py > tests/data/kv/codec_golden.json

Needs numpy. It shares no code with the C++ codec: layouts are reshapes and transposes here, formulas of one
element there. Inputs are not stored: both sides draw them from the same integer generator, exactly.
"""

import json
import sys

import numpy as np

F32 = np.float32
TOKENS = 64
MASK = (1 << 64) - 1


def draw(distribution, seed, tokens, head_dim):
    """[tokens, head_dim] float32. Every operation is exact, so any language gets the same bits."""
    state, words = seed, []
    for _ in range(tokens * head_dim):
        state = (state * 6364136223846793005 + 1442695040888963407) & MASK
        words.append(state >> 32)
    word = np.array(words, dtype=np.uint32).reshape(tokens, head_dim)
    unit = ((word >> 8).astype(np.int64) - (1 << 23)).astype(F32) * F32(2.0**-23)  # [-1, 1)
    channel = np.arange(head_dim)[None, :]
    if distribution == "uniform":
        return unit
    if distribution == "outliers":
        return np.where(channel % 29 == 3, unit * F32(64), unit).astype(F32)
    if distribution == "offset":
        return (np.floor(unit * F32(4096)) * F32(2.0**-12) + (channel % 3).astype(F32)).astype(F32)
    if distribution == "grid":  # many codes lie exactly between two
        return (np.floor(unit * F32(8)) * F32(0.5)).astype(F32)
    if distribution == "tiny":
        return unit * F32(2.0**-22)
    if distribution == "huge":
        return unit * F32(2.0**100)
    if distribution == "constant":
        return np.full((tokens, head_dim), unit[0, 0], dtype=F32)
    if distribution == "zero":
        return np.where(word >> 31 == 1, F32(-0.0), F32(0.0)).astype(F32)
    if distribution == "bits":  # any float: NaN, infinities, subnormals
        return word.view(F32)
    raise ValueError(distribution)


def quantize(x, axis_groups, bits, clip, gain=1.0):
    """x: [groups..., members] sanitized. Codes uint8, scale and minimum float16 per group."""
    levels = F32((1 << bits) - 1)
    lo, hi = x.min(axis=axis_groups), x.max(axis=axis_groups)
    trim = (hi - lo) * ((F32(1) - F32(clip)) * F32(0.5))
    lo, hi = lo + trim, hi - trim
    scale = ((hi - lo) / levels).astype(np.float16)
    minimum = lo.astype(np.float16)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, F32(0), F32(1) / scale.astype(F32)).astype(F32)
    inverse = inverse * F32(gain)
    origin = minimum.astype(F32) + scale.astype(F32) * (levels * F32(0.5) * (F32(1) - F32(1) / F32(gain)))
    steps = (x - np.expand_dims(origin, axis_groups)) * np.expand_dims(inverse, axis_groups)
    assert steps.dtype == F32 and trim.dtype == F32
    codes = np.rint(np.clip(steps, F32(0), levels)).astype(np.uint8)

    # What the format promises, in float64: half a step from the value, amplified about the range's centre, or from the
    # nearer end of the range.
    step, base = np.expand_dims(scale, axis_groups).astype(float), np.expand_dims(minimum, axis_groups).astype(float)
    centre = base + step * float(levels) / 2
    target = np.clip(centre + (x.astype(float) - centre) * gain, base, base + step * float(levels))
    assert np.all(np.abs(base + step * codes - target) <= step * (0.5 + 1e-5) + 1e-6 * np.abs(target))
    return codes, scale, minimum


# All E4M3 numbers that are not negative, by code; 0x7f is NaN.
E4M3 = np.array([(c % 8) * 2.0**-9 if c < 8 else (8 + c % 8) * 2.0 ** (c // 8 - 10) for c in range(0x7F)])


def quantize_fp8(x):
    """x: [tokens, head_dim] sanitized. E4M3 codes uint8 and one float16 scale per token."""
    scale = (np.abs(x).max(axis=1) / F32(448)).astype(np.float16)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, F32(0), F32(1) / scale.astype(F32)).astype(F32)
    y = x * inverse[:, None]
    assert y.dtype == F32
    magnitude = np.minimum(np.abs(y), F32(448)).astype(float)
    below = np.searchsorted(E4M3, magnitude, side="right") - 1
    above = np.minimum(below + 1, 0x7E)
    down, up = magnitude - E4M3[below], E4M3[above] - magnitude
    codes = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    return (codes | np.where(np.signbit(y), 0x80, 0)).astype(np.uint8), scale


def encode_side(codec, side, bits, clip, gain, x, tokens, head_dim, capacity):
    """Bytes of one side; x: [tokens, head_dim]; capacity is that of a BF16 block."""
    if bits == 16:
        word = x.view(np.uint32)
        rounded = (word.astype(np.uint64) + 0x7FFF + ((word >> 16) & 1)) >> 16
        half = np.zeros((capacity, head_dim), dtype="<u2")
        half[:tokens] = np.where(np.isnan(x), (word >> 16) | 0x40, rounded)
        if side == "k":  # [channel pair][token][channel of the pair]
            return half.reshape(capacity, head_dim // 2, 2).transpose(1, 0, 2).tobytes()
        return half.reshape(capacity // 2, 2, head_dim).transpose(0, 2, 1).tobytes()  # [pair][channel][token]

    x = np.where(np.isnan(x), F32(0), np.clip(x, F32(-65504), F32(65504))) + F32(0)
    codes = np.zeros((TOKENS, head_dim), dtype=np.uint8)
    if bits == 8:  # of both codecs
        codes[:tokens], s = quantize_fp8(x)
        scale, minimum = np.zeros((2, TOKENS), dtype="<f2")
        scale[:tokens] = s
    elif codec == "rotated":
        codes[:tokens], s, m = quantize(x, 1, bits, *((clip, gain) if bits == 2 else (1.0, 1.0)))
        scale, minimum = np.zeros((2, TOKENS), dtype="<f2")
        scale[:tokens], minimum[:tokens] = s, m
    elif side == "k" and bits == 2:
        scale, minimum = np.zeros((2, 2, head_dim), dtype="<f2")
        for group in range(2):
            rows = slice(32 * group, min(32 * group + 32, tokens))
            if rows.start < tokens:
                codes[rows], scale[group], minimum[group] = quantize(x[rows], 0, bits, 1.0)
    else:
        groups = head_dim // 32
        c, s, m = quantize(x.reshape(tokens, groups, 32), 2, bits, 1.0)
        codes[:tokens] = c.reshape(tokens, head_dim)
        scale, minimum = np.zeros((2, groups, TOKENS), dtype="<f2")
        scale[:, :tokens], minimum[:, :tokens] = s.T, m.T

    per = 8 // bits
    shifts = bits * np.arange(per)
    if side == "k":  # token = (row, j, lane), channel = (word, byte)
        split = codes.reshape(TOKENS // (16 * per), per, 16, head_dim // 4, 4).astype(int)
        packed = (split << shifts[None, :, None, None, None]).sum(axis=1).transpose(2, 0, 1, 3)
    else:  # token = (quad, byte), channel = (row, j, lane)
        split = codes.reshape(TOKENS // 4, 4, head_dim // (16 * per), per, 16).astype(int)
        packed = (split << shifts[None, None, None, :, None]).sum(axis=3).transpose(0, 2, 3, 1)
    return packed.astype(np.uint8).tobytes() + scale.tobytes() + minimum.tobytes()


BITS = {"k2v2": (2, 2), "k4v2": (4, 2), "k4v4": (4, 4), "bf16": (16, 16), "fp8": (8, 8)}


def encode(case):
    tokens, head_dim = case["tokens"], case["head_dim"]
    out = b""
    for i, side in enumerate("kv"):
        x = draw(case["distribution"], case["seed"] + i, tokens, head_dim)
        out += encode_side(case["codec"], side, BITS[case["format"]][i], case["clip_" + side + "2"],
                           case.get("gain_" + side + "2", 1.0), x, tokens, head_dim, case.get("capacity", TOKENS))
    return out


def hadamard(x):
    n = x.shape[0]
    distance = 1
    while distance < n:
        pairs = x.reshape(n // (2 * distance), 2, distance)
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(n)
        distance *= 2
    return x * F32(1 / np.sqrt(float(n)))


def fnv1a64(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return f"{value:016x}"


def main():
    cases = []

    def add(whole, **case):
        data = encode(case)
        cases.append({**case, "size": len(data), **({"bytes": data.hex()} if whole else {"fnv1a64": fnv1a64(data)})})

    seed = 1
    others = ("outliers", "offset", "grid", "tiny", "huge", "constant", "zero", "bits")
    for formats in (("k2v2", "k4v2", "k4v4", "bf16"), ("fp8",)):
        for head_dim in (64, 128):
            for codec in ("rotated", "paper"):
                for fmt in formats:
                    base = dict(codec=codec, format=fmt, head_dim=head_dim)
                    seed += 2
                    add(head_dim == 64 and (fmt not in ("bf16", "fp8") or codec == "paper"), **base, tokens=64,
                        clip_k2=0.9, clip_v2=0.96, distribution="uniform", seed=seed)
                    for i, distribution in enumerate(others):
                        seed += 2
                        add(False, **base, tokens=(64, 1, 33, 64, 17, 63, 32, 50)[i], clip_k2=(1.0, 0.9, 0.5)[i % 3],
                            clip_v2=(0.92, 1.0)[i % 2], distribution=distribution, seed=seed)
    for head_dim in (64, 128):
        for tokens, capacity in ((16, 16), (5, 16), (17, 32), (48, 48), (33, 64)):
            seed += 2
            add(False, codec="rotated", format="bf16", head_dim=head_dim, tokens=tokens, capacity=capacity, clip_k2=1.0,
                clip_v2=1.0, distribution="bits" if tokens == 17 else "uniform", seed=seed)
    for head_dim in (64, 128):
        for fmt in ("k2v2", "k4v2"):
            for i, distribution in enumerate(("uniform",) + others):
                seed += 2
                add(False, codec="rotated", format=fmt, head_dim=head_dim, tokens=(64, 33)[i % 2], clip_k2=(0.7, 0.66)[i % 2],
                    clip_v2=0.75, gain_k2=(1.15, 2.0)[i % 2], gain_v2=1.1, distribution=distribution, seed=seed)
    transforms = []
    for head_dim in (64, 128):
        for distribution in ("uniform", "outliers", "tiny"):
            seed += 1
            y = hadamard(draw(distribution, seed, 1, head_dim)[0])
            transforms.append(dict(head_dim=head_dim, distribution=distribution, seed=seed, floats=y.astype("<f4").tobytes().hex()))
    lines = ",\n".join(json.dumps(case) for case in cases)
    print('{"source": "tools/reference/kv_codec_reference.py",\n"cases": [\n' + lines + '\n],\n"hadamard": [\n' +
          ",\n".join(json.dumps(t) for t in transforms) + "\n]}")
    print(f"{len(cases)} cases", file=sys.stderr)


if __name__ == "__main__":
    main()
