"""Latency over request rate: a Poisson load against the HTTP server, vanilla and DMC, in the same memory.

    python benchmarks/serving.py [--out benchmarks/results/serving-h100.json]

The whole of `megatron-dmc serve` on one GPU: engine, coordinator, HTTP server, and a process of clients that stream
their answers. Models have random weights and Transformer Engine layers; DMC's decision offset is the quantile at which
a share 1 - 1/compression of a random text's tokens merges, and answers are drawn at temperature 1, so that they are
random text as well (the ratio that the server told is in the result). Vanilla has the same server and engine with
Megatron's own context, `VanillaAttention` for attention, and FlashInfer's plan made anew for each step.

For each way, first `capacity`: requests per second with more clients than the cache has room for. Then requests arrive
at random (Poisson) at shares of that rate. Lengths of prompts and answers are uniform in a range. Of the requests that
arrive in the window:

- latency: milliseconds per token of an answer, from the request's arrival to its end, waiting included. A request that
  has not ended when the clients stop counts with the time until then.
- ttft: milliseconds from arrival to the first token; gap: between two tokens.

rate_at: the highest rate at which 95% of requests have at most so many milliseconds per token, between the two measured
rates next to it; no higher than the capacity, beyond which requests pile up however long each still takes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import random
import sys
import time
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Load(NamedTuple):
    """What the clients ask for, and for how long; lengths in tokens, times in seconds.

    `concurrent` clients at once, or if it is 0, `rate` requests per second.
    """

    prompt: tuple[int, int]
    answer: tuple[int, int]
    vocabulary: int
    rate: float = 0.0
    concurrent: int = 0
    warm: float = 10.0
    window: float = 15.0
    tail: float = 30.0


@dataclass
class Request:
    """One request as its client saw it; times in seconds after the load began."""

    arrival: float
    tokens: int
    times: list[float] = field(default_factory=list)
    done: bool = False


async def ask(port: int, request: Request, prompt: list[int], began: float) -> None:
    """Stream an answer, and note when its tokens came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        fields = dict(prompt=prompt, max_tokens=request.tokens, temperature=1, stream=True)
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the server answers {status.decode().strip()}")
        while data := await reader.read(1 << 16):
            now = time.perf_counter() - began
            ended = data.count(b"data: [DONE]")
            request.times += [now] * (data.count(b"data: ") - ended)
            request.done |= bool(ended)
    finally:
        writer.close()


async def offer(port: int, load: Load, seed: int) -> dict[str, Any]:
    """Put the load on the server; what the clients saw."""
    draw, began = random.Random(seed), time.perf_counter()
    requests: list[Request] = []
    tasks: set[asyncio.Task] = set()
    end = load.warm + load.window

    def now() -> float:
        return time.perf_counter() - began

    def arrive(arrival: float, share: float = 1.0) -> None:
        """A request, of whose answer a share is still to come."""
        prompt, answer = draw.randint(*load.prompt), draw.randint(*load.answer)
        left = max(int(answer * share), 1)
        tokens = [draw.randrange(load.vocabulary) for _ in range(prompt + answer - left)]
        requests.append(Request(arrival, left))
        task = asyncio.create_task(ask(port, requests[-1], tokens, began))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    if load.concurrent:
        while now() < end:
            while len(tasks) < load.concurrent:
                # The first ones stand anywhere in their answers, as they would after a while.
                arrive(now(), draw.random() if len(requests) < load.concurrent else 1.0)
            done, _ = await asyncio.wait(tasks, timeout=end - now(), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        window = [t for r in requests for t in r.times if load.warm <= t < end]
        result: dict[str, Any] = dict(tokens_per_s=len(window) / load.window)
    else:
        arrival, failures = 0.0, []
        while True:
            arrival += draw.expovariate(load.rate)
            measured = [r for r in requests if load.warm <= r.arrival < end]
            if (now() > end and all(r.done for r in measured)) or now() > end + load.tail:
                break
            if (pause := arrival - now()) > 0:
                await asyncio.sleep(pause)
            arrive(arrival)
            failures += [t.exception() for t in list(tasks) if t.done() and t.exception()]
            if failures:
                raise failures[0]
        result = seen_by(measured, now())
    result["state"] = await asyncio.to_thread(state, port)
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return result


def seen_by(measured: list[Request], stopped: float) -> dict[str, Any]:
    latency = [((r.times[-1] if r.done else stopped) - r.arrival) / r.tokens * 1e3 for r in measured]
    first = [((r.times[0] if r.times else stopped) - r.arrival) * 1e3 for r in measured]
    gaps = [(b - a) * 1e3 for r in measured for a, b in zip(r.times, r.times[1:], strict=False)]
    found: dict[str, Any] = dict(requests=len(measured), unfinished=sum(not r.done for r in measured))
    for name, values in (("latency", latency), ("ttft", first), ("gap", gaps)):
        ordered = sorted(values) or [float("nan")]
        for share in (50, 95, 99):
            found[f"{name}_p{share}_ms"] = ordered[min(len(ordered) * share // 100, len(ordered) - 1)]
    return found


def clients(port: int, load: Load, seed: int) -> dict[str, Any]:
    """In the process of the clients: the load, and then until the server has nothing left to do."""
    result = asyncio.run(offer(port, load, seed))
    for _ in range(600):
        time.sleep(0.6)
        if state(port)["running_requests"] == state(port)["waiting_requests"] == 0:
            return result
    raise RuntimeError("the server did not become idle")


def state(port: int) -> dict[str, float]:
    """What the server tells of its engine."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if line.startswith("megatron_dmc_")]
    return {name.removeprefix("megatron_dmc_"): float(value) for name, value in lines if "{" not in name}


@contextlib.contextmanager
def served(shape: Any, compression: int, spec: str, slots: int) -> Iterator[int]:
    """The port of a server over a random model."""
    import torch
    from megatron.core.inference import inference_client
    from megatron.core.inference.apis import MegatronAsyncLLM, _llm_base

    from benchmarks.engines import BLOCK, Numbers, VanillaAttention, VanillaController, VanillaEngine, random_model
    from megatron_dmc.checkpoint import LoadedModel
    from megatron_dmc.commands.serve import end_engine
    from megatron_dmc.front_end import EngineAddress, FrontEnd, listen
    from megatron_dmc.llm import AsyncLLM, inference_config
    from megatron_dmc.messages import StreamingClient
    from megatron_dmc.openai_requests import ServerOptions
    from megatron_dmc.serving_engine import Streaming

    class StreamingVanilla(Streaming, VanillaEngine):
        def cancel(self, request_id: int) -> None:
            if request_id in self.requests and request_id not in self.waiting_request_ids:
                self.stop_word_finished_request_ids.add(request_id)
            elif request_id in self.requests:
                self.get_request(request_id).sampling_params.num_tokens_to_generate = 1

    def vanilla_controller(wrapper: Any = None, tokenizer: Any = None, **named: Any) -> VanillaController:
        wrapper = wrapper or named["inference_wrapped_model"]
        controller = VanillaController(wrapper, tokenizer)
        controller.attention = VanillaAttention(wrapper.inference_context, shape)
        scope.enter_context(controller.attention.in_place())
        return controller

    model, _ = random_model(shape, compression, spec)
    tokenizer = Numbers(shape.vocabulary)
    settings = dict(max_sequence_length=shape.context, cache_gib=shape.cache_gib, max_requests=slots)
    with contextlib.ExitStack() as scope, torch.no_grad():
        if compression > 1:
            args = Namespace(position_embedding_type="rope", max_position_embeddings=shape.context)
            loaded = LoadedModel(model, tokenizer, args, None)
            llm = AsyncLLM(loaded, coordinator_host="127.0.0.1", max_step_tokens=2048 + slots, **settings)
        else:
            scope.enter_context(mock.patch.object(inference_client, "InferenceClient", StreamingClient))
            with mock.patch.multiple(
                _llm_base, TextGenerationController=vanilla_controller, DynamicInferenceEngine=StreamingVanilla
            ):
                config = inference_config(
                    max_step_tokens=2048 + slots, block_size_tokens=BLOCK,
                    use_cuda_graphs_for_non_decode_steps=False, **settings,
                )  # fmt: skip
                llm = MegatronAsyncLLM(
                    model=model, tokenizer=tokenizer, inference_config=config, coordinator_host="127.0.0.1"
                )
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        with FrontEnd(listener, ServerOptions("random", max_concurrent=1 << 16)) as front_end:
            front_end.open(EngineAddress.of(llm))
            try:
                ready(port)
                yield port
            finally:
                front_end.end()
                front_end.process.join()
                asyncio.run(end_engine(llm))


def ready(port: int) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server did not become ready")


def measure(port: int, load: Load, shares: list[float], concurrent: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Capacity, and latencies at shares of it."""
    answer = sum(load.answer) / 2
    full = pool.submit(clients, port, load._replace(concurrent=concurrent), 0).result()
    capacity = full["tokens_per_s"] / answer
    print("capacity", {k: v for k, v in full.items() if k != "state"}, capacity, flush=True)
    points = []
    for seed, share in enumerate(shares, 1):
        point = pool.submit(clients, port, load._replace(rate=share * capacity), seed).result()
        points.append(dict(rate=share * capacity, **point))
        print({k: round(v, 3) for k, v in points[-1].items() if k != "state"}, flush=True)
    return dict(capacity=capacity, tokens_per_s=full["tokens_per_s"], full_state=full["state"], points=points)


def rate_at(way: dict[str, Any], milliseconds: float) -> float:
    """The highest rate whose 95th percentile of latency is at most so much."""
    points = sorted((p["rate"], p["latency_p95_ms"]) for p in way["points"])
    best = 0.0
    for (rate, latency), after in zip(points, [*points[1:], None], strict=True):
        if latency > milliseconds:
            break
        best = rate
        if after is not None and after[1] > milliseconds:
            best += (after[0] - rate) * (milliseconds - latency) / (after[1] - latency)
    return min(best, way["capacity"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/serving.json")
    parser.add_argument("--shape", choices=["llama2_7b", "tiny"], default="llama2_7b")
    parser.add_argument("--spec", choices=["transformer_engine", "local"], default="transformer_engine")
    parser.add_argument("--compression", type=int, action="append", help="with 1 for vanilla (default: 1 and 8)")
    parser.add_argument("--share", type=float, action="append", help="of the capacity (default: .7 .85 1)")
    parser.add_argument("--latency", type=float, default=25.0, help="milliseconds per token to compare rates at")
    parser.add_argument("--warm", type=float, default=10.0)
    parser.add_argument("--window", type=float, default=20.0)
    parser.add_argument("--commit", help="to note where the checkout has no history")
    args = parser.parse_args()

    from benchmarks.common import attempt, circumstances, save, table
    from benchmarks.engines import Shape, megatron_for_benchmarks

    megatron_for_benchmarks()
    if args.shape == "tiny":
        shape, slots = Shape(64, 2, 64, 96, 4, 2, 128, 0.001), 12
        load = Load((4, 20), (8, 24), shape.vocabulary, warm=args.warm, window=args.window)
    else:
        shape, slots = Shape(4096, 32, 4096, 11008, 32, 32, 32000, 16.0), 256
        load = Load((512, 1536), (768, 1280), shape.vocabulary, warm=args.warm, window=args.window)
    shares, failures = args.share or [0.7, 0.85, 1.0], {}
    ways: dict[str, Any] = {}
    result = dict(
        circumstances(args.commit), spec=args.spec, shapes={args.shape: dict(shape=shape._asdict(), ways=ways)},
        load=load._asdict(), slots=slots, latency_ms=args.latency, ratios={args.shape: {}}, failures=failures,
    )  # fmt: skip
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for compression in args.compression or [1, 8]:

            def way(compression: int = compression) -> dict[str, Any]:
                with served(shape, compression, args.spec, slots) as port:
                    return measure(port, load, shares, slots + slots // 4, pool)

            found = attempt(f"{compression}x", way, failures)
            gc.collect()
            if found is None:
                continue
            found["rate_at"] = rate_at(found, args.latency)
            ways[str(compression)] = found
            if compression > 1 and "1" in ways:
                ratios = result["ratios"][args.shape][str(compression)] = {}
                if ways["1"]["rate_at"]:
                    ratios["request_rate_over_vanilla"] = found["rate_at"] / ways["1"]["rate_at"]
                ratios["capacity_over_vanilla"] = found["capacity"] / ways["1"]["capacity"]
            columns = [
                "rate",
                "requests",
                "unfinished",
                "latency_p50_ms",
                "latency_p95_ms",
                "ttft_p95_ms",
                "gap_p95_ms",
            ]
            print(f"{compression}x", table(found["points"], columns), result["ratios"], sep="\n", flush=True)
            save(result, args.out)
    for case, reason in failures.items():
        print(f"failed: {case}: {reason}")


if __name__ == "__main__":
    main()
