#!/usr/bin/env python3
"""Would another transform, or other levels, store 2-bit keys and values better than what ships?

    python3 tools/reference/rotation_experiment.py [--model models/pocket-agent] [--conversations 6]

Captures Q, K and V of conversations from calibration.jsonl (`triaxial calibrate --dump`, built before), fits each
variant on the first half of them and judges it on the second: squared error of what attention adds to the residual
stream (behind o_proj) over its squares, with all blocks before a query's own at 2 bits; a mean over layers and
conversations. Transforms are of one layer and KV head. The table goes to docs/fidelity.md. Needs numpy.
"""

import argparse
import json
import pathlib
import struct
import subprocess
import tempfile

import numpy as np

import kv_codec_reference as codec
from calibration_reference import to_bf16

LEVELS = [(1, 1), (0.8, 1), (0.7, 1.05), (0.7, 1.1), (0.65, 1.1), (0.65, 1.15), (0.6, 1.1), (0.6, 1.15), (0.6, 1.2)]
GAINS = [(1, 1), (1, 1.04), (1, 1.08), (1, 1.12), (1, 1.16)]
LLOYD = np.array([-1.510, -0.4528, 0.4528, 1.510], dtype=np.float32)  # 4 levels of a normal distribution
DRAWN_EVERY = 24  # queries that are judged
BLOCK = 64


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def power(m, p):
    values, vectors = np.linalg.eigh(m)
    return (vectors * np.maximum(values, values.max() * 1e-9) ** p) @ vectors.T


def balance(stored, reader):
    """T that makes tr(T' stored T) tr(T^-1 reader T^-T) least: both become the same matrix."""
    root, inverse = power(stored, 0.5), power(stored, -0.5)
    return power(inverse @ power(root @ reader @ root, 0.5) @ inverse, 0.5)


class Layer:
    """One layer of one conversation: q [n, heads, d], k and v [n, kv_heads, d]."""

    def __init__(self, q, k, v):
        self.q, self.k, self.v = q, k, v
        self.asked = np.arange(DRAWN_EVERY - 1, len(q), DRAWN_EVERY)
        self.near = np.arange(len(q))[None, :] // BLOCK == self.asked[:, None] // BLOCK
        never, group = np.zeros_like(self.near), q.shape[1] // k.shape[1]
        self.exact = [self.weights(q[self.asked, i], k[:, i // group], never, k[:, i // group]) for i in range(q.shape[1])]

    def weights(self, q, k, near, k_near):
        """Softmax of queries over stored keys, and over exact ones where `near`."""
        scale = 1 / np.sqrt(q.shape[1])
        scores = np.where(near, q @ k_near.T, q @ k.T) * scale
        scores = np.where(np.arange(len(k))[None, :] <= self.asked[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def received(self, head, group):
        """Attention that each token gets from the queries of a KV head."""
        return sum(self.exact[head * group + i].sum(axis=0) for i in range(group))


def stored(x, kind, ratios):
    x = to_bf16(x.astype(np.float32)) + np.float32(0)
    if kind == "exact":
        return x
    if kind == "uniform":
        codes, scale, minimum = codec.quantize(x, 1, 2, *ratios)
        return minimum.astype(np.float32)[:, None] + scale.astype(np.float32)[:, None] * codes
    mean = x.mean(axis=1, keepdims=True).astype(np.float16).astype(np.float32)
    deviation = x.std(axis=1, keepdims=True).astype(np.float16).astype(np.float32)
    codes = np.searchsorted((LLOYD[1:] + LLOYD[:-1]) / 2, (x - mean) / np.maximum(deviation, 1e-12))
    return mean + deviation * LLOYD[codes] * np.float32(ratios[1])


def error(layer, o, keys, values, kinds, ratios):
    """keys, values: per KV head a matrix T: x T is stored, what reads it is multiplied by its inverse."""
    n, heads, d = layer.q.shape
    group = heads // layer.k.shape[1]
    wrong = exact = 0
    for h in range(layer.k.shape[1]):
        k = layer.k[:, h] @ keys[h]
        v = layer.v[:, h] @ values[h]
        back_k, back_v = np.linalg.inv(keys[h]).T, np.linalg.inv(values[h])
        k_stored = stored(k, kinds[0], ratios[0])
        v_stored = stored(v, kinds[1], ratios[1])
        for i in range(h * group, (h + 1) * group):
            out = o[:, i * d:(i + 1) * d].T
            weights = layer.exact[i]
            if kinds[0] != "exact":
                weights = layer.weights(layer.q[layer.asked, i] @ back_k, k_stored, layer.near, k)
            got = weights @ v_stored + np.where(layer.near, weights, 0) @ (v - v_stored)
            truth = layer.exact[i] @ layer.v[:, h]
            wrong = wrong + (got @ back_v - truth) @ out
            exact = exact + truth @ out
    return float((wrong**2).sum() / (exact**2).sum())


def mean_error(conversations, o_projs, maps, kinds, ratios):
    return np.mean([error(layer, o_projs[index], maps[index][0], maps[index][1], kinds, ratios)
                    for layers in conversations for index, layer in layers.items()])


def transforms(fit, o_projs, calibration):
    """{variant: {layer: (keys by KV head, values by KV head)}}."""
    out = {}
    for index, o in o_projs.items():
        layers = [conversation[index] for conversation in fit]
        heads, d = layers[0].q.shape[1:]
        kv_heads = layers[0].k.shape[1]
        group = heads // kv_heads
        h = hadamard(d)
        factors = np.array(calibration["key_equalization"][index])
        value_factors = np.array(calibration.get("value_equalization", np.ones((len(o_projs), kv_heads * d)))[index])
        parts = {name: ([], []) for name in
                 ("Hadamard alone", "equalized", "covariance", "equalized, then covariance", "values balanced", "both balanced")}
        for kv in range(kv_heads):
            queries = np.concatenate([x.q[:, kv * group:(kv + 1) * group].reshape(-1, d) for x in layers])
            keys = np.concatenate([x.k[:, kv] for x in layers])
            values = np.concatenate([x.v[:, kv] for x in layers])
            received = np.concatenate([x.received(kv, group) for x in layers])
            readers = sum(o[:, i * d:(i + 1) * d].T @ o[:, i * d:(i + 1) * d] for i in range(kv * group, (kv + 1) * group))
            equal_k = np.diag(1 / np.concatenate([factors, factors]))
            equal_v = np.diag(1 / value_factors[kv * d:(kv + 1) * d])
            weighted = (values * received[:, None]).T @ values
            rotate_k = np.linalg.eigh(queries.T @ queries)[1]
            rotate_v = np.linalg.eigh(weighted)[1]
            inverse_k = np.linalg.inv(equal_k)
            equal_rotate_k = np.linalg.eigh(inverse_k @ queries.T @ queries @ inverse_k)[1]
            equal_rotate_v = np.linalg.eigh(equal_v @ weighted @ equal_v)[1]
            balance_v = balance(values.T @ values, readers)
            for name, pair in {"Hadamard alone": (h, h),
                               "equalized": (equal_k @ h, equal_v @ h),
                               "covariance": (rotate_k @ h, rotate_v @ h),
                               "equalized, then covariance": (equal_k @ equal_rotate_k @ h, equal_v @ equal_rotate_v @ h),
                               "values balanced": (equal_k @ h, balance_v @ h),
                               "both balanced": (balance(keys.T @ keys, queries.T @ queries) @ h, balance_v @ h)}.items():
                parts[name][0].append(pair[0])
                parts[name][1].append(pair[1])
        for name, pair in parts.items():
            out.setdefault(name, {})[index] = pair
    return out


def capture(model, count, folder):
    """{layer: Layer} of so many conversations, as the codec `paper` sees them: neither rotated nor equalized."""
    conversations, seen = [], set()
    seed = 0
    while len(conversations) < count:
        seed += 1
        place = folder / str(seed)
        subprocess.run(["build/release/triaxial", "calibrate", "--model", model, "--trajectories",
                        "models/pocket-agent/trajectories/calibration.jsonl", "--kv-codec", "paper", "--seed", str(seed),
                        "--dump", str(place), "--out", str(folder / "unused.json")], check=True, stdout=subprocess.DEVNULL)
        dump = json.loads((place / "dump.json").read_text())
        if dump["conversation"] in seen:
            continue
        seen.add(dump["conversation"])

        def read(name, layer, width):
            flat = np.fromfile(place / f"{name}.{layer}.f32", dtype="<f4")
            return flat.reshape(dump["tokens"], width, dump["head_dim"])

        conversations.append({layer: Layer(read("q", layer, dump["num_heads"]), read("k", layer, dump["num_kv_heads"]),
                                           read("v", layer, dump["num_kv_heads"])) for layer in dump["layers"]})
    return conversations


def read_o_projs(model, layers):
    raw = (pathlib.Path(model) / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    out = {}
    for layer in layers:
        entry = header[f"model.language_model.layers.{layer}.self_attn.o_proj.weight"]
        assert entry["dtype"] == "BF16"
        begin, end = (8 + size + at for at in entry["data_offsets"])
        words = np.frombuffer(raw[begin:end], dtype="<u2").astype(np.uint32) << 16
        out[layer] = words.view(np.float32).reshape(entry["shape"]).astype(np.float64)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/pocket-agent")
    parser.add_argument("--conversations", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        conversations = capture(args.model, args.conversations, pathlib.Path(folder))
    fit, judged = conversations[:len(conversations) // 2], conversations[len(conversations) // 2:]
    o_projs = read_o_projs(args.model, fit[0])
    calibration = json.loads((pathlib.Path(args.model) / "kv_calibration.json").read_text())
    maps = transforms(fit, o_projs, calibration)
    rows = [(name, "uniform", maps[name]) for name in maps] + [("equalized, Lloyd-Max levels", "lloyd", maps["equalized"])]
    print("| 2 bits | values alone | keys alone | both | clip and gain of values, keys |\n|---|---|---|---|---|")
    for name, kind, chosen in rows:
        pairs = [(c * g, g) for c, g in LEVELS] if kind == "uniform" else GAINS
        best = []
        for side in (1, 0):
            kinds = ["exact", "exact"]
            kinds[side] = kind
            ratios = [[r, r] for r in pairs]
            best.append(min(ratios, key=lambda r: mean_error(fit, o_projs, chosen, kinds, r))[0])
        values, keys = best
        shown = [mean_error(judged, o_projs, chosen, kinds, (keys, values))
                 for kinds in (("exact", kind), (kind, "exact"), (kind, kind))]
        print(f"| {name} | " + " | ".join(f"{x:.4f}" for x in shown) +
              f" | {values[0]:.2f}, {values[1]:.2f}; {keys[0]:.2f}, {keys[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
