"""Tokens per second of Megatron's dynamic engine: vanilla, and DMC at 2x, 4x and 8x, in the same memory.

    python benchmarks/throughput.py [--out benchmarks/results/throughput-h100.json]

One run on one GPU. The models have random weights, Transformer Engine layers and no checkpoint. Each way has a cache of
the same GiB and as many requests as fit into it at the shape's context. Vanilla is the same engine with Megatron's own
context, its cache in blocks of 256 tokens and FlashInfer's paged decoding for attention (Megatron calls FlashAttention,
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
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import attempt, circumstances, copy_bandwidth, fill_cache, save, table

BLOCK = 256
STEPS, WARM = 24, 4


class Shape(NamedTuple):
    context: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    cache_gib: float


SHAPES = {
    "llama2_7b_4096": Shape(4096, 32, 4096, 11008, 32, 32, 32000, 56.0),
    "llama3_8b_32768": Shape(32768, 32, 4096, 14336, 32, 8, 128256, 53.0),
    "tiny": Shape(64, 2, 64, 96, 4, 2, 128, 0.0007),
}
COMPRESSIONS = (2, 4, 8)


class Numbers:
    """A tokenizer that has nothing to do."""

    bos, eod = None, -1

    def __init__(self, vocabulary: int) -> None:
        self.vocab_size = vocabulary

    def detokenize(self, tokens: list[int]) -> str:
        return ""


def build(shape: Shape, dmc: Any | None, spec: str) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dmc.spec import dmc_layer_spec

    config = TransformerConfig(
        num_layers=shape.layers, hidden_size=shape.hidden, ffn_hidden_size=shape.ffn, num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads, attention_dropout=0.0, hidden_dropout=0.0, normalization="RMSNorm",
        add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False,
        gradient_accumulation_fusion=False, params_dtype=torch.bfloat16, bf16=True, pipeline_dtype=torch.bfloat16,
        transformer_impl=spec,
    )  # fmt: skip
    if dmc is not None:
        layers = dmc_layer_spec(config, dmc=dmc)
    elif spec == "local":
        layers = get_gpt_layer_local_spec(normalization="RMSNorm")
    else:
        layers = get_gpt_layer_with_transformer_engine_spec()
    model = GPTModel(
        config, layers, vocab_size=shape.vocabulary, max_sequence_length=shape.context,
        position_embedding_type="rope", rotary_base=500000, share_embeddings_and_output_weights=False,
    )  # fmt: skip
    return model.to(device="cuda", dtype=torch.bfloat16).eval()


@torch.no_grad()
def decision_offset(model: Any, shape: Shape, compression: int) -> float:
    """What a share 1 - 1/compression of decisions exceeds: of the last channels of keys, for random tokens."""
    group, channels = shape.heads // shape.kv_heads, shape.hidden // shape.heads
    seen: list[Tensor] = []

    def note(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0].unflatten(-1, (shape.kv_heads, group + 2, channels))[..., group, -1].float().flatten())

    hooks = [layer.self_attention.linear_qkv.register_forward_hook(note) for layer in model.decoder.layers]
    tokens = torch.randint(0, shape.vocabulary, (1, min(512, shape.context)), device="cuda")
    model(tokens, torch.arange(tokens.shape[1], device="cuda")[None], None, runtime_gather_output=True)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen)[:1_000_000].quantile(1 / compression).item()


def flashinfer_attention(context: Any, shape: Shape) -> Callable:
    """In place of `Attention.flash_decode_and_prefill`: FlashInfer for decoding, PyTorch's attention for one prompt."""
    from megatron.core.transformer.attention import Attention

    channels, state = shape.hidden // shape.heads, {}

    def plan() -> Any:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        n = context.total_request_count
        blocks = context.request_kv_block_counts[:n]
        starts = torch.nn.functional.pad(blocks.cumsum(0), (1, 0)).int()
        indices = torch.cat([context.request_to_kv_block_ids[i, : blocks[i]] for i in range(n)])
        last = (context.request_kv_length_offsets[:n] % BLOCK + 1).int()
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_cuda_graph=True,
            use_tensor_cores=shape.heads > shape.kv_heads, paged_kv_indptr_buffer=starts.cuda(),
            paged_kv_indices_buffer=indices.cuda(), paged_kv_last_page_len_buffer=last.cuda(),
        )  # fmt: skip
        wrapper.plan(
            starts, indices, last, shape.heads, shape.kv_heads, channels, BLOCK, q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )  # fmt: skip
        return wrapper

    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **options: Any) -> Tensor:
        *_, lengths, blocks, decoding = arguments[:7]
        if decoding and q.is_cuda:
            if self.layer_number == 1 and "wrapper" in state:  # the lengths of this step
                state["wrapper"]._paged_kv_last_page_len_buf.copy_((lengths - 1) % BLOCK + 1)
            return state["wrapper"].run(q.view(-1, shape.heads, channels), (k, v))[:, None]
        outputs, at = [], 0
        cumulated = arguments[2].tolist()
        for i, length in enumerate(lengths.tolist()):
            count = cumulated[i + 1] - cumulated[i]
            if not count:
                continue
            held = blocks[i][blocks[i] >= 0].long()
            keys, values = (x[held].flatten(0, 1)[:length] for x in (k, v))
            keys, values = (x.repeat_interleave(shape.heads // shape.kv_heads, 1) for x in (keys, values))
            query = q.view(-1, shape.heads, channels)[at : at + count]
            mask = dict(is_causal=True) if count == length else dict(attn_mask=causal_lower_right(count, length))
            found = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (query, keys, values)), **mask
            )
            outputs.append(found[0].transpose(0, 1))
            at += count
        output = torch.cat(outputs)
        pad = q.view(-1, shape.heads, channels).shape[0] - len(output)
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, pad))
        return output[:, None]

    attend.plan = lambda: state.update(wrapper=plan())
    return attend


class Way:
    """One engine, and how its requests come to stand at the context."""

    def __init__(self, model: Any, shape: Shape, requests: int, dmc: bool) -> None:
        from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
        from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
        from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

        from megatron_dmc.engine import DMCController, DMCInferenceContext, DMCInferenceEngine, WholeStepController
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
        controller = (DMCController if dmc else WholeStepController)(
            GPTInferenceWrapper(model, self.context), Numbers(shape.vocabulary)
        )
        if dmc:
            with mock.patch.object(DMCInferenceEngine, "create_cuda_graphs"):  # captured at first use
                self.engine = DMCInferenceEngine(controller, self.context)
        else:
            self.engine = DynamicInferenceEngine(controller, self.context)
        self.attention = None if dmc else flashinfer_attention(self.context, shape)

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
        if context.memory_buffer.is_cuda:
            self.attention.plan()


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
    from megatron.core.transformer import attention
    from megatron.core.transformer.attention import Attention

    from megatron_dmc.config import DMCConfig

    InferenceMode.unset_active()
    torch.cuda.reset_peak_memory_stats()
    dmc = compression > 1
    torch.manual_seed(0)
    offset = 0.0
    model = build(shape, DMCConfig(dmc_stage="retrofit", dmc_init_val=0.0) if dmc else None, spec)
    if dmc:
        offset = decision_offset(model, shape, compression)
        compressions = {layer.self_attention.core_attention.compression for layer in model.decoder.layers}
        for found in compressions:
            found.config = dataclasses.replace(found.config, dmc_init_val=offset)
    way = Way(model, shape, requests, dmc)
    patches = (
        mock.patch.object(attention, "HAVE_FA3", True),
        mock.patch.object(Attention, "flash_decode_and_prefill", way.attention or Attention.flash_decode_and_prefill),
    )
    with patches[0], patches[1], torch.no_grad():
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

    from megatron_dmc.checkpoint import start_megatron
    from megatron_dmc.cpu import emulate_cuda

    on_gpu = torch.cuda.is_available()
    emulate_cuda()
    if not on_gpu:
        from megatron.core.inference.contexts import dynamic_context

        dynamic_context.triton_append_key_value_cache = None
    start_megatron()
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
