#!/usr/bin/env python3
"""Figures of the pocket agent's README, by its procedure: teacher-forced, the whole cache at one format, newest tokens too.

    python3 tools/reference/reference_figures.py --out DIR [--scan SECONDS] [--conversations 60]

1. formats on the checkpoint as it is: those of the README, and levels of 2-bit sides (min-max, clip, clip and gain, Lloyd-Max);
2. the hard checkpoints with the channels of tools/fidelity.sh, whole cache and with the engine's BF16 tail;
3. a scan over ways to choose the loud channels: which of them give the README's figures?
4. `--only prompt`: the same with another procedure, which may be the README's: the prompt is computed exactly, its cache quantized, the
   recorded answer read through it (--own-exact: its own tokens are not quantized). Needs no GPU; --scan then takes the first recipes alone.

An implementation of its own (pocket_agent_torch.py); the result goes to docs/fidelity.md. Needs a GPU to be quick.
"""

import argparse
import json
import math
import pathlib
import random
import time

import numpy as np
import torch

import pocket_agent_torch as agent

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ROOT / "models/pocket-agent"
LLOYD = (0.4528, 1.510, 0.8825)  # levels of a normal distribution, and what the stored keeps of its variance


# Formats.
def min_max(x, bits, dim=-1, clip=1.0, gain=1.0, valid=None):
    """FP16 scale and minimum; as docs/kv-format.md rounds."""
    levels = 2**bits - 1
    low, high = (x, x) if valid is None else (x.masked_fill(~valid, math.inf), x.masked_fill(~valid, -math.inf))
    low, high = low.amin(dim, keepdim=True), high.amax(dim, keepdim=True)
    trim = (high - low) * ((1 - clip) / 2)
    low, high = low + trim, high - trim
    scale, low = ((high - low) / levels).half().float(), low.half().float()
    inverse = torch.where(scale == 0, scale, 1 / scale) * gain
    origin = low + scale * (levels / 2 * (1 - 1 / gain))
    return low + scale * ((x - origin) * inverse).clamp(0, levels).round()


def lloyd_max(x, unbiased):
    """FP16 mean and deviation of a token, a table of four levels."""
    mean = x.mean(-1, keepdim=True)
    scale = ((x - mean).pow(2).mean(-1, keepdim=True).sqrt()).half().float()
    mean = mean.half().float()
    far = (x - mean).abs() > scale * (LLOYD[0] + LLOYD[1]) / 2
    level = torch.where(far, LLOYD[1], LLOYD[0]) / (LLOYD[2] if unbiased else 1)
    return mean + scale * level * torch.where(x >= mean, 1.0, -1.0)


def by_channel(x, b):
    """2 bits, a group is one channel of 32 tokens; of the last ones what there is."""
    batch, n, heads, dim = x.shape
    pad = -n % 32
    valid = torch.nn.functional.pad(b.valid, (0, pad)).reshape(batch, -1, 32, 1, 1)
    y = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad)).reshape(batch, -1, 32, heads, dim)
    y = min_max(y, 2, 2, valid=valid).masked_fill(~valid, 0)
    return y.reshape(batch, -1, heads, dim)[:, :n]


def by_32(x, bits):
    return min_max(x.unflatten(-1, (4, 32)), bits).flatten(-2)


def hadamard(n):
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


class Formats:
    """Functions for Model.forward: what the cache gives back. `loud` [layers, 128] multiplies keys before they are stored."""

    def __init__(self, device):
        self.h = hadamard(128).to(device)
        self.calibration = json.loads((MODEL / "kv_calibration.json").read_text())
        tensor = lambda x: torch.tensor(x, dtype=torch.float32, device=device)
        self.key = tensor(self.calibration["key_equalization"]).repeat(1, 2)[:, None]
        self.value = tensor(self.calibration["value_equalization"]).reshape(6, 2, 128)

    def paper(self, bits, loud=None):
        def store(layer, k, v, b):
            f = 1 if loud is None else loud[layer]
            return (by_channel(k * f, b) if bits == 2 else by_32(k * f, bits)) / f, by_32(v, bits)
        return store

    def paper_mixed(self, loud=None):
        def store(layer, k, v, b):
            f, four = 1 if loud is None else loud[layer], b.four[..., None, None]
            return (torch.where(four, by_32(k * f, 4), by_channel(k * f, b)) / f, torch.where(four, by_32(v, 4), by_32(v, 2)))
        return store

    def token(self, k_bits, v_bits, rotate=True, equalize=False, levels="min-max", loud=None):
        """One group of 128 a token."""
        c = self.calibration

        def quantized(x, bits, side):
            if bits == 2 and levels.startswith("lloyd"):
                return lloyd_max(x, levels == "lloyd unbiased")
            if bits == 2 and levels == "clip .9":
                return min_max(x, 2, clip=0.9)
            if bits == 2 and levels == "calibrated":
                return min_max(x, 2, clip=c["clip_" + side + "2"], gain=c["gain_" + side + "2"])
            return min_max(x, bits)

        def store(layer, k, v, b):
            f, g = (self.key[layer], self.value[layer]) if equalize else (1, 1)
            if loud is not None and not equalize:  # equalization takes loudness out
                f = 1 / loud[layer]
            k, v = k / f, v / g
            if rotate:
                k, v = k @ self.h, v @ self.h
            four = b.four[..., None, None]
            of = lambda x, bits, side: torch.where(four, quantized(x, 4, side), quantized(x, 2, side)) if bits == "mixed" else quantized(x, bits, side)
            k, v = of(k, k_bits, "k"), of(v, v_bits, "v")
            if rotate:
                k, v = k @ self.h, v @ self.h
            return k * f, v * g
        return store


# Conversations.
def load(path, images, count, text, first):
    out = []
    for i, line in enumerate(open(path) if isinstance(path, pathlib.Path) else path):
        if i == count:
            break
        out += text.steps(json.loads(line), first + i, images)
    return out


def cut(steps):
    """Runs for formats in which nothing depends on later tokens: a step whose tokens begin the next one's is part of it."""
    place, runs = 0, []
    for step in steps:
        rows = list(range(step.prompt - 1, len(step.tokens) - 1))
        run = agent.Sequence(step.fed, step.images, rows, step.tokens[step.prompt :], list(range(place, place + len(rows))))
        place += len(rows)
        last = runs[-1] if runs else None
        if last and len(last.tokens) < len(run.tokens) and run.tokens[: len(last.tokens)] == last.tokens and run.images[: len(last.images)] == last.images:
            run.rows, run.wanted, run.places = last.rows + run.rows, last.wanted + run.wanted, last.places + run.places
            runs[-1] = run
        else:
            runs.append(run)
    return runs


def apart(steps, text, current="turn", exact_from=None, blocks=False):
    """Every step by itself. Mixed formats: the tags at its end."""
    place, runs = 0, []
    for i, step in enumerate(steps):
        rows = list(range(step.prompt - 1, len(step.tokens) - 1))
        tags = text.tags(step.fed)
        last = tags[-1]
        is_now = lambda t: t[0] == last[0] if current == "turn" else t[1] == last[1]
        four = np.array([t[3] in ("inst", "delim", "tool_call") or (is_now(t) and t[2] == "text") for t in tags])
        if blocks:  # half of a block's tokens decide
            for begin in range(0, len(four), 64):
                four[begin : begin + 64] = four[begin : begin + 64].mean() >= 0.5
        runs.append(agent.Sequence(step.fed, step.images, rows, step.tokens[step.prompt :], list(range(place, place + len(rows))), four,
                                   None if exact_from is None else exact_from[i]))
        place += len(rows)
    return runs


def engine_tails(steps):
    """For each step and token the first token that the engine reads unquantized: the block that its chunk or piece begins in."""
    out, before = [], None
    for step in steps:
        tokens, found = step.fed, 0
        start = np.zeros(len(tokens), dtype=np.int64)
        if before and before.conversation == step.conversation:
            limit = min(len(before.fed), step.prompt - 1)
            while found + 64 <= limit and before.fed[found : found + 64] == tokens[found : found + 64]:
                found += 64
            start[:found] = out[-1][:found]
        at = found
        while at < len(tokens):
            end = min(at + 512, step.prompt) if at < step.prompt else min((at // 64 + 1) * 64, len(tokens))
            start[at:end] = at // 64 * 64
            at = end
        out.append(start)
        before = step
    return out


class Bench:
    """Scores formats on the steps of some conversations."""

    def __init__(self, model, steps, memory):
        self.model, self.steps, self.memory = model, steps, memory
        step_of, action = [], []
        for i, step in enumerate(steps):
            for j in range(step.prompt, len(step.tokens)):
                step_of.append(i)
                action.append(j >= step.action)
        to = lambda x: torch.tensor(x, device=model.device)
        self.step_of, self.action = to(step_of), to(action)
        self.conversation = np.unique([s.conversation for s in steps], return_inverse=True)[1]
        self.reference = None

    def batches(self, runs):
        out, part = [], []
        for run in sorted(runs, key=lambda r: len(r.tokens)):
            if part and (len(part) + 1) * len(run.tokens) ** 2 * 32 > self.memory:
                out.append(self.model.batch(part))
                part = []
            part.append(run)
        return out + [self.model.batch(part)]

    def logits(self, batches, store, fast=False):
        for b in batches:
            yield b, self.model.forward(b, store, fast)

    def set_reference(self, batches):
        rows = len(self.step_of)
        self.reference = torch.empty(rows, 2048, device=self.model.device)
        for b, logits in self.logits(batches, agent.exact):
            self.reference[b.places] = torch.log_softmax(logits, -1)

    def rate(self, batches, store, fast=True):
        """Steps exact."""
        wrong = torch.zeros(len(self.steps), device=self.model.device)
        for b, logits in self.logits(batches, store, fast):
            missed = (logits.argmax(-1) != b.wanted) & self.action[b.places]
            wrong.index_add_(0, self.step_of[b.places], missed.float())
        return (wrong == 0).float().mean().item()

    def score(self, batches, store):
        rows = len(self.step_of)
        wrong, kl = torch.zeros(rows, dtype=torch.bool, device=self.model.device), torch.zeros(rows, device=self.model.device)
        for b, logits in self.logits(batches, store):
            log_q, log_p = torch.log_softmax(logits, -1), self.reference[b.places]
            kl[b.places] = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
            wrong[b.places] = logits.argmax(-1) != b.wanted
        zeros = torch.zeros(len(self.steps), device=self.model.device)
        step = (zeros.index_add(0, self.step_of, (wrong & self.action).float()) == 0).cpu().numpy()
        whole = (zeros.index_add(0, self.step_of, wrong.float()) == 0).cpu().numpy()
        everywhere = lambda right: float(np.mean([right[self.conversation == c].all() for c in range(self.conversation.max() + 1)]))
        return {"step": float(step.mean()), "episode": everywhere(step), "thoughts step": float(whole.mean()),
                "thoughts episode": everywhere(whole), "kl": kl.mean().item(), "root kl": kl.sqrt().mean().item(),
                "right": "".join("01"[int(r)] for r in step)}


class PromptExact:
    """Steps whose prompts are computed without quantization; what is read of them, and the answer itself, comes from the cache."""

    def __init__(self, model, text, steps, own_exact):
        self.model, self.steps, self.own_exact, self.items, place = model, steps, own_exact, [], {}
        runs = cut(steps)
        for r, run in enumerate(runs):
            place.update({p: r for p in run.places})
        kept = {}
        for step, one in zip(steps, apart(steps, text)):
            r = place[one.places[0]]
            if r not in kept:
                b, kv = model.batch([runs[r]]), []
                model.forward(b, lambda layer, k, v, b: kv.append((k, v)) or (k, v))
                kept = {r: (b, kv)}  # steps of a run follow each other
            whole, kv = kept[r]
            b, n = agent.Batch(), len(one.tokens)
            b.run, b.run_kv, b.n, b.begin = r, kv, n, step.prompt - 1
            b.x, b.cos, b.sin = whole.x[b.begin : n], whole.cos[:, b.begin : n], whole.sin[:, b.begin : n]
            b.valid, b.four = torch.ones(1, n, dtype=torch.bool), torch.as_tensor(one.four)[None]
            b.future, b.wanted = whole.future[b.begin : n, :n], torch.tensor(one.wanted)
            b.whole_four = torch.zeros(1, len(runs[r].tokens), dtype=torch.bool)
            self.items.append(b)
        self.conversation = np.array([step.conversation for step in steps])
        self.reference = [torch.log_softmax(self.answer(b, agent.exact, None), -1) for b in self.items]

    def answer(self, b, store, stored):
        """Logits. `stored`: what the cache gives back of all keys and values of the run; None: where groups are not of one token."""
        model, m = self.model, b.n - b.begin
        x = b.x
        for i, w in enumerate(model.block):
            q, k, v = (agent.rms(x, w["norm1"]) @ w["qkv"]).reshape(1, m, -1, 128).split([8, 2, 2], 2)
            q, k = (agent.turned(agent.rms(t, w[name]), b.cos, b.sin) for t, name in ((q, "qn"), (k, "kn")))
            prompt_k, prompt_v = ((stored or b.run_kv)[i][side][:, : b.begin] for side in (0, 1))
            k_exact, v_exact = k, v
            if stored:
                own = agent.Batch()
                own.four = b.four[:, b.begin :]
                k, v = store(i, k, v, own)
            k, v = torch.cat([prompt_k, k], 1), torch.cat([prompt_v, v], 1)
            if not stored:
                k, v = store(i, k, v, b)
            if self.own_exact:
                k, v = torch.cat([k[:, : b.begin], k_exact], 1), torch.cat([v[:, : b.begin], v_exact], 1)
            q = q.transpose(1, 2).reshape(2, 4 * m, 128) * 128**-0.5
            scores = (q @ k[0].permute(1, 2, 0)).reshape(2, 4, m, b.n) + b.future
            out = torch.softmax(scores, -1).reshape(2, 4 * m, b.n) @ v[0].transpose(0, 1)
            x = x + out.reshape(8, m, 128).transpose(0, 1).reshape(m, -1) @ w["o"]
            gate, up = (agent.rms(x, w["norm2"]) @ w["up"]).chunk(2, -1)
            x = x + (torch.nn.functional.silu(gate) * up) @ w["down"]
        return agent.rms(x, model.w["model.language_model.norm.weight"]) @ model.embedding.T

    def score(self, store, by_token=False):
        run, stored, kl, step, whole = None, None, [], [], []
        for b, log_p, of in zip(self.items, self.reference, self.steps):
            if by_token and b.run != run:
                one = agent.Batch()
                run, one.four = b.run, b.whole_four
                stored = [store(i, k, v, one) for i, (k, v) in enumerate(b.run_kv)]
            logits = self.answer(b, store, stored)
            log_q = torch.log_softmax(logits, -1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
            right = logits.argmax(-1) == b.wanted
            step.append(bool(right[of.action - of.prompt :].all()))
            whole.append(bool(right.all()))
        step, whole, kl = np.array(step), np.array(whole), torch.cat(kl)
        everywhere = lambda right: float(np.mean([right[self.conversation == c].all() for c in set(self.conversation)]))
        return {"step": float(step.mean()), "episode": everywhere(step), "thoughts step": float(whole.mean()),
                "thoughts episode": everywhere(whole), "kl": kl.mean().item(), "root kl": kl.sqrt().mean().item()}


def prompt_exact(args, clock, text, model, formats, bench, result, save):
    prompts = PromptExact(model, text, bench.steps, args.own_exact)
    print(f"{clock():.0f} s: prompts computed", flush=True)

    def report(name, *what):
        r = result["prompt exact: " + name] = prompts.score(*what)
        print(f"{clock():6.1f} s {name:70} step {r['step']:.4f} episode {r['episode']:.3f} thoughts {r['thoughts step']:.4f} "
              f"{r['thoughts episode']:.3f} KL {r['kl']:.2e} root {r['root kl']:.2e}", flush=True)
        save()
        return r

    if not args.scan:
        report("exact", agent.exact)
        report("int4 paper", formats.paper(4), True)
        report("int2 paper", formats.paper(2))
        report("int2, no transform", formats.token(2, 2, rotate=False), True)
        report("int2, Hadamard", formats.token(2, 2), True)
        for levels in ("min-max", "clip .9", "calibrated", "lloyd unbiased"):
            report(f"k2v2, eq + Hadamard, {levels}", formats.token(2, 2, equalize=True, levels=levels), True)
        report("k4v2, eq + Hadamard", formats.token(4, 2, equalize=True), True)
        report("mixed, eq + Hadamard", formats.token("mixed", "mixed", equalize=True))
    for seed in SEEDS:
        for name, channels in choices(seed):
            plain = name.endswith(f"seed {seed}") and "integers" not in name and "10 " not in name and "100" not in name
            if not plain or clock() > args.scan:
                continue
            loud32, loud8 = loudness(channels, 32, model.device), loudness(channels, 8, model.device)
            if not 0.04 <= report(f"{name}, 32: int4 paper", formats.paper(4, loud32), True)["step"] <= 0.22:
                continue
            report(f"{name}, 32: int4 Hadamard", formats.token(4, 4, loud=loud32), True)
            report(f"{name}, 8: int2 Hadamard", formats.token(2, 2, loud=loud8), True)
            report(f"{name}, 32: mixed paper", formats.paper_mixed(loud32))


# How four of 64 channels may have been chosen.
def choices(seed):
    """(name, layer by layer) for one seed."""
    numpy_new = lambda s: np.random.default_rng(s)
    numpy_old = lambda s: np.random.RandomState(s)
    ways = {
        "default_rng.choice": (numpy_new, lambda r: r.choice(64, 4, replace=False)),
        "default_rng.permutation": (numpy_new, lambda r: r.permutation(64)[:4]),
        "RandomState.choice": (numpy_old, lambda r: r.choice(64, 4, replace=False)),
        "random.sample": (random.Random, lambda r: r.sample(range(64), 4)),
        "random.shuffle": (random.Random, shuffled),
        "torch.randperm": (lambda s: torch.Generator().manual_seed(s), lambda r: torch.randperm(64, generator=r)[:4].tolist()),
        "torch.rand.topk": (lambda s: torch.Generator().manual_seed(s), lambda r: torch.rand(64, generator=r).topk(4).indices.tolist()),
        "default_rng.integers": (numpy_new, lambda r: r.integers(0, 64, 4)),
    }
    for name, (make, draw) in ways.items():
        stream = make(seed)
        drawn = [list(map(int, draw(stream))) for _ in range(18)]
        yield f"{name}, seed {seed}", drawn[:6]
        yield f"{name}, seed {seed}, all layers the same", drawn[:1] * 6
        yield f"{name}, seed {seed}, second six", drawn[6:12]
        yield f"{name}, seed {seed}, third six", drawn[12:]
        for label, of in (("seed + layer", lambda i: seed + i), ("10 seed + layer", lambda i: 10 * seed + i),
                          ("100 seed + layer", lambda i: 100 * seed + i), ("1000 seed + layer", lambda i: 1000 * seed + i)):
            if seed or label == "seed + layer":
                yield f"{name}, {label}, seed {seed}", [list(map(int, draw(make(of(i))))) for i in range(6)]
        if name.startswith("default_rng"):
            yield f"{name}, [seed, layer], seed {seed}", [list(map(int, draw(make([seed, i])))) for i in range(6)]


def shuffled(generator):
    x = list(range(64))
    generator.shuffle(x)
    return x[:4]


SEEDS = [0, 1, 42, 1234, 2, 3, 7, 123, 5, 4, 2024, 2025, 2026, 1337, 10, 11, 13, 17, 100, 8, 6, 9, 12, 14, 15, 16, 99, 64, 32, 21, 77, 2023, 31337, 12345, 20260, 314, 999]
SEEDS += [s for s in range(64) if s not in SEEDS]
SHIPPED = [[17, 32, 51, 39], [1, 51, 10, 41], [45, 59, 34, 39], [0, 49, 41, 25], [45, 11, 53, 46], [18, 33, 30, 4]]  # tools/fidelity.sh
# The README's, the standard deviation allowed for another set of conversations.
WANTED = {"int4 paper, 32": (0.102, 0.015), "int4 Hadamard, 32": (0.960, 0.009), "int2 Hadamard, 8": (0.766, 0.018), "mixed paper, 32": (0.225, 0.02)}


def loudness(channels, scale, device):
    loud = torch.ones(6, 128, device=device)
    for layer, chosen in enumerate(channels):
        for c in chosen:
            loud[layer, c] = loud[layer, c + 64] = scale
    return loud


def distance(found):
    return sum(((found[name] - WANTED[name][0]) / WANTED[name][1]) ** 2 for name in found if name in WANTED)


class Clock:
    def __init__(self):
        self.begin = time.time()

    def __call__(self):
        return time.time() - self.begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--conversations", type=int, default=60)
    parser.add_argument("--scan", type=float, default=0, help="seconds")
    parser.add_argument("--screen", type=int, default=16, help="conversations on which recipes are screened")
    parser.add_argument("--own-exact", action="store_true")
    parser.add_argument("--only", default="plain,hard,scan", help="parts; or prompt")
    args = parser.parse_args()
    clock, device = Clock(), "cuda" if torch.cuda.is_available() else "cpu"
    memory = 4e9 if device == "cuda" else 3e8
    torch.set_grad_enabled(False)
    text, model, formats = agent.Text(MODEL), agent.Model(MODEL, device), Formats(device)
    data = MODEL / "trajectories"
    steps = load(data / "heldout.jsonl", data, args.conversations, text, 0)
    model.encode(sorted({image for step in steps for image in step.images}))
    bench, runs = Bench(model, steps, memory), cut(steps)
    if args.only == "prompt":
        result = {"steps": len(steps)}
        save = lambda: (args.out / "prompt_exact.json").write_text(json.dumps(result, indent=1))
        prompt_exact(args, clock, text, model, formats, bench, result, save)
        return
    batches = bench.batches(runs)
    bench.set_reference(batches)
    result = {"steps": len(steps), "tokens": len(bench.step_of), "run tokens": sum(len(r.tokens) for r in runs)}
    print(f"{clock():.0f} s: {result}, {len(runs)} runs", flush=True)

    def save():
        (args.out / "reference_figures.json").write_text(json.dumps(result, indent=1))

    def report(name, batches, store):
        result[name] = r = bench.score(batches, store)
        print(f"{clock():6.1f} s {name:58} step {r['step']:.4f} episode {r['episode']:.3f} thoughts {r['thoughts step']:.4f} "
              f"{r['thoughts episode']:.3f} KL {r['kl']:.2e} root {r['root kl']:.2e}", flush=True)
        save()

    alone = bench.batches(apart(steps, text))
    if "plain" in args.only:
        report("exact", batches, agent.exact)
        for bits in (4, 2):
            report(f"int{bits} paper", batches if bits == 4 else alone, formats.paper(bits))
        report("mixed paper", alone, formats.paper_mixed())
        report("int2, no transform", batches, formats.token(2, 2, rotate=False))
        report("int2, Hadamard", batches, formats.token(2, 2))
        for bits in ((2, 2), (4, 2)):
            for levels in ("min-max", "clip .9", "calibrated", "lloyd", "lloyd unbiased"):
                report(f"k{bits[0]}v{bits[1]}, eq + Hadamard, {levels}", batches, formats.token(*bits, equalize=True, levels=levels))
        report("mixed, eq + Hadamard", alone, formats.token("mixed", "mixed", equalize=True))
        report("int4, Hadamard", batches, formats.token(4, 4))
        report("int4, eq + Hadamard", batches, formats.token(4, 4, equalize=True))
    if "hard" in args.only:
        tails = bench.batches(apart(steps, text, exact_from=engine_tails(steps)))
        tails_blocks = bench.batches(apart(steps, text, exact_from=engine_tails(steps), blocks=True))
        for scale in (32, 8):
            loud = loudness(SHIPPED, scale, device)
            report(f"{scale}: int4 paper", batches, formats.paper(4, loud))
            report(f"{scale}: int4 paper, tail", tails, formats.paper(4, loud))
            report(f"{scale}: mixed paper", alone, formats.paper_mixed(loud))
            report(f"{scale}: int4 Hadamard", batches, formats.token(4, 4, loud=loud))
            report(f"{scale}: int2 Hadamard", batches, formats.token(2, 2, loud=loud))
            report(f"{scale}: int2, no transform", batches, formats.token(2, 2, rotate=False, loud=loud))
            report(f"{scale}: int2 paper", alone, formats.paper(2, loud))
            if scale == 32:
                question = bench.batches(apart(steps, text, current="question"))
                report("32: mixed paper, current since the question", question, formats.paper_mixed(loud))
                del question
                report("32: mixed paper, by blocks, tail", tails_blocks, formats.paper_mixed(loud))
                report("32: int4 Hadamard, tail", tails, formats.token(4, 4, loud=loud))
                report("32: int2 paper, tail", tails, formats.paper(2, loud))
        for bits in ((2, 2), (4, 2)):
            for levels in ("calibrated", "lloyd", "lloyd unbiased"):
                report(f"k{bits[0]}v{bits[1]}, eq + Hadamard, {levels}, tail", tails, formats.token(*bits, equalize=True, levels=levels))
        del tails, tails_blocks
    if "scan" in args.only and args.scan:
        scan(args, clock, text, model, formats, bench, batches, alone, result, save)
    save()


def scan(args, clock, text, model, formats, bench, batches, alone, result, save):
    device, begin = model.device, clock()
    torch.backends.cuda.matmul.allow_tf32 = True
    few = [s for s in bench.steps if s.conversation < args.screen]
    small = Bench(model, few, bench.memory)
    small_batches = small.batches(cut(few))
    shipped = [small.rate(small_batches, formats.paper(4, loudness(SHIPPED, 32, device)), fast) for fast in (False, True)]
    print(f"{clock():.0f} s: {len(few)} steps screen; the channels of fidelity.sh, int4 paper, float32 and float16: {shipped}", flush=True)
    tests = {"int4 paper, 32": lambda c: formats.paper(4, loudness(c, 32, device)),
             "int4 Hadamard, 32": lambda c: formats.token(4, 4, loud=loudness(c, 32, device)),
             "int2 Hadamard, 8": lambda c: formats.token(2, 2, loud=loudness(c, 8, device))}
    screened, done = [], set()
    for seed in SEEDS:
        for name, channels in choices(seed):
            if clock() - begin > 0.55 * args.scan:
                break
            key = json.dumps([sorted(set(c)) for c in channels])
            if key in done:
                continue
            done.add(key)
            found = {}
            for test, store in tests.items():
                found[test] = small.rate(small_batches, store(channels))
                if test == "int4 paper, 32" and seed not in SEEDS[:4] and not 0.03 <= found[test] <= 0.2:
                    break
            screened.append((name, channels, found))
    result["screened"] = screened
    print(f"{clock():.0f} s: {len(screened)} recipes screened", flush=True)
    save()
    # The nearest on all conversations; the sets of the README differ from ours, so the screen allows more.
    near = [s for s in screened if len(s[2]) == len(tests)]
    near.sort(key=lambda s: distance(s[2]))
    final = []
    for name, channels, few_found in near[:400]:
        if clock() - begin > 0.85 * args.scan:
            break
        found = {test: bench.rate(batches, store(channels)) for test, store in tests.items()}
        final.append((name, channels, found))
    print(f"{clock():.0f} s: {len(final)} of them on all conversations", flush=True)
    final.sort(key=lambda s: distance(s[2]))
    for name, channels, found in final[:40]:
        if clock() - begin < args.scan:
            found["mixed paper, 32"] = bench.rate(alone, formats.paper_mixed(loudness(channels, 32, device)))
            found["int4 paper, 8"] = bench.rate(batches, formats.paper(4, loudness(channels, 8, device)))
    final.sort(key=lambda s: distance(s[2]) + (0 if "mixed paper, 32" in s[2] else 100))
    result["final"] = final
    for name, channels, found in final[:25]:
        print(f"{distance(found):7.1f} {name:55} " + " ".join(f"{k} {v:.3f};" for k, v in found.items()) + f" {channels}", flush=True)
    save()


if __name__ == "__main__":
    main()
