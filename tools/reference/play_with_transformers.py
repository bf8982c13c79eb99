"""Asks transformers (float32, greedy) for the steps of recorded conversations and prints those that differ from the record.

What transformers gets wrong is the agent's own mistake; what only TriAxial gets wrong would be ours. Without
steps, all are asked (slow); with `--steps ID:MESSAGE ...` only those.

Usage: python play_with_transformers.py [--model DIR] [--steps heldout-standard-003:2 ...]
(needs torch, torchvision, pillow and transformers 5)
"""
import argparse
import json
import pathlib

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration


def prompt_of(messages, episodes):
    """Messages as the processor wants them, and their images in order."""
    messages, images = json.loads(json.dumps(messages)), []
    for message in messages:
        parts = message["content"] if isinstance(message.get("content"), list) else []
        for i, part in enumerate(parts):
            if part["type"] == "image_url":
                images.append(Image.open(episodes / part["image_url"]["url"]).convert("RGB"))
                parts[i] = {"type": "image"}
        for call in message.get("tool_calls") or []:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return messages, images


def answer_of(message):
    """(reasoning, content or calls) of a recorded message as the template would write it."""
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls") or []]
    return calls if calls else (message.get("content") or "").strip()


def parse(text):
    text = text.removesuffix("<|im_end|>").split("</think>")[-1].strip()
    calls = [json.loads(part.split("</tool_call>")[0]) for part in text.split("<tool_call>")[1:]]
    return [(c["name"], c["arguments"]) for c in calls] if calls else text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/pocket-agent")
    parser.add_argument("--steps", nargs="*", default=[])
    args = parser.parse_args()
    episodes = pathlib.Path(args.model) / "episodes"
    model = Qwen3VLForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.model)
    asked = right = 0
    for line in open(episodes / "heldout.jsonl"):
        record = json.loads(line)
        for i, message in enumerate(record["messages"]):
            if message["role"] != "assistant" or (args.steps and f"{record['id']}:{i}" not in args.steps):
                continue
            messages, images = prompt_of(record["messages"][:i], episodes)
            text = processor.apply_chat_template(
                messages, tools=record.get("tools"), tokenize=False, add_generation_prompt=True)
            batch = processor(text=[text], images=images, return_tensors="pt")
            output = model.generate(**batch, max_new_tokens=256, do_sample=False)
            answer = processor.tokenizer.decode(output[0, batch["input_ids"].shape[1]:])
            asked += 1
            if parse(answer) == answer_of(message):
                right += 1
            else:
                print(f"{record['id']}:{i} wants {answer_of(message)} got {parse(answer)}", flush=True)
    print(f"{right} of {asked} steps right")


if __name__ == "__main__":
    main()
