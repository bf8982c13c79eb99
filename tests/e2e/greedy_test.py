"""Answers of the server against greedy continuations of transformers, alone and batched."""

import concurrent.futures
import json
import unittest

from server import Server, greedy_cases

MAX_TOKENS = 64  # of the recorded continuations


def ask(server, case):
    status, answer = server.chat(messages=case["messages"], tools=case["tools"], temperature=0,
                                 max_tokens=MAX_TOKENS, logprobs=True)
    assert status == 200, answer
    return answer


def expected_message(text):
    """What the API makes of generated text: (reasoning, content, [(name, arguments)])."""
    text = text.removesuffix("<|im_end|>")
    reasoning, _, rest = text.partition("</think>")
    content, calls = "", []
    while rest:
        before, begin, rest = rest.partition("<tool_call>")
        content += before
        if begin:
            call, end, rest = rest.partition("</tool_call>")
            if end:
                call = json.loads(call)
                calls.append((call["name"], call["arguments"]))
    return reasoning.strip(), content.strip(), calls


class GreedyTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        # A step of 200 rows makes every prompt take several steps, which the others share.
        cls.server = Server("--dtype", "f32", "--kv-policy", "bf16", "--max-num-batched-tokens", "200")
        cls.cases = greedy_cases()
        cls.single = {case["name"]: ask(cls.server, case) for case in cls.cases}

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()

    def test_text_equals_the_reference(self):
        self.assertEqual(len(self.cases), 12)
        for case in self.cases:
            with self.subTest(case["name"]):
                answer = self.single[case["name"]]
                choice = answer["choices"][0]
                text = b"".join(bytes(t["bytes"]) for t in choice["logprobs"]["content"]).decode()
                if case["greedy_stopped_at_eos"]:
                    text += "<|im_end|>"  # ends the answer and is not part of it
                self.assertEqual(text, case["greedy_text"])
                self.assertEqual(answer["usage"]["prompt_tokens"], case["n_tokens"])

    def test_message_is_the_parsed_text(self):
        finished = [case for case in self.cases if case["greedy_stopped_at_eos"]]
        self.assertGreaterEqual(len(finished), 8)
        for case in finished:
            with self.subTest(case["name"]):
                choice = self.single[case["name"]]["choices"][0]
                message = choice["message"]
                reasoning, content, calls = expected_message(case["greedy_text"])
                self.assertEqual(message["reasoning_content"].strip(), reasoning)
                self.assertEqual((message["content"] or "").strip(), content)
                found = [(c["function"]["name"], json.loads(c["function"]["arguments"]))
                         for c in message.get("tool_calls", [])]
                self.assertEqual(found, calls)
                self.assertEqual(choice["finish_reason"], "tool_calls" if calls else "stop")

    def test_batched_answers_equal_single_ones(self):
        with concurrent.futures.ThreadPoolExecutor(len(self.cases)) as pool:
            batched = list(pool.map(lambda case: ask(self.server, case), self.cases))
        for case, answer in zip(self.cases, batched):
            with self.subTest(case["name"]):
                single = self.single[case["name"]]
                for choice in (answer["choices"][0], single["choices"][0]):
                    for call in choice["message"].get("tool_calls", []):
                        call.pop("id", None)
                self.assertEqual(answer["choices"][0]["message"], single["choices"][0]["message"])
                self.assertEqual([t["token"] for t in answer["choices"][0]["logprobs"]["content"]],
                                 [t["token"] for t in single["choices"][0]["logprobs"]["content"]])


if __name__ == "__main__":
    unittest.main()
