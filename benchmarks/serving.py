"""Latency over request rate: a Poisson load against the HTTP server, vanilla and DMC, in the same memory.

    python benchmarks/serving.py [--out benchmarks/results/serving-h100.json]

The whole of `megatron-dmc serve`: engine, coordinator, HTTP server, and a process of clients that stream their answers.
Models have random weights and Transformer Engine layers; DMC's decision offset is the quantile at which a share
1 - 1/compression of a random text's tokens merges, and answers are drawn at temperature 1, so that they are random text
as well (the ratio that the server told is in the result). Vanilla has the same server and engine with Megatron's own
context and `VanillaAttention` for attention; FlashInfer plans anew where a sequence enters a block, comes or goes, and
what that takes of the host is in the result (`plan_ms`, for each step). With as many GPUs as ways, each has one of its
own, at the same time; else one way follows the other.

Requests arrive at random (Poisson), the same ones at every rate; lengths of prompts and answers are uniform in a range.
`warm` seconds after the first one, those that arrive are measured, `requests` of them or as many as arrive in a minute;
the load goes on until the last one of them has ended.

- latency: milliseconds per token of an answer, from the request's arrival to its end, waiting included.
- ttft: milliseconds from arrival to the first token; gap: between two tokens.

A rate is held if 95% of the measured requests have at most `latency_ms` milliseconds per token. From a first guess, the
rate goes up by a tenth until one is not held (or down until one is), and then halves what is between, as long as
`seconds` last. A point ends early once too many requests are certain to be late (`late`).

held: the highest rate held; not_held: the lowest one not held. `request_rate_over_vanilla` compares what was held, and
`request_rate_over_vanilla_at_least` what DMC held with what vanilla did not.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
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
    """What the clients ask for, and what is measured; lengths in tokens, times in seconds.

    `rate` requests per second, of which `requests` are measured, those that arrive after `warm`.
    """

    prompt: tuple[int, int]
    answer: tuple[int, int]
    vocabulary: int
    warm: float
    latency_ms: float
    rate: float = 0.0
    requests: int = 0


@dataclass
class Request:
    """One request as its client saw it; times in seconds after the load began."""

    arrival: float
    tokens: int
    times: list[float] = field(default_factory=list)
    done: bool = False

    def latency(self, now: float) -> float:
        """Milliseconds per token; of a request that has not ended, what it will have at least."""
        return ((self.times[-1] if self.done else now) - self.arrival) / self.tokens * 1e3


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


async def offer(port: int, load: Load) -> dict[str, Any]:
    """Put the load on the server; what the clients saw."""
    draw, began = random.Random(0), time.perf_counter()
    requests: list[Request] = []
    tasks: set[asyncio.Task] = set()
    arrival = 0.0
    while True:
        arrival += draw.expovariate(load.rate)
        prompt, answer = draw.randint(*load.prompt), draw.randint(*load.answer)
        tokens = [draw.randrange(load.vocabulary) for _ in range(prompt)]
        if (pause := arrival - (time.perf_counter() - began)) > 0:
            await asyncio.sleep(pause)
        requests.append(Request(arrival, answer))
        task = asyncio.create_task(ask(port, requests[-1], tokens, began))
        tasks.add(task)
        for task in [task for task in tasks if task.done()]:
            tasks.remove(task)
            task.result()
        now = time.perf_counter() - began
        measured = [r for r in requests if r.arrival >= load.warm][: load.requests]
        late = sum(r.latency(now) > load.latency_ms for r in measured)
        if late > 0.05 * load.requests or (len(measured) == load.requests and all(r.done for r in measured)):
            break
    result = seen_by(measured, now)
    result["late"], result["held"] = late, late <= 0.05 * load.requests
    result["state"] = await asyncio.to_thread(state, port)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return result


def seen_by(measured: list[Request], stopped: float) -> dict[str, Any]:
    latency = [r.latency(stopped) for r in measured]
    first = [((r.times[0] if r.times else stopped) - r.arrival) * 1e3 for r in measured]
    gaps = [(b - a) * 1e3 for r in measured for a, b in zip(r.times, r.times[1:], strict=False)]
    found: dict[str, Any] = dict(requests=len(measured), unfinished=sum(not r.done for r in measured))
    for name, values in (("latency", latency), ("ttft", first), ("gap", gaps)):
        ordered = sorted(values) or [float("nan")]
        for share in (50, 95, 99):
            found[f"{name}_p{share}_ms"] = ordered[max(math.ceil(len(ordered) * share / 100) - 1, 0)]
    return found


def clients(port: int, load: Load) -> dict[str, Any]:
    """In the process of the clients: the load, and then until the server has nothing left to do."""
    result = asyncio.run(offer(port, load))
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
def served(shape: Any, compression: int, spec: str, slots: int) -> Iterator[tuple[int, Any]]:
    """A server over a random model: its port, and vanilla's attention or `None`."""
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
        attentions.append(controller.attention)
        return controller

    model, _ = random_model(shape, compression, spec)
    tokenizer = Numbers(shape.vocabulary)
    attentions: list[Any] = []
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
                yield port, attentions[0] if attentions else None
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


def measure(
    shape: Any, compression: int, spec: str, slots: int, load: Load, rate: float, seconds: float
) -> dict[str, Any]:
    """Points, from a first rate on, and between which two the limit lies. In a process of its own."""
    import torch

    from benchmarks.engines import megatron_for_benchmarks

    megatron_for_benchmarks()
    points: list[dict[str, Any]] = []
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        served(shape, compression, spec, slots) as (port, attention),
    ):
        began, longest = time.perf_counter(), 0.0
        while (begun := time.perf_counter()) - began + longest < seconds:
            offered = load._replace(rate=rate, requests=max(load.requests, round(rate * 60)))
            before = attention.planned if attention else (0, 0.0)
            point = dict(rate=rate, **pool.submit(clients, port, offered).result())
            if attention:
                plans, took = (b - a for a, b in zip(before, attention.planned, strict=True))
                point["plan_ms"] = took / max(plans, 1) * 1e3
            points.append(point)
            longest = max(longest, time.perf_counter() - begun)
            print(f"{compression}x", {k: v for k, v in point.items() if k != "state"}, flush=True)
            held, not_held = between(points)
            if not_held is None:
                rate = held * 1.1
            elif held is None:
                rate = not_held / 1.1
            elif not_held <= 1.03 * held:
                break
            else:
                rate = (held + not_held) / 2
    held, not_held = between(points)
    return dict(gpu=torch.cuda.get_device_name(), held=held, not_held=not_held, points=points)


def between(points: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The lowest rate that was not held, and before it the highest one below that was."""
    not_held = min((p["rate"] for p in points if not p["held"]), default=None)
    held = [p["rate"] for p in points if p["held"] and (not_held is None or p["rate"] < not_held)]
    return max(held, default=None), not_held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/serving.json")
    parser.add_argument("--shape", choices=["llama2_7b", "tiny"], default="llama2_7b")
    parser.add_argument("--spec", choices=["transformer_engine", "local"], default="transformer_engine")
    parser.add_argument("--compression", type=int, action="append", help="with 1 for vanilla (default: 1 and 8)")
    parser.add_argument("--rate", type=float, action="append", help="the first one, for each (default: by compression)")
    parser.add_argument("--latency", type=float, default=25.0, help="milliseconds per token to hold (default: 25)")
    parser.add_argument("--requests", type=int, default=200, help="measured at each rate, at least (default: 200)")
    parser.add_argument("--warm", type=float, default=40.0, help="seconds before (default: 40)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for the points of a way (default: 3600)")
    parser.add_argument("--commit", help="to note where the checkout has no history")
    args = parser.parse_args()
    compressions = args.compression or [1, 8]
    rates = args.rate or [compression**0.8 for compression in compressions]
    if len(rates) != len(compressions):
        parser.error(f"--rate must be given once for each compression; got {len(rates)} for {len(compressions)}")

    import torch

    from benchmarks.common import attempt, circumstances, save, table
    from benchmarks.engines import Shape
    from megatron_dmc.cpu import emulate_cuda

    beside = torch.cuda.device_count() >= len(compressions)  # each way has a GPU
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    emulate_cuda()
    if args.shape == "tiny":
        shape, slots = Shape(64, 2, 64, 96, 4, 2, 128, 0.001), 12
        lengths = (4, 20), (8, 24)
    else:
        shape, slots = Shape(4096, 32, 4096, 11008, 32, 32, 32000, 16.0), 256
        lengths = (512, 1536), (768, 1280)
    load = Load(*lengths, shape.vocabulary, args.warm, args.latency, requests=args.requests)
    ways: dict[str, Any] = {}
    failures: dict[str, str] = {}
    ratios: dict[str, Any] = {args.shape: {}}
    result = dict(
        circumstances(args.commit), spec=args.spec, shapes={args.shape: dict(shape=shape._asdict(), ways=ways)},
        load=load._asdict(), slots=slots, side_by_side=beside, ratios=ratios, failures=failures,
    )  # fmt: skip
    columns = ["rate", "requests", "held", "latency_p50_ms", "latency_p95_ms", "ttft_p95_ms", "gap_p95_ms", "plan_ms"]
    with contextlib.ExitStack() as scope:
        running = {}
        for index, (compression, rate) in enumerate(zip(compressions, rates, strict=True)):
            with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": visible[index]} if beside else {}):
                pool = scope.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
                running[compression] = pool.submit(
                    measure, shape, compression, args.spec, slots, load, rate, args.seconds
                )
            if not beside:
                concurrent.futures.wait([running[compression]])
                pool.shutdown()  # and with it what its engine holds
        for compression, way in running.items():
            found = attempt(f"{compression}x", way.result, failures)
            if found is None:
                continue
            ways[str(compression)] = found
            if compression > 1 and (vanilla := ways.get("1")):
                ratios[args.shape][str(compression)] = {
                    f"request_rate_over_vanilla{suffix}": found["held"] / vanilla[name]
                    for suffix, name in (("", "held"), ("_at_least", "not_held"))
                    if found["held"] and vanilla[name]
                }
            print(f"{compression}x", table(sorted(found["points"], key=lambda p: p["rate"]), columns), sep="\n")
            print(ratios, flush=True)
            save(result, args.out)
    for case, reason in failures.items():
        print(f"failed: {case}: {reason}")


if __name__ == "__main__":
    main()
