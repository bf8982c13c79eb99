"""The real server under test: started on a free port, asked over HTTP, stopped with SIGTERM."""

import atexit
import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import unittest

BINARY = os.environ.get("TRIAXIAL_BINARY", "build/release/triaxial")
DATA = "tests/data/e2e"


class Server:
    """`triaxial serve --port 0 ARGS`; stop() checks that it ends cleanly."""

    def __init__(self, *args):
        self.log = []
        self.port = None
        self.process = subprocess.Popen([BINARY, "serve", "--port", "0", *args], stderr=subprocess.PIPE, text=True)
        atexit.register(self.process.kill)  # of a test that failed; the test runner would wait for it
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(60) or self.port is None:
            self.process.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.log))
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r"listening on http://127\.0\.0\.1:(\d+)/v1", line)
            if found:
                self.port = int(found[1])
                self._ready.set()
        self._ready.set()

    def stop(self):
        """Ends the server; an error if it had died or does not exit with 0."""
        if self.process.poll() is not None:
            raise AssertionError(f"the server died with {self.process.returncode}:\n" + "".join(self.log[-20:]))
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError("the server did not stop within 60 s of SIGTERM")
        self._reader.join(10)
        self.process.stderr.close()
        if code != 0:
            raise AssertionError(f"the server exited with {code}:\n" + "".join(self.log[-20:]))

    def request(self, method, path, body=None, headers=None, timeout=250):
        """(status, body): bytes are sent as they are, anything else as JSON; JSON answers are parsed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            text = answer.read()
            if answer.getheader("Content-Type", "").startswith("application/json"):
                return answer.status, json.loads(text)
            return answer.status, text.decode()
        finally:
            connection.close()

    def chat(self, **body):
        return self.request("POST", "/v1/chat/completions", body)

    def complete(self, **body):
        return self.request("POST", "/v1/completions", body)

    def connect(self):
        """A raw socket."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def send_raw(self, data):
        """Status of the answer to raw bytes, or None if the server just closes."""
        with self.connect() as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the server may answer and close before it has read everything
            return read_status(connection)

    def metrics(self):
        """{name: {labels: value}}"""
        status, text = self.request("GET", "/metrics")
        assert status == 200, status
        metrics = {}
        for line in text.splitlines():
            found = re.fullmatch(r"(\w+)(\{.*\})? (\S+)(?: \d+)?", line)
            if found and not line.startswith("#"):
                metrics.setdefault(found[1], {})[found[2] or ""] = float(found[3])
        return metrics

    def load(self):
        """(running, waiting, tokens in KV blocks of running requests)"""
        metrics = self.metrics()
        running, waiting, tokens, cached = (int(sum(metrics[f"triaxial_{name}"].values())) for name in (
            "num_requests_running", "num_requests_waiting", "kv_tokens", "kv_cached_tokens"))
        return running, waiting, tokens - cached

    def wait_for_line(self, text, seconds=10):
        """A line of the log with `text`; it may come after the answer that it is about."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.log):
                if text in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no line of the log has {text!r}:\n" + "".join(self.log[-20:]))

    def wait_for(self, condition, seconds):
        """Polls load() until condition(running, waiting, tokens); returns the last load."""
        end = time.monotonic() + seconds
        while True:
            load = self.load()
            if condition(*load) or time.monotonic() > end:
                return load
            time.sleep(0.02)


class ServerCase(unittest.TestCase):
    """One server for a class."""

    ARGS = ()

    @classmethod
    def setUpClass(cls):
        cls.server = Server(*cls.ARGS)

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()

    def nothing_left(self, seconds):
        """No request runs or waits, and none holds tokens; at the latest so soon."""
        load = self.server.wait_for(lambda *load: load == (0, 0, 0), seconds)
        self.assertEqual(load, (0, 0, 0), "running, waiting, tokens left after the test")


def read_status(connection):
    data = b""
    try:
        while b"\r\n" not in data:
            part = connection.recv(4096)
            if not part:
                break
            data += part
    except ConnectionResetError:
        pass
    found = re.match(rb"HTTP/1\.1 (\d+)", data)
    return int(found[1]) if found else None


def http_post(path, body):
    """The bytes of a POST request."""
    return (f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def data_url(path, kind="png"):
    with open(path, "rb") as file:
        return f"data:image/{kind};base64," + base64.b64encode(file.read()).decode()


def greedy_cases():
    """Requests with the greedy continuation of the reference; pictures are data: URLs."""
    cases = []
    with open(f"{DATA}/pocket_greedy.jsonl", encoding="utf-8") as file:
        for line in file:
            case = json.loads(line)
            for message in case["messages"]:
                if isinstance(message.get("content"), list):
                    for part in message["content"]:
                        if part["type"] == "image_url":
                            part["image_url"]["url"] = data_url(f"{DATA}/{part['image_url']['url']}")
            cases.append(case)
    return cases
