"""What the server says about its work and how it bounds it: queue, deadlines, log, recording, pages of the cache."""

import http.client
import json
import os
import re
import stat
import subprocess
import tempfile
import threading
import unittest

from server import BINARY, Server, ServerCase, greedy_cases, http_post

USER = [{"role": "user", "content": "Hello."}]
LONG = {"prompt": [5] * 40, "max_tokens": 20000, "ignore_eos": True}


class QueueTest(unittest.TestCase):
    def test_a_full_queue_answers_429_and_says_when_to_come_again(self):
        server = Server("--max-num-seqs", "1", "--max-queued", "2")
        self.assertEqual(server.complete(prompt=[5] * 40, max_tokens=2, ignore_eos=True)[0], 200)
        held = []
        for i in range(3):  # one runs, two wait
            connection = server.connect()
            connection.sendall(http_post("/v1/completions", json.dumps(LONG).encode()))
            held.append(connection)
            self.addCleanup(connection.close)
            self.assertEqual(server.wait_for(lambda r, w, t: r + w == i + 1 and r == 1, 30)[:2], (1, i))
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        self.addCleanup(connection.close)
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": USER}).encode())
        answer = connection.getresponse()
        error = json.loads(answer.read())["error"]
        self.assertEqual(answer.status, 429, error)
        self.assertEqual((error["type"], error["code"]), ("rate_limit_error", 429))
        self.assertEqual(int(answer.getheader("Retry-After")), error["retry_after_seconds"])
        self.assertTrue(1 <= error["retry_after_seconds"] <= 60, error)
        self.assertEqual(sum(v for labels, v in server.metrics()["triaxial_requests_refused_total"].items()
                             if 'reason="full"' in labels), 1)
        # Whoever waited is served once there is room.
        for connection in held[:2]:
            connection.close()
        self.assertEqual(server.wait_for(lambda r, w, t: (r, w) == (1, 0), 10)[:2], (1, 0))
        held[2].close()
        self.assertEqual(server.wait_for(lambda *load: load == (0, 0, 0), 10), (0, 0, 0))
        self.assertEqual(server.chat(messages=USER, max_tokens=2)[0], 200)
        server.stop()


    def test_a_key_cannot_fill_the_queue(self):
        with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
            file.write("secret-1\nsecret-2\n")
            file.flush()
            server = Server("--max-num-seqs", "1", "--max-queued", "8", "--api-key-file", file.name)
        one, two = ({"Authorization": f"Bearer secret-{i}"} for i in (1, 2))
        held = []
        for _ in range(20):  # of which one runs and half of the places are taken
            connection = server.connect()
            request = http_post("/v1/completions", json.dumps(LONG).encode())
            connection.sendall(request.replace(b"Host:", b"Authorization: Bearer secret-1\r\nHost:"))
            held.append(connection)
            self.addCleanup(connection.close)
            server.wait_for(lambda r, w, t: r == 1, 30)
        self.assertEqual(server.wait_for(lambda r, w, t: w == 4, 30)[:2], (1, 4))
        status, answer = server.request("POST", "/v1/completions", LONG, one)
        self.assertEqual((status, answer["error"]["type"]), (429, "rate_limit_error"), answer)
        self.assertIn("this API key", answer["error"]["message"])
        answers = []
        waits = threading.Thread(target=lambda: answers.append(server.request(
            "POST", "/v1/completions", {"prompt": [5] * 40, "max_tokens": 2, "ignore_eos": True}, two)))
        waits.start()
        self.assertEqual(server.wait_for(lambda r, w, t: w == 5, 10)[:2], (1, 5))
        for connection in held:
            connection.close()
        waits.join(60)
        self.assertEqual(answers[0][0], 200, answers)
        self.assertEqual(server.wait_for(lambda *load: load == (0, 0, 0), 10), (0, 0, 0))
        server.stop()


class PagesTest(ServerCase):
    def test_the_blocks_of_a_running_answer(self):
        server = self.server
        with server.connect() as connection:
            body = LONG | {"stream": True, "prompt": [5] * 200}
            connection.sendall(http_post("/v1/completions", json.dumps(body).encode()))
            data = b""
            while b"\n\ndata" not in data and data.count(b"data: ") < 2:
                data += connection.recv(65536)
            answer = re.search(rb'"id":"(cmpl-[0-9a-f]+)"', data)[1].decode()
            status, page = server.request("GET", f"/v1/kv/{answer}")
        self.assertEqual(status, 200, page)
        self.assertEqual(page["id"], answer)
        self.assertGreaterEqual(len(page["blocks"]), 4)
        self.assertEqual([b["position"] for b in page["blocks"]], [64 * i for i in range(len(page["blocks"]))])
        for block in page["blocks"]:
            self.assertEqual(sum(block["tags"].values()), block["tokens"])
            self.assertIn(block["format"], page["formats"])
            self.assertGreaterEqual(block["users"], 1)
        self.assertEqual(sum(f["bytes"] for f in page["formats"].values()), sum(b["bytes"] for b in page["blocks"]))
        self.assertEqual(server.wait_for(lambda *load: load == (0, 0, 0), 10), (0, 0, 0))

    def test_unknown_answers(self):
        for path in ("/v1/kv/chatcmpl-0", "/v1/kv/", "/v1/kv/1", "/v1/kv/" + "x" * 5000):
            self.assertEqual(self.server.request("GET", path)[0], 404, path[:40])

    def test_the_whole_cache(self):
        status, page = self.server.request("GET", "/v1/kv")
        self.assertEqual(status, 200)
        self.assertEqual(page["integrity_errors"], 0)
        self.assertEqual(page["bytes"], sum(f["bytes"] for f in page["formats"].values()))

    def test_metrics_have_their_fixed_names(self):
        metrics = self.server.metrics()
        for name in ("kv_price", "kv_demotions_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
                     "kv_evictions_total", "kv_sleeping_bytes", "kv_blocks_woken_total", "kv_store_corrupt_total",
                     "kv_integrity_errors_total", "num_preemptions_total", "kv_effective_bits"):
            self.assertIn(f"triaxial_{name}", metrics)
        self.assertTrue(any('from="bf16"' in labels and 'to="k2v2"' in labels and 'cause="pressure"' in labels
                            for labels in metrics["triaxial_kv_demotions_total"]))

    def test_one_line_for_each_finished_request(self):
        answer = self.server.chat(messages=USER, max_tokens=5, ignore_eos=True)[1]
        usage = answer["usage"]
        self.assertEqual(usage["kv_demotions"], 0)
        line = self.server.wait_for_line(answer["id"])
        for text in (f"{usage['prompt_tokens']} + 5 tokens", "cached", "bf16", "TTFT", "tokens/s"):
            self.assertIn(text, line)
        self.assertNotIn("Hello", "".join(self.server.log))


class RecordTest(unittest.TestCase):
    def test_recorded_chats_read_back_as_conversations(self):
        case = next(c for c in greedy_cases() if "data:image" in json.dumps(c["messages"]))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "chats.jsonl")
            server = Server("--record", path, "--record-bytes", "8M")
            self.assertTrue(any("privacy" in line and path in line for line in server.log), server.log)
            body = {"messages": case["messages"], "tools": case["tools"], "max_tokens": 200, "temperature": 0}
            answers = [server.chat(**body)[1]["choices"][0]["message"], server.chat(messages=USER, max_tokens=3)[1]
                       ["choices"][0]["message"]]
            self.assertEqual(server.chat(messages=USER, temperature="hot")[0], 400)
            # Clients send answers back without their thoughts.
            sent_back = {key: answers[0][key] for key in ("role", "content", "tool_calls") if key in answers[0]}
            more = {"role": "user", "content": "Go on."}
            grown = server.chat(messages=case["messages"] + [sent_back, more], tools=case["tools"], max_tokens=20)
            answers.append(grown[1]["choices"][0]["message"])
            server.stop()
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
            with open(path, encoding="utf-8") as file:
                lines = [json.loads(line) for line in file]
            self.assertEqual(len(lines), 2, "a conversation that grew is one line")
            self.assertEqual(lines[0]["messages"], USER + [answers[1]])
            self.assertNotIn("tools", lines[0])
            self.assertEqual(lines[1]["messages"], case["messages"] + [answers[0], more, answers[2]], "thoughts included")
            self.assertEqual(lines[1]["tools"], case["tools"])
            tagged = json.loads(subprocess.run([BINARY, "tag", path, "--line", "2", "--json"], capture_output=True,
                                               check=True, timeout=60).stdout)
            self.assertTrue(any("/image/" in span["tag"] for span in tagged["spans"]))
            replayed = json.loads(subprocess.run([BINARY, "replay", "--trace", path, "--device", "cpu", "--agents", "2",
                                                  "--json"], capture_output=True, check=True, timeout=60).stdout)
            answered = sum(message["role"] == "assistant" for line in lines for message in line["messages"])
            self.assertEqual(replayed["policies"][0]["finished"], answered)

    def test_the_default_policy_is_the_checkpoints_own(self):
        for args, policy in (((), "pocket-agent"), (("--kv-codec", "paper"), "paper"), (("--kv-policy", "int4"), "int4")):
            tagged = subprocess.run([BINARY, "tag", "--prompt", "Hello", "--json", *args], capture_output=True, check=True,
                                    timeout=60).stdout
            self.assertEqual(json.loads(tagged)["policy"], policy, args)

    def test_options_that_make_no_sense(self):
        for args, mentions in ((("--record", "/nowhere/chats.jsonl"), "/nowhere/chats.jsonl"),
                               (("--record", "/dev/null"), "regular file"),
                               (("--record-bytes", "1M"), "--record"),
                               (("--record", "x.jsonl", "--record-bytes", "much"), "--record-bytes"),
                               (("--kv-disk-bytes", "1G"), "--kv-disk-dir"),
                               (("--kv-disk-dir", "sessions", "--kv-disk-bytes", "0"), "--kv-disk-bytes"),
                               (("--kv-host-bytes", "much"), "--kv-host-bytes"),
                               (("--kv-policy", "paper", "--kv-budget-bits", "3"), "--kv-budget-bits"),
                               (("--kv-budget-bits", "-1"), "--kv-budget-bits"),
                               (("--max-queued", "0"), "--max-queued"),
                               (("--request-timeout", "-1"), "--request-timeout")):
            with tempfile.TemporaryDirectory() as folder:
                args = [a if a != "x.jsonl" else os.path.join(folder, a) for a in args]
                result = subprocess.run([BINARY, "serve", "--port", "0", *args], capture_output=True, text=True,
                                        timeout=60, check=False)
            self.assertNotEqual(result.returncode, 0, args)
            self.assertIn(mentions, result.stderr, args)


class CommandLineTest(unittest.TestCase):
    def test_mistakes_are_told_in_one_sentence(self):
        episodes = "models/pocket-agent/episodes/heldout.jsonl"
        for args, status, mentions in (((), 2, "triaxial --help"),
                                       (("sing",), 2, "no command 'sing'"),
                                       (("policy", "sing"), 2, "triaxial policy: there is no command 'sing'"),
                                       (("serve", "--bogus"), 2, "--bogus"),
                                       (("serve", "--port", "many"), 2, "--port"),
                                       (("serve", "--model", "/nowhere"), 1, "/nowhere is no directory"),
                                       (("tag", "--line", "2", "--prompt", "a"), 2, "--line requires"),
                                       (("tag", episodes), 1, "choose one with --line"),
                                       (("tag", episodes, "--line", "15"), 1, episodes + ", line 15"),
                                       (("generate", "--messages", episodes, "--line", "1", "--image", "a.png"), 2, "--image"),
                                       (("demo", "--html", "/nowhere/page.html"), 1, "/nowhere"),
                                       (("replay", "--trace", episodes, "--kv-budget-bits", "3"), 1, "--kv-budget-bits"),
                                       (("replay", "--trace", "tests/data/text/trajectories.jsonl"), 1, "--images")):
            result = subprocess.run([BINARY, *args], capture_output=True, text=True, timeout=60, check=False)
            self.assertEqual(result.returncode, status, args)
            self.assertIn(mentions, result.stderr)
            self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
            self.assertEqual(result.stdout, "")


if __name__ == "__main__":
    unittest.main()
