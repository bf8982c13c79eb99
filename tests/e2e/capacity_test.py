"""Bytes of recorded conversations in the KV arena, as bench/capacity counts them: the figures that docs and README give."""

import json
import os
import subprocess
import unittest

CAPACITY = os.environ["TRIAXIAL_CAPACITY"]


def capacity(*args):
    result = subprocess.run([CAPACITY, "--json", *args], capture_output=True, text=True, timeout=100, check=True)
    return json.loads(result.stdout)["records"]


class CapacityTest(unittest.TestCase):
    def test_screenshot_sessions_reach_the_ratios_that_the_formats_promise(self):
        sessions = [r for r in capacity() if r["id"].startswith("screenagent-")]
        self.assertEqual(len(sessions), 6)
        for record in sessions:
            self.assertGreaterEqual(record["paper"]["ratio"], 4.8, record["id"])
            self.assertGreaterEqual(record["rotated"]["ratio"], 6.0, record["id"])

    def test_blocks_take_what_their_formats_predict(self):
        records = capacity()
        self.assertEqual(len(records), 59)
        for record in records:
            for codec in ("paper", "rotated"):
                found = record[codec]
                with self.subTest(record=record["id"], codec=codec):
                    self.assertLess(abs(found["complete_blocks"]["difference_percent"]), 3)
                    # One format a block costs or saves little against storing each token as it wishes.
                    self.assertLess(abs(found["complete_blocks"]["difference_from_wishes_percent"]), 4)
                    self.assertEqual(sum(found["tokens_by_format"].values()), record["tokens"])
                    self.assertEqual(sum(found["bytes_by_format"].values()), found["bytes"])
                    self.assertAlmostEqual(sum(found["bits_per_element"].values()), 16 / found["ratio"], places=6)

    def test_bf16_is_its_own_measure(self):
        for record in capacity("--kv-policy", "bf16"):
            for codec in ("paper", "rotated"):
                self.assertAlmostEqual(record[codec]["complete_blocks"]["ratio"], 1)


if __name__ == "__main__":
    unittest.main()
