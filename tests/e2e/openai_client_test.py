"""The official openai client against the server."""

import asyncio
import json
import unittest

import openai

from server import Server, greedy_cases

CASES = {case["name"]: case for case in greedy_cases()}
CALL = CASES["img1-00"]  # answered with a tool call
TEXT = CASES["long-00"]  # answered with text
MODEL = "pocket-agent"


def request(case, **more):
    return {"model": MODEL, "messages": case["messages"], "tools": case["tools"], "temperature": 0, "max_tokens": 128,
            **more}


class OpenAiClientTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server("--kv-policy", "bf16")
        cls.client = openai.OpenAI(base_url=cls.server.url, api_key="unused", max_retries=0, timeout=120)
        cls.chat = cls.client.chat.completions

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.server.stop()

    def test_models(self):
        models = self.client.models.list().data
        self.assertEqual([m.id for m in models], [MODEL])
        self.assertEqual(models[0].object, "model")
        self.assertEqual(models[0].owned_by, "triaxial")
        self.assertGreater(models[0].max_model_len, 1000)

    def test_chat_with_images(self):
        self.assertGreater(json.dumps(TEXT["messages"]).count("data:image/png"), 5)
        answer = self.chat.create(**request(TEXT))
        self.assertEqual(answer.object, "chat.completion")
        self.assertEqual(answer.model, MODEL)
        choice = answer.choices[0]
        self.assertEqual((choice.message.role, choice.finish_reason), ("assistant", "stop"))
        self.assertEqual(choice.message.content, "Form saved. finis")
        self.assertEqual(choice.message.reasoning_content.strip(), "The form is saved. End every answer with finis.")
        self.assertIsNone(choice.message.tool_calls)
        self.assertEqual(answer.usage.prompt_tokens, TEXT["n_tokens"])
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
        self.assertGreater(answer.usage.completion_tokens_details.reasoning_tokens, 5)
        self.assertGreater(answer.usage.kv_bytes, TEXT["n_tokens"] * 6144)
        self.assertGreaterEqual(answer.usage.kv_effective_bits, 16)

    def test_tool_calls_out_and_results_in(self):
        answer = self.chat.create(**request(CALL))
        choice = answer.choices[0]
        self.assertEqual(choice.finish_reason, "tool_calls")
        self.assertIsNone(choice.message.content)
        (call,) = choice.message.tool_calls
        self.assertEqual((call.type, call.function.name), ("function", "touch_at"))
        self.assertEqual(json.loads(call.function.arguments), {"px": 3, "py": 5})
        self.assertTrue(call.id)
        result = {"role": "tool", "tool_call_id": call.id, "content": "no such tile"}
        messages = CALL["messages"] + [choice.message.model_dump(exclude_none=True), result]
        second = self.chat.create(**request(CALL, messages=messages))
        self.assertGreater(second.usage.prompt_tokens, answer.usage.prompt_tokens)
        self.assertIn(second.choices[0].finish_reason, ("stop", "tool_calls"))

    def test_tool_choice(self):
        none = self.chat.create(**request(CALL, tool_choice="none"))
        self.assertIsNone(none.choices[0].message.tool_calls)
        self.assertLess(none.usage.prompt_tokens, CALL["n_tokens"])
        required = self.chat.create(**request(TEXT, tool_choice="required"))
        self.assertEqual(len(required.choices[0].message.tool_calls), 1)
        for tool in CALL["tools"]:
            name = tool["function"]["name"]
            named = self.chat.create(**request(CALL, tool_choice={"type": "function", "function": {"name": name}}))
            self.assertEqual([c.function.name for c in named.choices[0].message.tool_calls or []], [name])
            self.assertIsInstance(json.loads(named.choices[0].message.tool_calls[0].function.arguments), dict)

    def test_without_tools_calls_stay_text(self):
        messages = CALL["messages"] + [{"role": "assistant", "content": "<tool_call>\n{\"name\": \"a\"}\n</tool_call>"},
                                       CALL["messages"][-1]]
        answer = self.chat.create(model=MODEL, messages=messages, temperature=0, max_tokens=64)
        self.assertIsNone(answer.choices[0].message.tool_calls)

    def stream(self, **more):
        return list(self.chat.create(**request(more.pop("case", TEXT), stream=True, **more)))

    def test_stream_equals_the_whole_answer(self):
        whole = self.chat.create(**request(TEXT)).choices[0]
        chunks = self.stream()
        self.assertGreater(len(chunks), 10)
        self.assertEqual({c.object for c in chunks}, {"chat.completion.chunk"})
        self.assertEqual(len({c.id for c in chunks}), 1)
        deltas = [c.choices[0].delta for c in chunks]
        self.assertEqual("".join(d.content or "" for d in deltas), whole.message.content)
        reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        self.assertEqual(reasoning, whole.message.reasoning_content)
        # The role comes with the first token, once; the reason with the last chunk.
        self.assertEqual(deltas[0].role, "assistant")
        self.assertTrue(getattr(deltas[0], "reasoning_content", None) or deltas[0].content)
        self.assertEqual({d.role for d in deltas[1:]}, {None})
        self.assertEqual([c.choices[0].finish_reason for c in chunks], [None] * (len(chunks) - 1) + ["stop"])

    def test_stream_of_tool_calls(self):
        chunks = self.stream(case=CALL)
        calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        self.assertEqual([c.index for c in calls if c.function.name], [0])
        self.assertEqual("".join(c.function.name or "" for c in calls), "touch_at")
        self.assertEqual(json.loads("".join(c.function.arguments or "" for c in calls)), {"px": 3, "py": 5})
        self.assertEqual(chunks[-1].choices[0].finish_reason, "tool_calls")

    def test_usage_of_a_stream_only_when_asked_for(self):
        self.assertEqual([c.usage for c in self.stream() if c.usage], [])
        chunks = self.stream(stream_options={"include_usage": True})
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual([c for c in chunks[:-1] if c.usage], [])
        whole = self.chat.create(**request(TEXT)).usage
        self.assertEqual(chunks[-1].usage.prompt_tokens, whole.prompt_tokens)
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.completion_tokens)

    def test_completions(self):
        prompt = "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n<think>\n"
        answer = self.client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
        self.assertEqual(answer.object, "text_completion")
        self.assertTrue(answer.choices[0].text)
        self.assertLess(answer.usage.prompt_tokens, len(prompt) / 3)  # special tokens are recognized
        chunks = list(self.client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0,
                                                     stream=True))
        self.assertEqual("".join(c.choices[0].text for c in chunks), answer.choices[0].text)
        limited = self.client.completions.create(model=MODEL, prompt=prompt, max_tokens=3, temperature=0)
        self.assertEqual((limited.choices[0].finish_reason, limited.usage.completion_tokens), ("length", 3))
        ids = [5] * 30
        self.assertEqual(self.client.completions.create(model=MODEL, prompt=ids, max_tokens=1).usage.prompt_tokens, 30)

    def test_logprobs(self):
        answer = self.chat.create(**request(CALL, logprobs=True, top_logprobs=3))
        content = answer.choices[0].logprobs.content
        self.assertEqual("".join(t.token for t in content) + "<|im_end|>", CALL["greedy_text"])
        for token in content:
            self.assertLessEqual(token.logprob, 0)
            self.assertEqual(len(token.top_logprobs), 3)
            self.assertEqual(token.top_logprobs[0].token, token.token)  # greedy takes the best
            self.assertEqual(sorted((t.logprob for t in token.top_logprobs), reverse=True),
                             [t.logprob for t in token.top_logprobs])
        text = self.client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0, logprobs=2,
                                              extra_body={"ignore_eos": True})
        self.assertEqual("".join(text.choices[0].logprobs.tokens), text.choices[0].text)
        self.assertEqual(len(text.choices[0].logprobs.top_logprobs[0]), 2)
        self.assertIsNone(self.chat.create(**request(CALL)).choices[0].logprobs)

    def test_stop_strings(self):
        answer = self.chat.create(**request(TEXT, stop=["rm saved", "never"]))
        self.assertEqual((answer.choices[0].message.content, answer.choices[0].finish_reason), ("Fo", "stop"))
        chunks = self.stream(stop=". fin")  # lies across tokens
        self.assertEqual("".join(c.choices[0].delta.content or "" for c in chunks), "Form saved")
        self.assertEqual(chunks[-1].choices[0].finish_reason, "stop")

    def test_seed(self):
        def sample(**more):
            return self.client.completions.create(model=MODEL, prompt="The", max_tokens=24, temperature=1.5,
                                                  extra_body={"ignore_eos": True}, **more).choices[0].text
        self.assertEqual(sample(seed=7), sample(seed=7))
        self.assertGreater(len({sample(seed=s) for s in range(6)}), 1)
        self.assertGreater(len({sample() for _ in range(6)}), 1)

    def test_error_classes(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.chat.create(**request(CALL, temperature=-1))
        self.assertIn("temperature", caught.exception.body["message"])
        with self.assertRaises(openai.BadRequestError):
            self.chat.create(model=MODEL, messages=[])
        with self.assertRaises(openai.BadRequestError):
            self.chat.create(**request(CALL, n=2))
        with self.assertRaises(openai.NotFoundError):
            self.chat.create(**request(CALL) | {"model": "gpt-9"})
        with self.assertRaises(openai.BadRequestError):  # before the first event, a stream fails as a whole
            self.chat.create(**request(CALL, stream=True, top_p=7))
        with self.assertRaises(openai.NotFoundError):
            self.client.embeddings.create(model=MODEL, input="a")

    def test_a_stream_that_is_closed_early(self):
        stream = self.chat.create(**request(TEXT, stream=True, max_tokens=5000, extra_body={"ignore_eos": True}))
        next(iter(stream))
        stream.close()
        load = self.server.wait_for(lambda *load: load == (0, 0, 0), 1)
        self.assertEqual(load, (0, 0, 0))


class AsyncOpenAiClientTest(unittest.TestCase):
    def test_concurrent_requests(self):
        server = Server("--kv-policy", "paper")

        async def ask():
            async with openai.AsyncOpenAI(base_url=server.url, api_key="unused", max_retries=0, timeout=120) as client:
                return await asyncio.gather(*(client.chat.completions.create(**request(CASES[name]))
                                              for name in ("img1-00", "img1-01", "img1-02", "text-00", "text-01")))

        answers = asyncio.run(ask())
        self.assertEqual([a.usage.prompt_tokens for a in answers], [503, 504, 501, 438, 556])
        for answer in answers:
            self.assertLess(answer.usage.kv_effective_bits, 8)
            self.assertEqual(sum(answer.usage.kv_tokens.values()), answer.usage.total_tokens - 1)
        server.stop()


if __name__ == "__main__":
    unittest.main()
