"""Ten times more requests than the server can answer: what is refused, what it costs, and who starves.

Alone, it is a short test. With --seconds it is a measurement, e.g. of five minutes:
  PYTHONPATH=tests/e2e python3 tests/e2e/overload_test.py --seconds 300 --json bench/results/overload-pocket-agent.json
First as many clients as run and wait at most, each with one request at a time: the capacity, and the latency
with a full queue. Then arrivals at ten times that rate that wait for nobody. Then the clients again.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
import unittest

from server import Server

RUNNING, QUEUED, OVERLOAD = 4, 16, 10
TENANTS = {"greedy": 7, "one": 1, "two": 1, "three": 1}  # shares of what is offered
ARGS = ("--max-num-seqs", str(RUNNING), "--max-queued", str(QUEUED), "--kv-memory", "8M", "--threads", "1")


class Phase:
    """What clients saw of answers that ended in a stretch of time."""

    def __init__(self):
        self.latencies = []
        self.statuses = {}
        self.bad_retry_after = 0
        self.offered = {name: 0 for name in TENANTS}
        self.answered = {name: [] for name in TENANTS}  # when
        self.begin = time.monotonic()

    def add(self, tenant, status, retry_after, latency):
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200:
            self.latencies.append(latency)
            self.answered[tenant].append(time.monotonic())
        elif status == 429 and not 1 <= int(retry_after or 0) <= 60:
            self.bad_retry_after += 1

    def end(self):
        self.seconds = time.monotonic() - self.begin
        self.rate = len(self.latencies) / self.seconds

    def report(self):
        ordered = sorted(self.latencies)
        tenants = {}
        for name, times in self.answered.items():
            edges = [self.begin, *times, self.begin + self.seconds]
            tenants[name] = {"offered": self.offered[name], "answered": len(times),
                             "longest_wait_for_an_answer_seconds": max(b - a for a, b in zip(edges, edges[1:]))}
        return {"seconds": self.seconds, "offered_per_second": sum(self.offered.values()) / self.seconds,
                "answered_per_second": self.rate, "statuses": self.statuses,
                "latency_seconds": {"mean": statistics.fmean(ordered), "p50": ordered[len(ordered) // 2],
                                    "p90": ordered[len(ordered) * 9 // 10], "p99": ordered[len(ordered) * 99 // 100]},
                "tenants": tenants}


class Load:
    def __init__(self, server, output_tokens):
        self.port = server.port
        self.output_tokens = output_tokens
        self.random = random.Random(1)

    async def ask(self, phase, tenant):
        phase.offered[tenant] += 1
        prompt = self.random.choices(range(1, 90), k=self.random.randrange(64, 320))
        body = json.dumps({"prompt": prompt, "max_tokens": self.output_tokens, "ignore_eos": True, "seed": 1}).encode()
        head = (f"POST /v1/completions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer key-{tenant}\r\n"
                f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n").encode()
        begin = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(head + body)
            answer = (await reader.read(-1)).decode()
        finally:
            writer.close()
        status = int(answer[9:12] or 0)
        retry_after = re.search(r"\r\nRetry-After: (\d+)\r\n", answer)
        phase.add(tenant, status, retry_after and retry_after[1], time.monotonic() - begin)
        return status

    async def closed(self, seconds):
        """As many clients of each key as it may hold places, each with one request at a time."""
        phase = Phase()
        places = QUEUED * len(TENANTS) // (len(TENANTS) + 1)

        async def client(tenant):
            while time.monotonic() < phase.begin + seconds:
                if await self.ask(phase, tenant) == 429:  # came before the next one had left the queue
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(client(list(TENANTS)[i % len(TENANTS)]) for i in range(RUNNING + places)))
        phase.end()
        return phase

    async def open(self, seconds, rate):
        """Arrivals at random moments."""
        phase = Phase()
        tasks = set()
        due = phase.begin
        while (now := time.monotonic()) < phase.begin + seconds:
            while due <= now:
                due += self.random.expovariate(rate)
                task = asyncio.create_task(self.ask(phase, self.random.choices(*zip(*TENANTS.items()))[0]))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(max(0.001, min(0.02, due - time.monotonic())))
        await asyncio.gather(*tasks)
        phase.end()
        return phase


async def sample(server, samples):
    """(resident bytes, open files) of the server, twice a second."""
    pid = server.process.pid
    while True:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            resident = int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1]) * 1024
        samples.append((resident, len(os.listdir(f"/proc/{pid}/fd"))))
        await asyncio.sleep(0.5)


async def measure(server, seconds, output_tokens):
    os.nice(19)  # real clients do not compute on the server's cores
    load = Load(server, output_tokens)
    at_capacity = max(1.5, min(60, seconds / 5))
    await load.closed(min(5, at_capacity))  # warms up
    phases, memory = [], []
    for run in ("before", "overload", "after"):
        samples = []
        sampler = asyncio.create_task(sample(server, samples))
        if run == "overload":
            phases.append(await load.open(seconds, OVERLOAD * phases[0].rate))
        else:
            phases.append(await load.closed(at_capacity))
        sampler.cancel()
        memory.append(samples)
    before, overload, after = phases
    half = memory[1][len(memory[1]) // 2:]
    capacity = statistics.fmean(before.latencies + after.latencies)
    return {
        "server": list(ARGS), "output_tokens": output_tokens,
        "at_capacity_before": before.report(), "overload": overload.report(), "at_capacity_after": after.report(),
        "bad_retry_after": sum(phase.bad_retry_after for phase in phases),
        "latency_over_capacity": statistics.fmean(overload.latencies) / capacity,
        "rate_over_capacity": 2 * overload.rate / (before.rate + after.rate),
        "memory_bytes": {"at_capacity": max(m for m, _ in memory[0]), "overload": max(m for m, _ in memory[1]),
                         "growth_in_second_half": half[-1][0] - half[0][0]},
        "open_files": {"at_capacity": max(f for _, f in memory[0]), "overload": max(f for _, f in memory[1])},
    }


def run(seconds, output_tokens):
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
        file.write("".join(f"key-{name}\n" for name in TENANTS))
        file.flush()
        server = Server(*ARGS, "--api-key-file", file.name)
    result = asyncio.run(measure(server, seconds, output_tokens))
    key = {"Authorization": "Bearer key-one"}
    result["check_after"] = server.request("POST", "/v1/kv/check", headers=key)[1]
    result["left"] = server.wait_for(lambda *load: load == (0, 0, 0), 10)
    server.stop()
    return result


class OverloadTest(unittest.TestCase):
    def test_what_is_too_much_is_refused_and_the_rest_is_served(self):
        result = run(seconds=3, output_tokens=24)
        self.check(result)

    def check(self, result):
        overload = result["overload"]
        self.assertEqual(set(overload["statuses"]), {200, 429}, overload)
        self.assertGreater(overload["statuses"][429], overload["statuses"][200])
        self.assertEqual(result["bad_retry_after"], 0)
        for name, tenant in overload["tenants"].items():
            self.assertGreater(tenant["answered"], 0, f"{name} starved: {overload}")
        memory = result["memory_bytes"]
        # Some of it comes in the first seconds whatever the load; a queue without a limit would take more.
        self.assertLess(memory["overload"], 1.2 * memory["at_capacity"] + (64 << 20), memory)
        self.assertTrue(result["check_after"]["ok"], result["check_after"])
        self.assertEqual(result["left"], (0, 0, 0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--json")
    options = parser.parse_args()
    result = run(options.seconds, output_tokens=128)
    text = json.dumps(result, indent=1)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    print(text)


if __name__ == "__main__":
    main() if len(sys.argv) > 1 else unittest.main()
