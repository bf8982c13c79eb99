"""`triaxial bench model`, as short as it gets: it ends, and says what it measured."""

import json
import os
import subprocess
import tempfile
import unittest

BINARY = os.environ.get("TRIAXIAL_BINARY", "build/release/triaxial")


class BenchModelTest(unittest.TestCase):
    def test_a_tail_that_grows_through_a_block_finds_room(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "model.json")
            subprocess.run([BINARY, "bench", "model", "--device", "cpu", "--formats", "k4v4", "--contexts", "512",
                            "--batches", "1", "--seconds", "0", "--json", path], check=True, timeout=200)
            with open(path, encoding="utf-8") as file:
                report = json.load(file)
        for kind in ("prefill", "decode_steps"):
            self.assertEqual([(r["context"], r["format"]) for r in report[kind]], [(512, "k4v4")])
            self.assertGreater(report[kind][0]["tokens_per_s"], 0)


if __name__ == "__main__":
    unittest.main()
