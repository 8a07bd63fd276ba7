"""Tokens per second of Megatron's dynamic engine: vanilla, and DMC at 2x, 4x and 8x, in the same memory.

    python benchmarks/throughput.py [--out benchmarks/results/throughput-h100.json]

One run on one GPU. The models have random weights, Transformer Engine layers and no checkpoint. Each way has a cache of
the same GiB and as many requests as fit into it at the shape's context. Vanilla is the same engine with Megatron's own
context, its cache in blocks of 256 tokens, and FlashInfer for attention in decoding (Megatron calls FlashAttention,
which has no binaries for every platform; FlashInfer's plan is made once and left out of all times). For both, a step of
decoding is one CUDA graph (`WholeStepController`); Megatron's own are captured layer by layer.

Prompts are not run through the model for the measured steps: the state of requests at the context is set, the cache
filled with random numbers (for DMC, heads of one sequence 0.25 to 1.75 times as long as their mean). DMC's decision
offset is the quantile of the random model's decisions at which a share 1 - 1/compression merges.

- tokens_per_s: requests over step_ms, the median time from one step's end to the next (the whole of `engine.step`).
- device_ms: the graph alone. host_ms: the rest of the step.
- equal: DMC with as many requests as vanilla had.
- ttft_ms: from a request to its first token, for one prompt of the context's length on an empty engine (--ttft).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import attempt, circumstances, copy_bandwidth, fill_cache, save, table
from benchmarks.engines import (
    BLOCK,
    Numbers,
    Shape,
    VanillaAttention,
    VanillaController,
    VanillaEngine,
    megatron_for_benchmarks,
    random_model,
)

STEPS, WARM = 24, 4

SHAPES = {
    "llama2_7b_4096": Shape(4096, 32, 4096, 11008, 32, 32, 32000, 56.0),
    "llama3_8b_32768": Shape(32768, 32, 4096, 14336, 32, 8, 128256, 53.0),
    "tiny": Shape(64, 2, 64, 96, 4, 2, 128, 0.0007),
}
COMPRESSIONS = (2, 4, 8)


class Way:
    """One engine, and how its requests come to stand at the context."""

    def __init__(self, model: Any, shape: Shape, requests: int, dmc: bool) -> None:
        from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
        from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

        from megatron_dmc.engine import DMCController, DMCInferenceContext, DMCInferenceEngine
        from megatron_dmc.llm import inference_config

        config = inference_config(
            max_sequence_length=shape.context, cache_gib=shape.cache_gib, max_requests=requests,
            max_step_tokens=max(shape.context, 2 * requests), cuda_graphs=1, block_size_tokens=BLOCK,
            use_cuda_graphs_for_non_decode_steps=False,
        )  # fmt: skip
        self.shape, self.requests, self.dmc = shape, requests, dmc
        if dmc:
            self.context = DMCInferenceContext(model, config)
        else:
            self.context = DynamicInferenceContext(model.config, config)
        controller = (DMCController if dmc else VanillaController)(
            GPTInferenceWrapper(model, self.context), Numbers(shape.vocabulary)
        )
        self.attention = None if dmc else VanillaAttention(self.context, shape)
        controller.attention = self.attention
        # A step of decoding is captured when it first runs.
        with mock.patch.object(DMCInferenceEngine if dmc else VanillaEngine, "create_cuda_graphs"):
            self.engine = (DMCInferenceEngine if dmc else VanillaEngine)(controller, self.context)

    def add(self, tokens: int, generate: int) -> None:
        from megatron.core.inference.sampling_params import SamplingParams

        prompt = torch.randint(0, self.shape.vocabulary, (tokens,)).tolist()
        params = SamplingParams(top_k=1, num_tokens_to_generate=generate, termination_id=-1)
        self.engine.add_request(int(next(self.engine.request_counter)), prompt, params)

    def step(self) -> None:
        self.engine.step_modern()

    def stand_at(self, tokens: int, compression: int) -> None:
        """All requests, of two tokens each so far, have seen `tokens`, and `STEPS + WARM` more are to come."""
        context, n = self.context, self.requests
        context.request_kv_length_offsets[:n] = tokens
        context.request_output_lengths[:n] = tokens + STEPS + WARM + 2
        context.token_to_pos_ids[:n] = context.token_to_position_in_request[:n] = tokens
        if self.dmc:
            kv_heads, layers = self.shape.kv_heads, self.shape.layers
            spread = torch.linspace(0.25, 1.75, layers * kv_heads) * tokens / compression
            order = torch.stack([torch.randperm(layers * kv_heads) for _ in range(n)], 1)
            entries = spread[order].round().long().clamp(min=1, max=tokens).view(layers, kv_heads, n).transpose(1, 2)
            fill_cache(context.cache, entries.contiguous(), torch.full((n,), tokens))
            return
        context.memory_buffer.normal_()
        blocks = tokens // BLOCK + 1
        for row in range(n):
            more = blocks - int(context.request_kv_block_counts[row])
            at = blocks - more
            context.request_to_kv_block_ids[row, at:blocks] = context.kv_block_allocator.allocate_memory_blocks(more)
        context.request_kv_block_counts[:n] = blocks
        context.request_last_kv_block_id[:n] = context.request_to_kv_block_ids[:n, blocks - 1]
        context.request_last_kv_block_offset[:n] = tokens % BLOCK
        context.token_to_block_idx[:n] = context.request_last_kv_block_id[:n]
        context.token_to_local_position_within_kv_block[:n] = tokens % BLOCK
        self.attention.plan_once()


def measure(way: Way, compression: int) -> dict[str, float]:
    """Steps of all requests at the context."""
    # Away from a block's end: a vanilla request that fills one takes another.
    tokens = (way.shape.context - STEPS - WARM - 4) // 8 * 8 - 8
    for _ in range(way.requests):
        way.add(2, STEPS + WARM + 8)
    while way.engine.waiting_request_ids or way.context.num_prefill_requests:
        way.step()
    way.stand_at(tokens, compression)
    times, device = [], []
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    launch = way.engine.controller._dynamic_step_forward_logits

    def timed(*arguments: Any) -> None:
        start.record()
        launch(*arguments)
        stop.record()

    way.engine.controller._dynamic_step_forward_logits = timed
    for _ in range(STEPS + WARM):
        begun = time.perf_counter()
        way.step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e3)
        device.append(start.elapsed_time(stop))
    step, graph = statistics.median(times[WARM:]), statistics.median(device[WARM:])
    if way.context.total_request_count != way.requests or way.context.step_count < STEPS:
        raise RuntimeError(f"{way.context.total_request_count} of {way.requests} requests ran to the end")
    row = dict(
        requests=way.requests, tokens_per_s=way.requests / step * 1e3, step_ms=step, device_ms=graph,
        host_ms=step - graph, captured=bool(way.engine.controller._graphs),
        memory_gib=torch.cuda.max_memory_allocated() / 2**30,
    )  # fmt: skip
    if way.dmc:
        account = way.context.account
        row |= dict(
            ratio=sum(account.tokens) / sum(account.entries), pages_free=account.free / way.context.pages_by_head
        )
    return row


def first_token(way: Way) -> float:
    """Milliseconds to the first token of one prompt; the median of three after one."""
    times = []
    for _ in range(4):
        way.add(way.shape.context - 2, 1)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        while way.engine.has_unfinished_requests():
            way.step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times[1:])


def most_requests(shape: Shape, compression: int) -> int:
    """Requests at the context whose entries fit, each head's last page half used, with their open segments."""
    from megatron_dmc.cache import CacheShape, PagedCache
    from megatron_dmc.config import DMCError

    channels = shape.hidden // shape.heads
    if compression == 1:
        token = 2 * 2 * shape.layers * shape.kv_heads * channels
        blocks = int(shape.cache_gib * 2**30) // (token * BLOCK) - 1
        return blocks // -(-shape.context // BLOCK)
    best = 0
    for requests in range(1, 4096):
        cache = CacheShape(shape.layers, requests, shape.heads, shape.kv_heads, channels, shape.context, 12)
        try:
            pages = PagedCache.pages_in(cache, torch.bfloat16, gib=shape.cache_gib)
        except DMCError:
            break
        head = shape.context / compression / cache.page_entries + 0.55 + 0.05  # 0.05: what the steps take
        if pages < requests * shape.layers * shape.kv_heads * head:
            break
        best = requests
    return best


def run(shape: Shape, compression: int, requests: int, spec: str, ttft: bool) -> dict[str, float]:
    from megatron.core.inference.utils import InferenceMode

    InferenceMode.unset_active()
    torch.cuda.reset_peak_memory_stats()
    model, offset = random_model(shape, compression, spec)
    way = Way(model, shape, requests, compression > 1)
    with way.attention.in_place() if way.attention else nullcontext(), torch.no_grad():
        row = dict(compression=compression, offset=offset, ttft_ms=first_token(way) if ttft else None)
        return row | measure(way, compression)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/throughput.json")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only these (default: all but tiny)")
    parser.add_argument("--spec", choices=["transformer_engine", "local"], default="transformer_engine")
    parser.add_argument("--ttft", action="store_true", help="measure times to first tokens as well")
    parser.add_argument("--commit", help="to note where the checkout has no history")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    megatron_for_benchmarks()
    failures: dict[str, str] = {}
    result = dict(
        circumstances(args.commit), spec=args.spec, steps=STEPS, shapes={}, ratios={}, failures=failures,
        copy_tb_per_s=copy_bandwidth() / 1e12 if on_gpu else None,
    )  # fmt: skip
    for name in args.shape or [n for n in SHAPES if n != "tiny"]:
        shape = SHAPES[name]
        rows, ratios = [], {}
        vanilla = None
        most = {c: most_requests(shape, c) for c in (1, *COMPRESSIONS)}
        cases = [(1, most[1], "most")]
        cases += [(c, n, label) for c in COMPRESSIONS for n, label in ((most[c], "most"), (most[1], "equal"))]
        for compression, requests, label in cases:
            case = partial(run, shape, compression, requests, args.spec, args.ttft and label == "most")
            row = attempt(f"{name}, {compression}x, {label}", case, failures)
            gc.collect()
            torch.cuda.empty_cache()
            if row is None:
                continue
            print(name, label, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            rows.append(dict(label=label, **row))
            if compression == 1:
                vanilla = row
            elif vanilla is not None:
                found = ratios.setdefault(str(compression), {})
                if label == "most":
                    found["throughput_over_vanilla"] = row["tokens_per_s"] / vanilla["tokens_per_s"]
                    if row["ttft_ms"]:
                        found["ttft_over_vanilla"] = row["ttft_ms"] / vanilla["ttft_ms"]
                else:
                    found["step_over_vanilla"] = row["step_ms"] / vanilla["step_ms"]
                    found["host_beyond_vanilla"] = (row["host_ms"] - vanilla["host_ms"]) / row["step_ms"]
        result["shapes"][name] = dict(shape=shape._asdict(), ways=rows)
        result["ratios"][name] = ratios
        columns = [
            "compression",
            "label",
            "requests",
            "tokens_per_s",
            "step_ms",
            "device_ms",
            "host_ms",
            "ttft_ms",
            "ratio",
        ]
        print(table(rows, columns), ratios, sep="\n", flush=True)
        save(result, args.out)
    for case, reason in failures.items():
        print(f"failed: {case}: {reason}")


if __name__ == "__main__":
    main()
