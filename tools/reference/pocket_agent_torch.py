"""Recorded conversations of the pocket agent and its forward pass, in PyTorch, with a KV cache whose stored form is any function.

Written from the checkpoint, its chat template and the description of Qwen3-VL; shares no code with src/. What the cache
stores is given back as float32 (fake quantization). `python3 pocket_agent_torch.py GOLDENS` checks it against the goldens that
come with the checkpoint (tokens, positions, last logits). Needs torch, tokenizers, jinja2, pillow and safetensors.
"""

import dataclasses
import json
import math
import pathlib
import sys

import jinja2
import jinja2.sandbox
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD = 2001, 2002, 2009, 2010, 2012
CALL, CALL_END, RESPONSE, RESPONSE_END, THINK, THINK_END = 2014, 2015, 2022, 2023, 2024, 2025
GRID = (6, 10)  # merged rows and columns of the one screen size
PADS = GRID[0] * GRID[1]


@dataclasses.dataclass
class Step:
    """One answer: the tokens that lead to it, and it."""

    conversation: int
    tokens: list  # prompt, then answer
    prompt: int  # tokens of the prompt
    action: int  # first token of the call or answer, behind the thought
    images: list  # paths, in order

    @property
    def fed(self):
        """What the model is given: nobody asks what follows the last token."""
        return self.tokens[:-1]


class Text:
    def __init__(self, directory):
        directory = pathlib.Path(directory)
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
        self.template = environment.from_string((directory / "chat_template.jinja").read_text())

    def render(self, messages, tools, generation_prompt):
        return self.template.render(messages=messages, tools=tools, add_generation_prompt=generation_prompt)

    def encode(self, text):
        out = []
        for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
            out += [token] * (PADS if token == IMAGE_PAD else 1)
        return out

    def steps(self, conversation, index, images):
        messages, tools, out = conversation["messages"], conversation.get("tools"), []
        shown = []
        for m, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self.encode(self.render(messages[:m], tools, True))
                whole = self.encode(self.render(messages[: m + 1], tools, False))
                assert whole[: len(prompt)] == prompt
                while whole[-1] != IM_END:
                    whole.pop()
                action = len(whole) - whole[::-1].index(THINK_END) if THINK_END in whole[len(prompt) :] else len(prompt)
                out.append(Step(index, whole, len(prompt), action, list(shown)))
            elif isinstance(message["content"], list):
                shown += [images / part["image_url"]["url"] for part in message["content"] if "image_url" in part]
        return out

    def tags(self, tokens):
        """For each token (turn, question, modal, semantic); a turn begins at every user block, a question where a user speaks."""
        pieces = [self.tokenizer.id_to_token(t).replace("Ċ", "\n") for t in range(self.tokenizer.get_vocab_size())]
        blank = {t for t, piece in enumerate(pieces) if piece.strip("\n") == ""}
        special = lambda t: t >= IM_START
        out, turn, question, role, kind, header = [], -1, -1, None, None, False
        for i, token in enumerate(tokens):
            if token == IM_START:
                role, header = pieces[tokens[i + 1]], True
                if role == "user":
                    turn += 1
                    question += RESPONSE not in tokens[i + 2 : i + 5]
                kind = {"system": "inst", "user": "user", "assistant": "assistant"}[role]
            semantic, modal = "delim", "text"
            after, before = i > 0 and special(tokens[i - 1]), i + 1 < len(tokens) and special(tokens[i + 1])
            if token == IMAGE_PAD:
                semantic, modal = "obs", "image"
            elif special(token):
                kind = {RESPONSE: "obs", CALL: "tool_call", THINK: "reasoning", CALL_END: "assistant", THINK_END: "assistant"}.get(token, kind)
            elif not header and not (token in blank and (after or before)):
                semantic = kind
            if header and token in blank:
                header = False
            out.append((max(turn, 0), max(question, 0), modal, semantic))
        return out


def positions(tokens):
    out, at, i = [], 0, 0
    while i < len(tokens):
        if tokens[i] == IMAGE_PAD:
            out += [(at, at + p // GRID[1], at + p % GRID[1]) for p in range(PADS)]
            at, i = at + max(GRID), i + PADS
        else:
            out.append((at, at, at))
            at, i = at + 1, i + 1
    return np.array(out)


def patches(path):
    """[240, 1536] in [-1, 1]: patches of 16 x 16 in the order of the merger, each channel, twice, row, column."""
    x = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / np.float32(127.5) - 1
    x = x.transpose(2, 0, 1).reshape(3, GRID[0], 2, 16, GRID[1], 2, 16)
    x = x.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    return np.repeat(x, 2, axis=5).reshape(PADS * 4, -1)


def turned(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rms(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


@dataclasses.dataclass
class Sequence:
    """A run of tokens for one forward pass, and whose next tokens are looked at."""

    tokens: list
    images: list
    rows: list  # positions
    wanted: list  # token that was recorded behind each
    places: list  # index of each among all rows
    four: np.ndarray = None  # [tokens] bool: at 4 bits, in mixed formats
    exact_from: np.ndarray = None  # [tokens] first token that this one reads unquantized; None: none


class Batch:
    pass


class Model:
    layers, heads, kv_heads, dim = 6, 8, 2, 128

    def __init__(self, directory, device):
        weights = load_file(str(pathlib.Path(directory) / "model.safetensors"))
        self.w = {name: w.float().to(device) for name, w in weights.items()}
        self.device, self.features = device, {}
        self.block = []
        for i in range(self.layers):
            name = f"model.language_model.layers.{i}."
            get = lambda part: self.w[name + part + ".weight"]
            attn = "self_attn."
            self.block.append({
                "norm1": get("input_layernorm"), "norm2": get("post_attention_layernorm"),
                "qkv": torch.cat([get(attn + "q_proj"), get(attn + "k_proj"), get(attn + "v_proj")]).T.contiguous(),
                "qn": get(attn + "q_norm"), "kn": get(attn + "k_norm"), "o": get(attn + "o_proj").T.contiguous(),
                "up": torch.cat([get("mlp.gate_proj"), get("mlp.up_proj")]).T.contiguous(), "down": get("mlp.down_proj").T.contiguous()})
        self.embedding = self.w["model.language_model.embed_tokens.weight"]
        frequencies = torch.tensor([5e6 ** (-2.0 * k / self.dim) for k in range(self.dim // 2)], dtype=torch.float64).float()
        self.frequencies = frequencies.to(device)
        self.axes = torch.tensor([k % 3 if k < 60 else 0 for k in range(self.dim // 2)], device=device)

    # The vision tower.
    def encode(self, paths, at_once=64):
        for begin in range(0, len(paths), at_once):
            part = paths[begin : begin + at_once]
            pixels = torch.from_numpy(np.stack([patches(p) for p in part])).to(self.device)
            for path, *features in zip(part, *self.vision(pixels)):
                self.features[path] = features

    def vision(self, pixels):
        w = lambda name: self.w["model.visual." + name]
        linear = lambda x, name: torch.nn.functional.linear(x, w(name + ".weight"), w(name + ".bias"))
        norm = lambda x, name: torch.nn.functional.layer_norm(x, x.shape[-1:], w(name + ".weight"), w(name + ".bias"), 1e-6)
        x = pixels @ w("patch_embed.proj.weight").reshape(192, -1).T + w("patch_embed.proj.bias")
        rows, columns = GRID[0] * 2, GRID[1] * 2
        in_order = lambda grid: grid.reshape(GRID[0], 2, GRID[1], 2, -1).transpose(1, 2).reshape(rows * columns, -1)
        y, x_at = torch.linspace(0, 23, rows), torch.linspace(0, 23, columns)
        table, grid = w("pos_embed.weight").reshape(24, 24, -1), 0
        for at_y, f_y in ((y.long(), 1 - y % 1), ((y.long() + 1).clamp(max=23), y % 1)):
            for at_x, f_x in ((x_at.long(), 1 - x_at % 1), ((x_at.long() + 1).clamp(max=23), x_at % 1)):
                factor = (f_y[:, None] * f_x[None, :])[..., None].to(self.device)
                grid = grid + table[at_y.to(self.device)][:, at_x.to(self.device)] * factor
        x = x + in_order(grid)
        f = torch.tensor([1e4 ** (-2.0 * k / 32) for k in range(16)], dtype=torch.float32)
        angle = torch.cat([(torch.arange(rows, dtype=torch.float32)[:, None, None] * f).expand(rows, columns, 16),
                           (torch.arange(columns, dtype=torch.float32)[None, :, None] * f).expand(rows, columns, 16)], -1)
        angle = in_order(angle).to(self.device)[:, None, :]
        deep = []
        for i in range(4):
            name = f"blocks.{i}."
            q, k, v = linear(norm(x, name + "norm1"), name + "attn.qkv").reshape(*x.shape[:2], 3, 3, 64).unbind(2)
            q, k = (turned(t, angle.cos(), angle.sin()) for t in (q, k))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            a = torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v
            x = x + linear(a.transpose(1, 2).reshape(x.shape), name + "attn.proj")
            inner = torch.nn.functional.gelu(linear(norm(x, name + "norm2"), name + "mlp.linear_fc1"), approximate="tanh")
            x = x + linear(inner, name + "mlp.linear_fc2")
            if i in (1, 2):
                name = f"deepstack_merger_list.{len(deep)}."
                y = norm(x.reshape(len(x), PADS, -1), name + "norm")
                deep.append(linear(torch.nn.functional.gelu(linear(y, name + "linear_fc1")), name + "linear_fc2"))
        y = norm(x, "merger.norm").reshape(len(x), PADS, -1)
        return linear(torch.nn.functional.gelu(linear(y, "merger.linear_fc1")), "merger.linear_fc2"), deep[0], deep[1]

    # The text model.
    def batch(self, sequences):
        b, n = Batch(), max(len(s.tokens) for s in sequences)
        b.shape = (len(sequences), n)
        ids = np.zeros(b.shape, dtype=np.int64)
        place = np.zeros((*b.shape, 3), dtype=np.int64)
        valid = np.zeros(b.shape, dtype=bool)
        four = np.zeros(b.shape, dtype=bool)
        exact_from = np.zeros(b.shape, dtype=np.int64)
        features, rows, wanted, places = [], [], [], []
        for i, s in enumerate(sequences):
            m = len(s.tokens)
            ids[i, :m], place[i, :m], valid[i, :m] = s.tokens, positions(s.tokens), True
            if s.four is not None:
                four[i, :m] = s.four
            if s.exact_from is not None:
                exact_from[i, :m] = s.exact_from
            features += [self.features[p] for p in s.images]
            rows += [i * n + r for r in s.rows]
            wanted += s.wanted
            places += s.places
        to = lambda x: torch.as_tensor(x, device=self.device)
        b.x = self.embedding[to(ids)].reshape(-1, 320)
        b.visual = to(np.flatnonzero(ids.reshape(-1) == IMAGE_PAD))
        if features:
            merged, *b.deep = (torch.cat([f[j] for f in features]) for j in range(3))
            b.x[b.visual] = merged
        angle = to(place).float()[..., self.axes] * self.frequencies
        b.cos, b.sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
        b.valid, b.four = to(valid), to(four)
        b.exact_from = to(exact_from) if sequences[0].exact_from is not None else None
        b.rows, b.wanted, b.places = to(rows), to(wanted), to(places)
        b.future = torch.full((n, n), -math.inf, device=self.device).triu(1)
        return b

    def forward(self, b, store, fast=False):
        """Logits of b.rows. store(layer, k, v, b) gives keys and values, [batch, tokens, heads, 128], as the cache gives them back."""
        batch, n = b.shape
        x = b.x.clone()
        for i, w in enumerate(self.block):
            q, k, v = (rms(x, w["norm1"]) @ w["qkv"]).reshape(batch, n, -1, self.dim).split([self.heads, self.kv_heads, self.kv_heads], 2)
            q, k = turned(rms(q, w["qn"]), b.cos, b.sin), turned(rms(k, w["kn"]), b.cos, b.sin)
            k_stored, v_stored = store(i, k, v, b)
            x = x + self.attend(q, k, v, k_stored, v_stored, b, fast) @ w["o"]
            gate, up = (rms(x, w["norm2"]) @ w["up"]).chunk(2, -1)
            x = x + (torch.nn.functional.silu(gate) * up) @ w["down"]
            if i < 2 and len(b.visual):
                x[b.visual] += b.deep[i]
        return rms(x[b.rows], self.w["model.language_model.norm.weight"]) @ self.embedding.T

    def attend(self, q, k, v, k_stored, v_stored, b, fast):
        batch, n = b.shape
        group = self.heads // self.kv_heads
        if fast:  # float16, for scans
            q, k, v = (t.half().transpose(1, 2) for t in (q, k_stored, v_stored))
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return out.transpose(1, 2).reshape(batch * n, -1).float()
        q = q.transpose(1, 2).reshape(batch * self.kv_heads, group * n, self.dim) * self.dim**-0.5
        side = lambda t: t.transpose(1, 2).reshape(batch * self.kv_heads, n, self.dim)
        k_stored, v_stored = side(k_stored), side(v_stored)
        scores = (q @ k_stored.transpose(1, 2)).reshape(batch, self.kv_heads, group, n, n)
        if b.exact_from is not None:
            near = (torch.arange(n, device=self.device) >= b.exact_from[..., None])[:, None, None]
            scores = torch.where(near, (q @ side(k).transpose(1, 2)).reshape(scores.shape), scores)
        scores += b.future
        weights = torch.softmax(scores, -1)
        flat = lambda t: t.reshape(batch * self.kv_heads, group * n, n)
        if b.exact_from is None:
            out = flat(weights) @ v_stored
        else:
            out = flat(weights.masked_fill(near, 0)) @ v_stored + flat(weights.masked_fill(~near, 0)) @ side(v)
        return out.reshape(batch, self.heads, n, self.dim).transpose(1, 2).reshape(batch * n, -1)


def exact(layer, k, v, b):
    return k, v


def check(directory, goldens):
    """The goldens: JSON with prompt and images, and .npz."""
    text, model = Text(directory), Model(directory, "cpu")
    goldens = pathlib.Path(goldens)
    worst = 0
    for path in sorted(goldens.glob("*.json")):
        golden, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
        images = [goldens.parent / "episodes" / image for image in golden.get("images", [])]
        tokens = text.encode(golden["prompt"])
        assert tokens == arrays["input_ids"].tolist(), path
        assert np.array_equal(positions(tokens).T, arrays["position_ids"]), path
        model.encode(sorted(set(images)))
        sequence = Sequence(tokens, images, list(range(len(tokens))), [0] * len(tokens), [0] * len(tokens))
        with torch.no_grad():
            logits = model.forward(model.batch([sequence]), exact)
        off = (logits[-1] - torch.from_numpy(arrays["last_logits"])).abs().max().item()
        same = (logits.argmax(1).numpy() == arrays["top5_ids"][:, 0]).mean()
        worst = max(worst, off)
        print(f"{path.stem}: {len(tokens)} tokens, last logits within {off:.1e}, arg-max equal at {100 * same:.2f}%", flush=True)
    print(f"largest difference {worst:.1e}")


if __name__ == "__main__":
    check(pathlib.Path(__file__).parents[2] / "models/pocket-agent", sys.argv[1])
