"""What the benchmarks of whole engines share: models with random weights, and vanilla's attention and engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.transformer import attention
from megatron.core.transformer.attention import Attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_dmc.engine import DMCInferenceEngine, WholeStepController

BLOCK = 256


class Shape(NamedTuple):
    context: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    cache_gib: float


class Numbers:
    """A tokenizer that has little to do: text is numbers."""

    bos, eod = None, -1

    def __init__(self, vocabulary: int) -> None:
        self.vocab_size = vocabulary

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, tokens: list[int]) -> str:
        return "".join(f" {token}" for token in tokens)


def megatron_for_benchmarks() -> None:
    """Megatron in one process; on the CPU where there is no GPU, to try a benchmark out."""
    from megatron_dmc.checkpoint import start_megatron
    from megatron_dmc.cpu import emulate_cuda

    on_gpu = torch.cuda.is_available()
    emulate_cuda()
    if not on_gpu:
        from megatron.core.inference.contexts import dynamic_context

        dynamic_context.triton_append_key_value_cache = None
    start_megatron()


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


def random_model(shape: Shape, compression: int, spec: str) -> tuple[Any, float]:
    """A model, with DMC unless `compression` is 1, and the offset at which its decisions reach that.

    Its weights are random, the same in every call.
    """
    from megatron_dmc.config import DMCConfig

    torch.manual_seed(0)
    if compression == 1:
        return build(shape, None, spec), 0.0
    model = build(shape, DMCConfig(dmc_stage="retrofit", dmc_init_val=0.0), spec)
    offset = decision_offset(model, shape, compression)
    for found in {layer.self_attention.core_attention.compression for layer in model.decoder.layers}:
        found.offset = offset
    return model, offset


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


class VanillaAttention:
    """In place of `Attention.flash_decode_and_prefill`, which needs FlashAttention: FlashInfer for decoding, PyTorch's
    FlashAttention over gathered keys and values for prompts; on the CPU PyTorch's attention for all.

    Args:
        context: Megatron's `DynamicInferenceContext`.
        shape: of the model.

    Attributes:
        plans_once: the plan for decoding stays what it is, but for the lengths of sequences, which stay in their
            blocks. What planning costs the host is then left out of the times.
        planned: steps that were planned, and the seconds that it took of the host.
    """

    def __init__(self, context: Any, shape: Shape) -> None:
        self._context, self._shape = context, shape
        self._captured: dict[int, Any] = {}
        self._pages: dict[int | None, tuple[Tensor, Tensor]] = {}  # what each graph's plan is for
        self._wrapper = self._eager = self._prompts = None
        self._float_workspace: Tensor | None = None
        self.plans_once = False
        self.planned = 0, 0.0

    def plan_once(self) -> None:
        """From the next step on, see `plans_once`."""
        self.plans_once = True
        self._pages.clear()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While this is open, Megatron's attention is this one."""
        with (
            mock.patch.object(attention, "HAVE_FA3", True),
            mock.patch.object(Attention, "flash_decode_and_prefill", lambda layer, *given, **_: self._attend(*given)),
        ):
            yield

    def plan(self, padded: int, captured: bool) -> None:
        """For the coming step, of `padded` decoding rows if it is `captured`."""
        context = self._context
        first = context.paused_request_count
        rows = context.total_request_count - first
        decoding = rows - context.num_prefill_requests
        held = context.request_kv_length_offsets[first:][:rows].long()
        new = context.request_query_lengths[first:][:rows].long()
        blocks = context.request_to_kv_block_ids[first:][:rows].clamp(min=0)
        self._prompts = None
        if decoding < rows:
            self._plan_prompts(held[decoding:], new[decoding:], blocks[decoding:], decoding)
        if decoding:
            if captured and padded not in self._captured:
                self._captured[padded] = self._decoder(padded)
            self._wrapper = self._captured[padded] if captured else self._decoder(None)
            lengths = torch.ones(padded if captured else decoding, dtype=torch.long)
            lengths[:decoding] = held[:decoding] + 1
            if self.plans_once and captured and padded in self._pages:
                self._set_last_pages(lengths)
            else:
                self._plan_decoding(lengths, blocks[:decoding], padded if captured else None)

    def _decoder(self, rows: int | None) -> Any:
        """For a CUDA graph of so many rows, or any."""
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        if self._float_workspace is None:
            self._float_workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        fixed: dict[str, Any] = {}
        if rows is not None:
            blocks = self._context.kv_block_allocator.total_count
            buffers = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in (rows + 1, blocks + rows, rows)]
            names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
            fixed = dict(use_cuda_graph=True, **dict(zip(names, buffers, strict=True)))
        elif self._eager is not None:
            return self._eager
        tensor_cores = self._shape.heads > self._shape.kv_heads
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._float_workspace, "NHD", use_tensor_cores=tensor_cores, **fixed
        )
        if rows is None:
            self._eager = wrapper
        return wrapper

    def _set_last_pages(self, lengths: Tensor) -> None:
        self._wrapper._paged_kv_last_page_len_buf.copy_((lengths - 1) % BLOCK + 1, non_blocking=True)

    def _plan_decoding(self, lengths: Tensor, blocks: Tensor, captured: int | None) -> None:
        """A plan for `lengths`; for the graph of so many rows, it stays while their pages are the same."""
        shape = self._shape
        counts = (lengths + BLOCK - 1) // BLOCK
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        table = torch.zeros(len(lengths), int(counts.max()), dtype=torch.int32)
        table[: len(blocks)] = blocks[:, : table.shape[1]]
        indices = table[torch.arange(table.shape[1]) < counts[:, None]]
        before, pages = self._pages.get(captured), (starts, indices)
        if before is not None and all(map(torch.equal, before, pages)):
            self._set_last_pages(lengths)
            return
        if captured is not None:
            self._pages[captured] = pages
        last = ((lengths - 1) % BLOCK + 1).int()
        self._wrapper.plan(
            starts, indices, last, shape.heads, shape.kv_heads, shape.hidden // shape.heads, BLOCK,
            q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip

    def _plan_prompts(self, held: Tensor, new: Tensor, blocks: Tensor, decoding: int) -> None:
        """Where the keys of prompts lie, and how long they are."""
        lengths = held + new
        place = torch.arange(int(lengths.max())).expand(len(lengths), -1)
        flat = blocks.gather(1, place // BLOCK) * BLOCK + place % BLOCK
        keys = flat[place < lengths[:, None]].cuda()
        ends = [torch.nn.functional.pad(x.cumsum(0), (1, 0)).int().cuda() for x in (new, lengths)]
        self._prompts = keys, *ends, int(new.max()), int(lengths.max()), slice(decoding, decoding + int(new.sum()))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if not q.is_cuda:
            return self._on_cpu(q, k, v, *arguments)
        query = q.view(-1, self._shape.heads, q.shape[-1])
        if self._prompts is None:
            return self._wrapper.run(query, (k, v))[:, None]
        keys, query_ends, key_ends, most_queries, most_keys, rows = self._prompts
        output = torch.zeros_like(query)
        if rows.start:
            output[: rows.start] = self._wrapper.run(query[: rows.start], (k, v))
        k, v = (x.flatten(0, 1)[keys] for x in (k, v))
        output[rows] = varlen_attn(
            query[rows], k, v, query_ends, key_ends, most_queries, most_keys, window_size=(-1, 0)
        )
        return output[:, None]

    def _on_cpu(self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
        _, _, ends, _, lengths, table, _ = arguments
        query, group = q.view(-1, self._shape.heads, q.shape[-1]), self._shape.heads // self._shape.kv_heads
        output = torch.zeros_like(query)
        for row, (begin, end, length) in enumerate(
            zip(ends.tolist(), ends[1:].tolist(), lengths.tolist(), strict=False)
        ):
            held = table[row][table[row] >= 0].long()
            keys, values = (x[held].flatten(0, 1)[:length].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            if begin < end:
                output[begin:end] = torch.nn.functional.scaled_dot_product_attention(
                    query[begin:end].transpose(0, 1), keys, values, attn_mask=causal_lower_right(end - begin, length)
                ).transpose(0, 1)
        return output[:, None]


class VanillaController(WholeStepController):
    """A step of decoding is one CUDA graph, and FlashInfer plans before each.

    Attributes:
        attention: the `VanillaAttention` to plan for.
    """

    attention: VanillaAttention

    def _dynamic_step_forward_logits(self, input_ids: Tensor, position_ids: Tensor) -> None:
        if input_ids.is_cuda:
            began = time.perf_counter()
            captured = self.captures and self.inference_wrapped_model.inference_context.using_cuda_graph_this_step()
            self.attention.plan(input_ids.shape[1], captured)
            steps, seconds = self.attention.planned
            self.attention.planned = steps + 1, seconds + time.perf_counter() - began
        super()._dynamic_step_forward_logits(input_ids, position_ids)


class VanillaEngine(DynamicInferenceEngine):
    """Megatron's, with whole-step CUDA graphs."""

    create_cuda_graphs = DMCInferenceEngine.create_cuda_graphs
