"""Clients that hang up in every phase of their request, on real sockets: what they held is free at once."""

import json
import os
import shutil
import socket
import tempfile
import threading
import time
import unittest

from server import ServerCase, greedy_cases, http_post

ENDLESS = {"max_tokens": 20000, "ignore_eos": True}


class HangUpTest(ServerCase):
    """After each test nothing is left in the server, by all that it says of itself."""

    def tearDown(self):
        self.gone(10)

    def gone(self, seconds=1):
        """Everything is released."""
        self.nothing_left(seconds)
        # A request whose client left at once may have begun only after that.
        end = time.monotonic() + seconds
        status, page = self.server.request("GET", "/v1/kv")
        while page["usage"] > 0 and time.monotonic() < end:
            time.sleep(0.01)
            status, page = self.server.request("GET", "/v1/kv")
        self.assertEqual((status, page["usage"], page["integrity_errors"]), (200, 0, 0), page)
        self.assertEqual(page["cached_tokens"], sum(f["tokens"] for f in page["formats"].values()))
        self.assertEqual(self.server.request("POST", "/v1/kv/check"), (200, {"ok": True, "error": None}))

    def start(self, receive_buffer=None, **body):
        connection = socket.socket()
        self.addCleanup(connection.close)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", self.server.port))
        connection.sendall(http_post("/v1/completions", json.dumps(body).encode()))
        return connection

    def total(self, name):
        return sum(self.server.metrics()[f"triaxial_{name}"].values())

    def until(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            self.assertLess(time.monotonic(), end, "it did not happen")
            time.sleep(0.002)


class OneAtATimeTest(HangUpTest):
    # One sequence at a time and small steps: the second request waits, and prompts take many steps.
    ARGS = ("--max-num-seqs", "1", "--max-num-batched-tokens", "32")

    def decoding(self):
        """A request that has its prompt behind it and will generate for long."""
        connection = self.start(prompt=[5] * 40, max_tokens=20000, ignore_eos=True)
        self.assertGreater(self.server.wait_for(lambda r, w, t: t > 45, 30)[2], 45)
        return connection

    def test_while_queued(self):
        first = self.decoding()
        second = self.start(prompt=[5] * 40, max_tokens=5)
        self.assertEqual(self.server.wait_for(lambda r, w, t: w == 1, 10)[:2], (1, 1))
        second.close()
        self.assertEqual(self.server.wait_for(lambda r, w, t: w == 0, 1)[:2], (1, 0))
        first.close()
        self.gone()

    def test_while_the_prompt_is_read(self):
        connection = self.start(prompt=[5] * 20000, max_tokens=5)
        load = self.server.wait_for(lambda r, w, t: t > 0, 30)
        self.assertTrue(0 < load[2] < 15000, load)
        connection.close()
        self.gone()

    def test_while_decoding(self):
        self.decoding().close()
        self.gone()

    def test_while_decoding_by_reset(self):
        connection = self.decoding()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()
        self.gone()

    def test_while_streaming(self):
        connection = self.start(prompt=[5] * 40, max_tokens=20000, ignore_eos=True, stream=True)
        data = b""
        while data.count(b"data: ") < 3:
            data += connection.recv(65536)
        connection.close()
        self.gone()

    def test_a_stream_that_nobody_reads(self):
        before = self.total("prompt_tokens_total")
        connection = self.start(prompt=[5] * 40, max_tokens=300, ignore_eos=True, stream=True)
        self.until(lambda: self.total("prompt_tokens_total") > before)  # it has begun
        load = self.server.wait_for(lambda r, w, t: (r, w, t) == (0, 0, 0), 60)
        self.assertEqual(load, (0, 0, 0))
        connection.close()

    def test_while_the_body_is_sent(self):
        request = http_post("/v1/completions", json.dumps({"prompt": "a" * 5000}).encode())
        with self.server.connect() as connection:
            connection.sendall(request[:3000])
        self.gone()

    def test_many_at_once(self):
        case = greedy_cases()[3]
        body = {"messages": case["messages"], "tools": case["tools"], "max_tokens": 500, "ignore_eos": True}
        request = http_post("/v1/chat/completions", json.dumps(body).encode())
        connections = [self.server.connect() for _ in range(20)]
        threads = [threading.Thread(target=c.sendall, args=(request,)) for c in connections]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.server.wait_for(lambda r, w, t: r == 1 and w > 5, 30)
        for i, connection in enumerate(connections):
            time.sleep(0.01 * (i % 3))
            connection.close()
        # Bodies may still be under way from sockets to the queue.
        self.assertEqual(self.server.wait_for(lambda *load: load == (0, 0, 0), 10), (0, 0, 0))


class FlushingTest(HangUpTest):
    def descriptors(self):
        return len(os.listdir(f"/proc/{self.server.process.pid}/fd"))

    def unsent(self):
        """Bytes that wait in the server's sockets."""
        with open("/proc/net/tcp", encoding="ascii") as file:
            rows = [line.split() for line in file][1:]
        local = f":{self.server.port:04X}"
        return sum(int(row[4].split(":")[0], 16) for row in rows if row[1].endswith(local))

    def stalled(self, **body):
        """A stream that nobody reads, once the server can send no more of it."""
        connection = self.start(receive_buffer=4096, prompt=[5] * 40, stream=True, logprobs=20, **body)
        seen = 0
        while (unsent := self.unsent()) == 0 or unsent != seen:
            seen = unsent
            time.sleep(0.3)
        return connection

    def test_a_client_that_reads_nothing_and_leaves_while_tokens_are_made(self):
        before = self.descriptors()
        connection = self.stalled(**ENDLESS)
        self.assertEqual(self.server.load()[0], 1)
        connection.close()
        self.gone()
        self.until(lambda: self.descriptors() <= before)

    def test_a_client_that_reads_nothing_and_leaves_when_all_are_made(self):
        before = self.descriptors()
        connection = self.stalled(max_tokens=3000, ignore_eos=True)
        self.assertEqual(self.server.wait_for(lambda *load: load == (0, 0, 0), 120), (0, 0, 0))
        self.assertGreater(self.unsent(), 0, "what is not read yet")
        connection.close()
        self.until(lambda: self.descriptors() <= before)


class DemotingTest(HangUpTest):
    # The checkpoint's own policy, which has prices, and an arena in which three prompts do not fit as they come.
    ARGS = ("--kv-memory", "4M", "--max-num-batched-tokens", "256")

    def demotions(self):
        return sum(value for labels, value in self.server.metrics()["triaxial_kv_demotions_total"].items()
                   if 'cause="pressure"' in labels)

    def test_while_blocks_are_demoted(self):
        for i in range(6):
            before = self.demotions()
            connections = [self.start(prompt=[5 + i, 6 + j] * 700, **ENDLESS) for j in range(4)]
            self.until(lambda: self.demotions() > before)
            for connection in connections:
                connection.close()
            self.gone()
        self.assertGreater(self.demotions(), 0)


class WakingTest(HangUpTest):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.ARGS = ("--kv-policy", "bf16", "--kv-memory", "16M", "--kv-host-bytes", "12M", "--kv-disk-dir", cls.folder,
                    "--kv-disk-bytes", "256M")
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        shutil.rmtree(cls.folder)

    def ask(self, session):
        status, answer = self.server.complete(prompt=[5 + session, 7] * 1200, max_tokens=8, temperature=0, ignore_eos=True)
        self.assertEqual(status, 200, answer)
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    def test_while_blocks_wake_from_host_and_disk(self):
        # Of six sessions the arena holds one, the host area less than another.
        first = [self.ask(i)[0] for i in range(6)]
        woken = self.total("kv_blocks_woken_total")
        for delay in (0, 0.001, 0.003, 0.01, 0.03):
            for session in range(6):
                connection = self.start(prompt=[5 + session, 7] * 1200, **ENDLESS)
                time.sleep(delay)
                connection.close()
                self.gone(3)
        self.assertGreater(self.total("kv_blocks_woken_total"), woken)
        for session in range(6):
            text, cached = self.ask(session)
            self.assertEqual(text, first[session])
            self.assertGreater(cached, 2000)


if __name__ == "__main__":
    unittest.main()
