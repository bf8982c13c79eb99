"""`triaxial demo`: scores, the page that it writes, and its errors."""

import json
import os
import re
import subprocess
import tempfile
import unittest

from server import BINARY


def demo(*args):
    return subprocess.run([BINARY, "demo", *args], capture_output=True, text=True, timeout=250, check=False)


class DemoTest(unittest.TestCase):
    def test_scores_and_page(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "page.html")
            result = demo("--conversations", "1", "--kv-codec", "paper", "--html", path, "--json")
            self.assertEqual(result.returncode, 0, result.stderr)
            with open(path, encoding="utf-8") as file:
                page = file.read()
        bf16, paper = json.loads(result.stdout)
        self.assertEqual((bf16["policy"], paper["policy"]), ("bf16", "paper"))
        for run in (bf16, paper):
            self.assertEqual((run["asked"], run["conversations"]), (12, 1))
            self.assertGreaterEqual(run["right"], 10)
        # Whole tail blocks make BF16 a little more than 16 bits; the paper's codec stores 3 or 5 bits and a tail.
        self.assertTrue(16 < bf16["effective_bits"] < 17.5, bf16)
        self.assertTrue(3.5 < paper["effective_bits"] < 6, paper)
        self.assertAlmostEqual(paper["capacity_ratio"], 16 / paper["effective_bits"])
        self.assertEqual(bf16["prompt_tokens"], paper["prompt_tokens"])

        self.assertNotIn("__DATA__", page)
        self.assertEqual(re.findall(r"(?:src|href)\s*=\s*[\"']?https?:", page), [])
        data = json.loads(re.search(r"^const D = (.*);$", page, re.M)[1])
        count = len(data["tokens"])
        self.assertEqual([span["begin"] for span in data["spans"]][1:], [span["end"] for span in data["spans"]][:-1])
        self.assertEqual(data["spans"][-1]["end"], count)
        for image in data["images"]:
            self.assertEqual(image["columns"] * image["rows"], image["tokens"])
            self.assertEqual(data["tokens"][image["begin"]], "<|image_pad|>")
        for kv_map in data["maps"]:
            self.assertEqual(sum(kv_map["tokens"]), count)
            self.assertEqual(len(kv_map["blocks"]), -(-count // data["block_tokens"]))
        self.assertLess(data["maps"][1]["total_bytes"] * 2.5, data["maps"][0]["total_bytes"])

    def test_errors_name_the_remedy(self):
        for args, mention in ((("--trajectories", "no/such.jsonl"), "no/such.jsonl"),
                              (("--trajectories", "models/pocket-agent/config.json"), "line 1"),
                              (("--policies", "bf16,nonsense"), "nonsense"),
                              (("--model", "no/such/model"), "no/such/model")):
            with self.subTest(args):
                result = demo("--html", "", *args)
                self.assertEqual(result.returncode, 1)
                self.assertTrue(result.stderr.strip().splitlines()[-1].startswith("triaxial demo: "), result.stderr)
                self.assertIn(mention, result.stderr)


if __name__ == "__main__":
    unittest.main()
