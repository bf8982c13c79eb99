"""Blocks that are found again: by later requests, by their owner alone, and after a restart; and deadlines."""

import glob
import os
import shutil
import tempfile
import time
import unittest

from server import Server, ServerCase

# Greedy, in F32 and with BF16 blocks: a hit must not change a single token.
EXACT = ("--dtype", "f32", "--kv-policy", "bf16")
TEXT = "The quick brown fox jumps over the lazy dog and then it sleeps for a while under the old tree. " * 20
MESSAGES = [{"role": "system", "content": TEXT}, {"role": "user", "content": "What did the fox do?"}]


def ask(server, headers=None, **fields):
    body = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, "ignore_eos": True} | fields
    status, answer = server.request("POST", "/v1/chat/completions", body, headers)
    assert status == 200, answer
    return answer


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def said(answer):
    return answer["choices"][0]["message"]


def total(server, name):
    return sum(server.metrics()[f"triaxial_{name}"].values())


class ReuseTest(ServerCase):
    ARGS = EXACT

    def test_a_second_request_finds_the_blocks_of_the_first(self):
        salt = {"cache_salt": "second"}
        first = ask(self.server, **salt)
        self.assertEqual(cached(first), 0)
        hits = total(self.server, "prefix_cache_hits_total")
        second = ask(self.server, **salt)
        prompt = second["usage"]["prompt_tokens"]
        self.assertEqual(cached(second) % 64, 0)
        self.assertGreater(cached(second), prompt - 2 * 64)
        self.assertLess(cached(second), prompt)
        self.assertEqual(said(second), said(first))
        self.assertEqual(total(self.server, "prefix_cache_hits_total") - hits, cached(second))

    def test_the_next_turn_and_another_branch_share_what_they_have_in_common(self):
        salt = {"cache_salt": "turns"}
        first = ask(self.server, **salt)
        turn = MESSAGES + [said(first), {"role": "user", "content": "And then?"}]
        self.assertGreater(cached(ask(self.server, messages=turn, **salt)), 0)
        branch = [MESSAGES[0], {"role": "user", "content": "Where does it sleep?"}]
        self.assertGreater(cached(ask(self.server, messages=branch, **salt)), 0)
        other = [{"role": "system", "content": "x" + TEXT}, MESSAGES[1]]
        self.assertEqual(cached(ask(self.server, messages=other, **salt)), 0)

    def test_a_salt_separates(self):
        ask(self.server, cache_salt="one")
        self.assertEqual(cached(ask(self.server, cache_salt="two")), 0)
        self.assertGreater(cached(ask(self.server, cache_salt="one")), 0)

    def test_the_pages_show_shared_blocks(self):
        answer = ask(self.server, cache_salt="pages")
        page = self.server.request("GET", f"/v1/kv/{answer['id']}")[1]
        self.assertEqual(sum(b["tokens"] for b in page["blocks"]) // 64,
                         (answer["usage"]["total_tokens"] - 1) // 64)
        self.assertGreater(self.server.request("GET", "/v1/kv")[1]["cached_tokens"], 0)

    def test_a_deadline(self):
        start = time.monotonic()
        status, answer = self.server.complete(prompt=[5] * 40, max_tokens=20000, ignore_eos=True, timeout=0.5)
        self.assertEqual(status, 504, answer)
        self.assertEqual(answer["error"]["type"], "timeout_error")
        self.assertTrue(0.4 < time.monotonic() - start < 10)
        self.assertEqual(self.server.wait_for(lambda *load: load == (0, 0, 0), 5), (0, 0, 0))


class FloorTest(unittest.TestCase):
    def test_blocks_below_a_requests_floor_are_prefilled_again(self):
        server = Server("--kv-policy", "int2", "--kv-codec", "paper")
        ask(server)
        self.assertGreater(cached(ask(server)), 0)
        self.assertEqual(cached(ask(server, kv_min_format="bf16")), 0)
        server.stop()


class TenantsTest(unittest.TestCase):
    def test_keys_never_share(self):
        with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
            file.write("secret-1\nsecret-2\n")
            file.flush()
            server = Server(*EXACT, "--api-key-file", file.name)
        one, two = ({"Authorization": f"Bearer secret-{i}"} for i in (1, 2))
        answer = ask(server, one)
        self.assertEqual(cached(answer), 0)
        self.assertEqual(cached(ask(server, two)), 0)
        self.assertEqual(cached(ask(server, one, cache_salt="x")), 0)
        for headers in (one, two):
            again = ask(server, headers)
            self.assertGreater(cached(again), 0)
            self.assertEqual(said(again), said(answer))
        self.assertEqual(server.request("GET", f"/v1/kv/{answer['id']}", headers=one)[0], 200)
        self.assertEqual(server.request("GET", f"/v1/kv/{answer['id']}", headers=two)[0], 404)
        self.assertNotIn("secret", "".join(server.log))
        server.stop()


class SleepTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.args = (*EXACT, "--kv-host-bytes", "64M", "--kv-disk-dir", self.folder, "--kv-disk-bytes", "64M")

    def tearDown(self):
        shutil.rmtree(self.folder)

    def test_a_restarted_server_finds_the_sessions_of_the_one_before(self):
        server = Server(*self.args)
        first = ask(server)
        server.stop()  # SIGTERM; checks exit code 0
        server = Server(*self.args)
        second = ask(server)
        self.assertGreater(cached(second), 0)
        self.assertEqual(said(second), said(first))
        self.assertGreater(total(server, "kv_blocks_woken_total"), 0)
        server.stop()
        # What another model's settings left is foreign: counted elsewhere, never used.
        server = Server("--dtype", "f32", "--kv-policy", "bf16", "--kv-codec", "paper", *self.args[len(EXACT):])
        self.assertEqual(cached(ask(server)), 0)
        server.stop()

    def test_damaged_files_are_counted_and_ignored(self):
        server = Server(*self.args)
        first = ask(server)
        server.stop()
        files = [f for f in glob.glob(f"{self.folder}/**", recursive=True) if os.path.isfile(f)]
        self.assertTrue(files)
        for path in files:
            with open(path, "r+b") as file:
                size = os.path.getsize(path)
                for offset in range(size // 3, size, max(1, size // 50)):
                    file.seek(offset)
                    byte = file.read(1)
                    file.seek(offset)
                    file.write(bytes([byte[0] ^ 0x55]))
        server = Server(*self.args)
        again = ask(server)
        self.assertEqual(said(again), said(first))
        self.assertGreater(total(server, "kv_store_corrupt_total"), 0)
        server.stop()


if __name__ == "__main__":
    unittest.main()
