#!/usr/bin/env python3
"""Makes a checkpoint directory without weights, for `--load-format dummy`: a model's config.json, the tokenizer and chat
template of Qwen3-VL, all from tests/data.

usage: tools/dummy_checkpoint.py qwen3-vl-32b DIRECTORY     (2b, 4b, 8b, 32b; run in the repository's root)
"""
import json
import pathlib
import shutil
import sys


def tokenizer(text: pathlib.Path) -> dict:
    spec = json.loads((text / "qwen2_tokenizer_spec.json").read_text())
    # The byte tokens in GPT-2's order: printable Latin-1, then stand-ins for the other bytes; then every merge's result.
    codes = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]
    vocab = {chr(code): i for i, code in enumerate(codes)}
    merges = [line for line in (text / "qwen2_merges.txt").read_text().split("\n") if line]
    for merge in merges:
        vocab.setdefault(merge.replace(" ", "", 1), len(vocab))
    split = {"type": "Split", "pattern": {"Regex": spec["pre_tokenizer_regex"]}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {
        "added_tokens": spec["added_tokens"],
        "normalizer": {"type": spec["normalizer"]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    name, directory = sys.argv[1], pathlib.Path(sys.argv[2])
    data = pathlib.Path("tests/data")
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data / "configs" / f"{name}.config.json", directory / "config.json")
    for file in ("generation_config.json", "preprocessor_config.json"):
        shutil.copyfile(data / "configs" / file, directory / file)
    shutil.copyfile(data / "text" / "templates" / "qwen3-vl-instruct.jinja", directory / "chat_template.jinja")
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer(data / "text"), ensure_ascii=False))


if __name__ == "__main__":
    main()
