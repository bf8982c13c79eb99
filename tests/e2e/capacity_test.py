"""Bytes of recorded conversations in the KV arena, as bench/capacity counts them: the figures that docs and README give."""

import json
import os
import subprocess
import unittest

CAPACITY = os.environ["TRIAXIAL_CAPACITY"]


def capacity(*args):
    result = subprocess.run([CAPACITY, "--json", *args], capture_output=True, text=True, timeout=100, check=True)
    return json.loads(result.stdout)


class CapacityTest(unittest.TestCase):
    def test_screenshot_sessions_reach_the_ratios_that_the_formats_promise(self):
        sessions = [r for r in capacity()["records"] if r["id"].startswith("screenagent-")]
        self.assertEqual(len(sessions), 6)
        for record in sessions:
            self.assertGreaterEqual(record["paper"]["ratio"], 4.8, record["id"])
            self.assertGreaterEqual(record["rotated"]["ratio"], 6.0, record["id"])

    def test_blocks_take_what_their_formats_predict(self):
        records = capacity()["records"]
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

    def test_an_arena_that_holds_all_screenshot_conversations_reaches_the_ratios(self):
        found = capacity()
        for codec, goal in (("paper", 4.8), ("rotated", 6.0)):
            arenas = found["held_at_once"][codec]
            self.assertEqual(arenas["all"]["requests"], 13)
            self.assertGreaterEqual(arenas["all"]["ratio"], goal)
            for name, arena in arenas.items():
                with self.subTest(conversations=name, codec=codec):
                    self.assertEqual(arena["tokens"], sum(r["tokens"] for r in found["records"] if r["screenshots"] and
                                                          name in ("all", r["source"])))
                    self.assertEqual(arena["tokens_stored"], arena["tokens"] - arena["tokens_found"])
                    self.assertEqual(sum(arena["tokens_by_format"].values()), arena["tokens_stored"])
                    self.assertEqual(sum(arena["bytes_by_format"].values()), arena["bytes"])

    def test_steps_of_a_session_share_their_prefix_and_nothing_else_does(self):
        found = capacity()
        steps = [r["tokens"] for r in found["records"] if r["id"].startswith("osworld-shape-step")]
        # Steps 2 to 5 begin with all of the step before. 6 and 7 have dropped old screenshots: their system text
        # alone, 956 tokens and its scaffolding, is that of the others. Whole blocks are found.
        shared = sum(tokens // 64 * 64 for tokens in steps[:4]) + 2 * 15 * 64
        for codec in ("paper", "rotated"):
            for name, arena in found["held_at_once"][codec].items():
                screenagent = name.startswith("ScreenAgent")
                self.assertEqual(arena["tokens_found"], 0 if screenagent else shared, name)

    def test_bf16_is_its_own_measure(self):
        found = capacity("--kv-policy", "bf16")
        for codec in ("paper", "rotated"):
            for record in found["records"]:
                self.assertAlmostEqual(record[codec]["complete_blocks"]["ratio"], 1)
            for name, arena in found["held_at_once"][codec].items():
                self.assertEqual(arena["bytes"], arena["bf16_bytes"], name)


if __name__ == "__main__":
    unittest.main()
