#!/usr/bin/env python3
"""Joins what tools/fidelity.sh measured: bench/results/fidelity-*.json, and the tables and plots of docs/fidelity.md.

    python3 tools/fidelity_report.py build/fidelity SECONDS PROCESSOR_SECONDS

Tables stand between the markers <!-- NAME --> and <!-- /NAME --> of the page.
"""

import json
import math
import os
import random
import sys

PAGE = "docs/fidelity.md"
PLOTS = "docs/plots"
DRAWS = 2000
# Effective bits of one format, rotated, head_dim 128 (docs/kv-format.md).
BITS = {"k2v2": 2.25, "k4v2": 3.25, "k4v4": 4.25, "fp8": 8.25, "bf16": 16.0}
TITLES = {"s1": "the checkpoint as it is", "s8": "key channels times 8", "s32": "key channels times 32",
          "v32": "value channels times 32", "v32-left": "value channels times 32, left as they are",
          "d32": "four directions of each head's values times 32"}
AXES = ("temporal", "modal", "semantic")
TAGS_PAY = ("v32-left", "d32")  # compared at equal bytes
ATTENTION = ("int4", "int2", "calibrated:2.6")  # whose errors are shown by tag, of the checkpoint as it is


# ---- What was measured

def load(folder):
    """{checkpoint: what eval wrote, and under "long" and "random" likewise}."""
    checkpoints = {}
    for name in TITLES:
        data = load_part(folder, name, "main")
        if data is None:
            continue
        checkpoints[name] = data
        bare = load_part(folder, name + "-no-calibration", "main")
        if bare is not None:
            data["policies"] += [{**row, "name": row["name"] + " without calibration"} for row in bare["policies"]
                                 if row["name"] != "bf16"]
        for part in ("long", "random"):
            more = load_part(folder, name, part)
            if more is not None:
                data[part] = more
    return checkpoints


def load_part(folder, name, part):
    path = os.path.join(folder, f"{name}.{part}.part.json")
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return json.load(file)


def rate(wrong, column):
    """Exact rate: column 1 actions, 2 all tokens, 0 conversations."""
    if column == 0:
        return sum(1 for w in wrong if w[1] == 0) / len(wrong)
    return 1 - sum(w[column] for w in wrong) / sum(w[0] for w in wrong)


def difference(a, b, column):
    """Rate of a minus rate of b, and its 95% interval: the same conversations resampled for both."""
    generator = random.Random(1)
    wrong_a, wrong_b = a["wrong_by_conversation"], b["wrong_by_conversation"]
    n = len(wrong_a)
    draws = []
    for _ in range(DRAWS):
        chosen = [generator.randrange(n) for _ in range(n)]
        draws.append(rate([wrong_a[i] for i in chosen], column) - rate([wrong_b[i] for i in chosen], column))
    draws.sort()
    return (rate(wrong_a, column) - rate(wrong_b, column), draws[round(0.025 * (DRAWS - 1))],
            draws[round(0.975 * (DRAWS - 1))])


# ---- What the losses predict

def formats_at(policy, budget):
    """The format of each tag that a price per byte gives under a budget, as kv/need.h decides."""
    def choose(price):
        table = {}
        for tag in policy["counts"]:
            loss = policy["distortion"].get(tag)
            if loss is None:
                continue
            options = {**{f: loss[f] for f in loss}, "bf16": 0.0}
            table[tag] = min(options, key=lambda f: (options[f] + price * BITS[f], BITS[f]))
        return table

    def bits(table):
        total = sum(policy["counts"][t] for t in table)
        return sum(policy["counts"][t] * BITS[f] for t, f in table.items()) / total

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2 if low else high * 1e-3 if high > 1e-18 else 0
        if bits(choose(middle)) > budget:
            low = middle
        else:
            high = middle
    return choose(high)


def keep_axes(policy, axes):
    """As KeepAxes of calib/eval_policy.h."""
    def kept(tag):
        return tuple(part if axis in axes else "" for axis, part in zip(AXES, tag.split("/")))

    sums, counts = {}, {}
    for tag, count in policy["counts"].items():
        group = kept(tag)
        counts[group] = counts.get(group, 0) + count
        for f, loss in policy["distortion"][tag].items():
            sums.setdefault(group, {}).setdefault(f, 0.0)
            sums[group][f] += count * loss
    return {**policy, "distortion": {t: {f: x / counts[kept(t)] for f, x in sums[kept(t)].items()}
                                     for t in policy["counts"]}}


def predicted(row, policy):
    """Loss that the calibrated table predicts for a lane; None if it does not say."""
    name = row["name"]
    if row["codec"] != "rotated" or "without" in name:
        return None
    fixed = {"int4": "k4v4", "int2": "k2v2", "k4v2": "k4v2"}
    if name in fixed:
        table = {t: fixed[name] for t in policy["counts"]}
    elif name == "paper":
        table = {t: "k4v4" if t.split("/")[2] in ("inst", "delim", "tool_call") or t.startswith("current/text/") else "k2v2"
                 for t in policy["counts"]}
    elif ":" in name:
        bits, _, axes = name.split(":")[1].partition("+")
        source = keep_axes(policy, axes.split("-")) if axes else policy
        table = formats_at(source, float(bits))
    else:
        return None
    return sum(policy["counts"][t] * policy["distortion"][t].get(f, 0.0) for t, f in table.items() if t in policy["counts"])


def affordable(policy):
    """What a policy that sees one axis can buy on top of 2 bits, and from which budget on: the first four steps."""
    lines = ["| axis | from this budget on, bits a block |", "|---|---|"]
    for axis in AXES:
        source = keep_axes(policy, (axis,))
        place = AXES.index(axis)
        steps, before = [], {}
        for hundredth in range(225, 426):
            table = formats_at(source, hundredth / 100)
            now = {t.split("/")[place]: f for t, f in table.items() if f != "k2v2"}
            if now != before and len(steps) < 4:
                bought = ", ".join(f"`{tag}` at `{f}`" for tag, f in sorted(now.items()) if before.get(tag) != f)
                steps.append(f"{hundredth / 100:.2f}: {bought}")
            before = now
        lines.append(f"| {axis} | {'; '.join(steps)} |")
    return "\n".join(lines)


def ranks(values):
    order = sorted(range(len(values)), key=lambda i: values[i])
    out = [0.0] * len(values)
    i = 0
    while i < len(order):
        j = i
        while j + 1 < len(order) and values[order[j + 1]] == values[order[i]]:
            j += 1
        for k in range(i, j + 1):
            out[order[k]] = (i + j) / 2
        i = j + 1
    return out


def correlation(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y))
    return sxy / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


# ---- Pages

def percent(x):
    return f"{100 * x:.1f}"


def table(rows):
    lines = ["| policy | bits | steps exact % | conversations exact % | thoughts too: steps % | conversations % | top-1 % | KL mean | "
             "root KL |", "|---|---|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (-r["effective_bits"])):
        ci, episodes, whole = row["action_match_ci"], row["episode_exact_ci"], row["episode_all_tokens_exact_ci"]
        name = row["name"]
        if row["codec"] == "paper" and "@" not in name:
            name += "@paper"
        lines.append(f"| `{name}` | {row['effective_bits']:.2f} | {percent(row['action_match'])} "
                     f"[{percent(ci[0])}, {percent(ci[1])}] | {percent(row['episode_exact'])} "
                     f"[{percent(episodes[0])}, {percent(episodes[1])}] | {percent(row['all_tokens_exact'])} | "
                     f"{percent(row['episode_all_tokens_exact'])} [{percent(whole[0])}, {percent(whole[1])}] | {100 * row['top1_agreement']:.2f} | {row['kl_mean']:.1e} | {row['kl_root_mean']:.2e} |")
    return "\n".join(lines)


def comparisons(rows):
    """Each calibrated lane with every other one of about as many bytes."""
    ours = [r for r in rows if r["name"].startswith("calibrated:") and "+" not in r["name"]]
    others = [r for r in rows if r not in ours and r["name"] != "bf16"]
    lines = ["| policy | against | bits | steps exact, difference in points | all tokens exact, the same |", "|---|---|---|---|---|"]
    for mine in ours:
        for other in sorted(others, key=lambda r: r["effective_bits"]):
            if not mine["effective_bits"] - 0.15 <= other["effective_bits"] <= mine["effective_bits"] + 0.65:
                continue
            action, tokens = difference(mine, other, 1), difference(mine, other, 2)
            cells = [f"{100 * d[0]:+.1f} [{100 * d[1]:+.1f}, {100 * d[2]:+.1f}]" for d in (action, tokens)]
            cells = [f"**{c}**" if d[1] > 0 else c for c, d in zip(cells, (action, tokens))]
            lines.append(f"| `{mine['name']}` ({mine['effective_bits']:.2f}) | `{other['name']}` | {other['effective_bits']:.2f} | "
                         + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path, title, x_label, y_label, series, log_x=False, log_y=False):
    """An SVG scatter plot; series: {name: (colour, [(x, y, label)], joined)}."""
    width, height, left, bottom, top, right = 720, 420, 70, 50, 36, 150
    fx = (lambda v: math.log10(v)) if log_x else float
    fy = (lambda v: math.log10(v)) if log_y else float
    points = [(fx(x), fy(y)) for _, items, _ in series.values() for x, y, _ in items]
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    x0, x1 = x0 - 0.05 * (x1 - x0 or 1), x1 + 0.05 * (x1 - x0 or 1)
    y0, y1 = y0 - 0.06 * (y1 - y0 or 1), y1 + 0.06 * (y1 - y0 or 1)
    px = lambda v: left + (fx(v) - x0) / (x1 - x0) * (width - left - right)
    py = lambda v: height - bottom - (fy(v) - y0) / (y1 - y0) * (height - bottom - top)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="{left}" y="20" font-size="14">{title}</text>',
           f'<path d="M{left} {top}V{height - bottom}H{width - right}" fill="none" stroke="#444"/>',
           f'<text x="{(left + width - right) / 2}" y="{height - 12}" text-anchor="middle">{x_label}</text>',
           f'<text transform="translate(16 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">{y_label}</text>']
    for i in range(5):
        vx, vy = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        at_x, at_y = left + (width - left - right) * i / 4, height - bottom - (height - bottom - top) * i / 4
        shown = [f"{10 ** v:.1e}" if log else f"{v:.3g}" for v, log in ((vx, log_x), (vy, log_y))]
        out.append(f'<text x="{at_x}" y="{height - bottom + 16}" text-anchor="middle" fill="#444">{shown[0]}</text>')
        out.append(f'<text x="{left - 6}" y="{at_y + 4}" text-anchor="end" fill="#444">{shown[1]}</text>')
        out.append(f'<path d="M{left} {at_y}H{width - right}" stroke="#eee"/>')
    for i, (name, (colour, items, joined)) in enumerate(series.items()):
        out.append(f'<circle cx="{width - right + 16}" cy="{top + 18 * i}" r="5" fill="{colour}"/>'
                   f'<text x="{width - right + 26}" y="{top + 18 * i + 4}">{name}</text>')
        items = sorted(items)
        if joined and len(items) > 1:
            out.append('<path d="M' + "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y, _ in items) +
                       f'" fill="none" stroke="{colour}"/>')
        for x, y, label in items:
            out.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="4" fill="{colour}"><title>{label}</title></circle>')
    os.makedirs(PLOTS, exist_ok=True)
    with open(path, "w") as file:
        file.write("\n".join(out) + "\n</svg>\n")


def kind_of(row):
    if row["name"] == "bf16":
        return None
    if row["codec"] == "paper":
        return "paper's codec"
    if "+" in row["name"]:
        return "fewer axes"
    if row["name"].startswith("calibrated"):
        return "calibrated"
    return "uniform and fixed" if "without" not in row["name"] else None


COLOURS = {"calibrated": "#1f77b4", "fewer axes": "#ff7f0e", "uniform and fixed": "#2ca02c",
           "paper's codec": "#d62728"}


def pareto(name, data):
    series = {}
    for row in data["policies"]:
        kind = kind_of(row)
        if kind:
            series.setdefault(kind, (COLOURS[kind], [], kind == "calibrated"))[1].append(
                (row["effective_bits"], max(row["kl_root_mean"], 1e-6), row["name"]))
    plot(f"{PLOTS}/pareto-{name}.svg", f"Root KL over effective bits: {TITLES[name]}", "effective bits, metadata and tails included",
         "mean root KL to BF16", series, log_y=True)


def additivity(name, data, folder):
    """Policies of the table, and allocations drawn at random: what D predicts against what was measured."""
    with open(os.path.join(folder, f"{name}.json")) as file:
        policy = json.load(file)

    def drawn(row):
        with open(os.path.join(folder, f"random-{name}", row["name"] + ".json")) as file:
            rules = {rule["match"]: rule["format"] for rule in json.load(file)["rules"]}
        return sum(count * policy["distortion"][tag][rules[tag]] for tag, count in policy["counts"].items())

    groups = {"policies of the table": [(predicted(row, policy), row) for row in data["policies"]],
              "drawn at random": [(drawn(row), row) for row in data["random"]["policies"] if row["name"] != "bf16"]}
    groups = {group: [item for item in items if item[0]] for group, items in groups.items()}
    plot(f"{PLOTS}/additivity-{name}.svg", f"Predicted and measured: {TITLES[name]}", "predicted loss, sum over tags",
         "mean root KL to BF16", {group: (colour, [(p, row["kl_root_mean"], row["name"]) for p, row in items], False)
                                  for colour, (group, items) in zip(("#1f77b4", "#ff7f0e"), groups.items())}, True, True)
    lines = []
    for group, items in groups.items():
        x = [p for p, _ in items]
        kl, root, bits = ([row[key] for _, row in items] for key in ("kl_mean", "kl_root_mean", "effective_bits"))
        error = [row["attention_error"]["relative"] for _, row in items]
        conversations = (data["random"] if "random" in group else data)["conversations"]
        logs = correlation([math.log(v) for v in x], [math.log(v) for v in root])
        lines.append(f"| {TITLES[name]}, {group} | {len(items)} | {conversations} | {correlation(ranks(x), ranks(error)):.2f} | "
                     f"{correlation(ranks(x), ranks(root)):.2f} | {correlation(ranks(x), ranks(kl)):.2f} | {logs:.2f} | "
                     f"{-correlation(ranks(bits), ranks(root)):.2f} |")
    return lines


def attention_errors(rows, chosen):
    """By the tag of the token that asks, in percent of the output's squares."""
    found = [row for row in rows if row["name"] in chosen]
    tags = found[0]["attention_error"]["by_tag"]
    lines = ["| token that asks | how many | " + " | ".join(f"`{row['name']}` ({row['effective_bits']:.2f})" for row in found) + " |",
             "|---|---|" + "---|" * len(found)]
    for tag in sorted(tags, key=lambda t: -tags[t]["queries"]):
        lines.append(f"| `{tag}` | {tags[tag]['queries']} | " +
                     " | ".join(f"{100 * row['attention_error']['by_tag'][tag]['relative']:.3f}" for row in found) + " |")
    lines.append("| all | " + str(sum(t["queries"] for t in tags.values())) + " | " +
                 " | ".join(f"{100 * row['attention_error']['relative']:.3f}" for row in found) + " |")
    return "\n".join(lines)


def insert(text, name, content):
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text:
        sys.exit(f"{PAGE} has no marker {begin}")
    return text[:text.index(begin) + len(begin)] + "\n" + content + "\n" + text[text.index(end):]


def main():
    folder, seconds, processor = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    checkpoints = load(folder)
    with open(PAGE) as file:
        text = file.read()
    lines = ["| checkpoint | allocations | conversations | rank correlation with the error of attention | with root KL | with KL | "
             "correlation of logarithms, root KL | rank correlation of bits alone with root KL |", "|---|---|---|---|---|---|---|---|"]
    for name, data in checkpoints.items():
        data |= {"fidelity_seconds": seconds, "fidelity_processor_seconds": processor}
        with open(f"bench/results/fidelity-{name}.json", "w") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        text = insert(text, f"table {name}", table(data["policies"]))
        if name == "s1" or name in TAGS_PAY:
            pareto(name, data)
        if name == "s1":
            text = insert(text, "attention", attention_errors(data["policies"], ATTENTION))
        if "random" in data:
            lines += additivity(name, data, folder)
        if "long" in data:
            text = insert(text, f"table {name} long", table(data["long"]["policies"]))
        if name in TAGS_PAY:
            text = insert(text, f"equal bytes {name}", comparisons(data["policies"]))
        if name == "d32":
            with open(os.path.join(folder, f"{name}.json")) as file:
                text = insert(text, f"affordable {name}", affordable(json.load(file)))
    text = insert(text, "additivity", "\n".join(lines))
    any_one = next(iter(checkpoints.values()))
    text = insert(text, "run", f"{any_one['conversations']} conversations, {any_one['steps']} steps, {any_one['tokens']} tokens for each "
                  f"policy; {seconds // 60} minutes {seconds % 60} s in all on {os.cpu_count()} cores, of which "
                  f"{processor // 60} minutes {processor % 60} s of one core were used.")
    with open(PAGE, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
