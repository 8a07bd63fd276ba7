"""Megatron's self-attention with DMC: where queries, keys and values of a layer meet decisions, merging and the cache.

`DMCSelfAttention` is Megatron's `SelfAttention`, whose `forward` it reuses: QKV projection, QK-norm, output gate,
recomputation, offloading and output projection are Megatron's. Two things differ. The base class is given no rotary
embedding, since a merge needs unrotated keys; and the core attention is `DMCCoreAttention`, which decides, merges,
rotates and attends (`megatron_dmc.ops.reference`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from megatron_dmc.cache import PagedCache
from megatron_dmc.compression import Compression
from megatron_dmc.config import DMCError
from megatron_dmc.context import HoldsPages
from megatron_dmc.context_parallel import all_tokens, gather, own_chunks, own_tokens
from megatron_dmc.ops.chunks import dmc_attention_of_chunks, zero_out_attention_of_chunks
from megatron_dmc.ops.documents import Documents
from megatron_dmc.ops.fused import choose_kernel, dmc_attention, zero_out_attention
from megatron_dmc.ops.noise import LogisticNoise
from megatron_dmc.ops.paged import choose_paged_kernel, paged_attention
from megatron_dmc.ops.reference import DMCCache, Rotary, dmc_attention_cached


@dataclass
class DMCCall:
    """What one forward pass of a layer needs beside queries, keys and values.

    It travels as the base class's `attention_bias`, which every path, recomputation included, hands through to the
    core attention untouched, and for which DMC has no other use.

    Attributes:
        rotary: `(cos, sin)` for the tokens of this pass, with a paged cache for all positions; or `None`.
        documents: packed into the sequences, of all tokens whatever the context parallelism; or `None`.
        cache: the layer's contiguous cache under Megatron's static context, else `None`.
        paged: the paged cache and the step under way, else `None`.
    """

    rotary: Rotary | None
    documents: Documents | None = None
    cache: DMCCache | None = None
    paged: HoldsPages | None = None


class DMCCoreAttention(MegatronModule):
    """Decisions, merging, rotation and attention of one layer.

    In training, soft decisions with noise or hard ones, by the step (`Compression.hard`); in evaluation, hard ones;
    with a cache, hard ones against its entries.

    Args:
        config, layer_number: as for any core attention of Megatron; `layer_number` counts from 1.
        compression: the model's schedule and loss.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        compression: Compression,
        pg_collection: Any,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        **_: Any,  # mask type and attention type: always causal self-attention
    ) -> None:
        super().__init__(config=config)
        self.layer = layer_number - 1
        self.compression = compression
        self.merging = True
        """Set to `False` to append every token: the same weights, without compression."""
        self.observer: Callable[[Tensor], Any] | None = None
        """Called with the decisions `[s, b, g]` of every pass through a cache, where someone wants to see them, and of
        every pass in training."""
        self.settings = dict(scale=softmax_scale, interleaved=config.rotary_interleaved)
        self._tp, self._cp = pg_collection.tp, pg_collection.cp
        self._exchanges_heads = get_pg_size(self._cp) > 1 and cp_comm_type == "a2a"
        self._of_chunks = dict(group=self._cp) if get_pg_size(self._cp) > 1 and cp_comm_type == "all_gather" else {}
        if self._of_chunks and compression.config.merges and compression.config.dmc_window_size == 0:
            raise DMCError(
                "dmc_window_size = 0 lets a merge reach back to the sequence's first token, which cp_comm_type = "
                "all_gather has no room for: choose a window, or a2a"
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: DMCCall,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """`query` `[s, b, h, d]`, `key, value` `[s, b, g, d]`, unrotated, this rank's heads; returns `[s, b, h*d]`.

        The attention is causal, within documents where there are any; `attention_mask` is not read. With context
        parallelism `s` are this rank's tokens.
        """
        if get_pg_size(self._cp) > 1 and (attention_bias.cache is not None or attention_bias.paged is not None):
            raise DMCError("a model with context parallelism does not generate: load it with context_parallel_size = 1")
        if not self._exchanges_heads:
            return self._attend(query, key, value, attention_bias).flatten(2)
        output = self._attend(*all_tokens(query, key, value, self._cp), attention_bias)
        return own_tokens(output, self._cp).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, call: DMCCall) -> Tensor:
        """All tokens, or this rank's with all its heads; returns `[s, b, h, d]`."""
        attend, attend_unmerged = dmc_attention, zero_out_attention
        if self._of_chunks:
            attend, attend_unmerged = dmc_attention_of_chunks, zero_out_attention_of_chunks
        dmc = self.compression.config
        if not dmc.merges:
            if call.cache is not None or call.paged is not None:
                raise DMCError(
                    f"stage {dmc.dmc_stage} does not compress: there is no cache to generate from before `retrofit`"
                )
            last_channel = self.compression.last_channel
            return attend_unmerged(
                query, key, value, call.rotary, last_channel=last_channel, documents=call.documents, **self.settings,
                **self._of_chunks,
            )  # fmt: skip

        settings = dict(
            self.settings, window=dmc.dmc_window_size, offset=self.compression.offset if self.merging else math.inf
        )
        if call.cache is not None:
            output, alpha = dmc_attention_cached(query, key, value, call.rotary, call.cache, **settings)
            if self.observer is not None:
                self.observer(alpha)
            return output
        if call.paged is not None:
            return self._paged(query, key, value, call, settings)
        settings["kernel"] = choose_kernel(query, call.documents, dmc.dmc_kernel)
        settings["documents"] = call.documents
        settings |= self._of_chunks
        if self.training:
            soft, shares = not self.compression.hard, get_pg_size(self._cp) if self._of_chunks else 1
            key = self.compression.weigh(key, self.layer, shares)
            noise = self._noise(key) if soft and dmc.dmc_noise else None
            temperature = dmc.dmc_temp if soft else None
            output, alpha = attend(query, key, value, call.rotary, temperature=temperature, noise=noise, **settings)
            output = self.compression.attach(output, alpha, self.layer, shares)
            if self.observer is not None:
                self.observer(alpha)
            self.compression.kernel = settings["kernel"]
        else:
            output, _ = attend(query, key, value, call.rotary, **settings)
        return output

    def _paged(self, query: Tensor, key: Tensor, value: Tensor, call: DMCCall, settings: dict) -> Tensor:
        cache = call.paged.cache
        if settings.pop("window") != cache.shape.window:
            raise DMCError(
                f"the cache was made for windows of {cache.shape.window} tokens, the model merges over "
                f"{self.compression.config.dmc_window_size}"
            )
        step, tokens = call.paged.step, len(query)
        query, key, value = (x[: step.tokens, 0] for x in (query, key, value))  # behind them, padding at most
        output, alpha = paged_attention(
            query, key, value, call.rotary, cache, call.paged.layers[self.layer + 1], step,
            kernel=self.paged_kernel(query, cache), **settings,
        )  # fmt: skip
        if self.observer is not None:
            self.observer(alpha[:, None])
        if len(output) < tokens:
            output = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, tokens - len(output)))
        return output[:, None]

    def paged_kernel(self, query: Tensor, cache: PagedCache) -> str:
        """The kernel of `paged_attention` for queries like these; "fused" never waits for the device."""
        return "reference" if self.compression.config.dmc_kernel == "reference" else choose_paged_kernel(query, cache)

    def _noise(self, key: Tensor) -> LogisticNoise:
        """Logistic noise for this pass; by head, in any layout."""
        stream = parallel_state.get_data_parallel_rank() if parallel_state.is_initialized() else 0
        share = get_pg_rank(self._tp)
        if self._exchanges_heads:
            share = share * get_pg_size(self._cp) + get_pg_rank(self._cp)
        return self.compression.noise(self.layer, key.device, stream, first_head=share * key.shape[2])


class DMCSelfAttention(SelfAttention):
    """Megatron's self-attention layer with a KV cache that compresses itself.

    Shapes in and out are those of `SelfAttention`, `[s, b, hidden]`. Parameters are its parameters: DMC adds none, and
    checkpoints move between the two.

    Args:
        compression: the model's schedule and loss; all layers of a model share one.
        Others as for `SelfAttention`.

    Raises:
        DMCError: for a model that DMC cannot serve; the message names the setting.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        compression: Compression,
        **kwargs: Any,
    ) -> None:
        check_model(config)
        # Set here and not in the spec: `--attention-backend local` replaces the spec's core attention.
        submodules = replace(submodules, core_attention=partial(DMCCoreAttention, compression=compression))
        super().__init__(config, submodules, layer_number, *args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        sequence_len_offset: Any = None,
        *,
        inference_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `SelfAttention.forward`; the arguments that DMC has no meaning for must be `None`.

        Packed documents come with `packed_seq_params`, or, where `Compression.packed_by_mask` says so, with an
        `attention_mask` `[b | 1, 1, s, s]` that is true where a token must not see another.
        """
        refused = dict(
            key_value_states=key_value_states,
            rotary_pos_cos=rotary_pos_cos,
            rotary_pos_sin=rotary_pos_sin,
            rotary_pos_cos_sin=rotary_pos_cos_sin,
            attention_bias=attention_bias,
        )
        if given := [name for name, value in refused.items() if value is not None]:
            raise DMCError(f"DMC attention takes no {', '.join(given)}")
        context = inference_context if inference_context is not None else inference_params
        if context is not None and packed_seq_params is not None:
            raise DMCError("packed documents are for training: to generate, give every sequence its own place")
        if isinstance(context, HoldsPages):
            positions = slice(0, context.max_sequence_length)
            call = DMCCall(rotary=self._rotary_tables(rotary_pos_emb, positions, context), paged=context)
            return super().forward(hidden_states, attention_mask, attention_bias=call)
        if context is not None and not context.is_static_batching():
            raise DMCError(
                "DMC generates with a context of its own (megatron_dmc.LLM, megatron_dmc.context) or Megatron's "
                f"StaticInferenceContext; got {type(context).__name__}"
            )
        start = 0 if context is None else context.sequence_len_offset
        tokens = hidden_states.shape[0] * (get_pg_size(self.tp_group) if self.config.sequence_parallel else 1)
        compression = self.core_attention.compression
        positions, documents = slice(start, start + tokens), None
        if packed_seq_params is not None:
            documents = self._packed(packed_seq_params, tokens * get_pg_size(self.pg_collection.cp))
            positions = slice(None)
        elif compression.packed_by_mask and context is None:
            documents = self._masked(attention_mask, hidden_states.shape[1])
        if documents is not None and rotary_pos_emb is not None and self.config.mrope_section is not None:
            raise DMCError(
                "packed documents cannot be used with position_embedding_type = mrope (config.mrope_section is set), "
                "whose angles are those of position ids, not of a token's place in its document; use rope"
            )
        call = DMCCall(
            rotary=self._rotary_tables(rotary_pos_emb, positions, compression, documents),
            documents=documents,
            cache=None if context is None else self._cache(context, hidden_states),
        )
        return super().forward(
            hidden_states,
            attention_mask,
            inference_context=context,
            attention_bias=call,
            sequence_len_offset=sequence_len_offset,
        )

    def _adjust_key_value_for_inference(self, inference_context, query, key, value, rotary_pos_emb, *args, **kwargs):
        """The base class would store every key and value here; DMC's cache takes them in the core attention."""
        return query, key, value, rotary_pos_emb, self.attn_mask_type, None

    def _packed(self, params: Any, tokens: int) -> Documents:
        """The documents of Megatron's `PackedSeqParams`, which all layers of a pass share."""
        if params.qkv_format != "thd":
            raise DMCError(f"packed_seq_params must have qkv_format = 'thd'; got {params.qkv_format!r}")
        borders = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
        find = partial(Documents.from_borders, borders, tokens)
        return self.core_attention.compression.documents(borders, find, (tokens,))

    def _masked(self, mask: Tensor | None, sequences: int) -> Documents:
        """The documents of a mask `[b, 1, s, s]`, or `[1, 1, s, s]` for all `b` sequences alike; with context
        parallelism of its rows for this rank's tokens."""
        if mask is None:
            raise DMCError(
                "documents are to be kept apart by the attention mask (--reset-attention-mask), and this layer got "
                "none: keep the data loader's masks, or use --dataloader-inter-document-masking"
            )
        if mask.dim() != 4 or mask.shape[0] not in (1, sequences):
            raise DMCError(
                f"attention_mask must be [b, 1, s, s] with b = {sequences} sequences, or 1 for all of them alike; got "
                f"{tuple(mask.shape)}"
            )

        def find() -> Documents:
            cp, (b, _, rows, tokens) = self.pg_collection.cp, mask.shape
            own = torch.arange(tokens, device=mask.device)
            if get_pg_size(cp) > 1:
                own = torch.cat([own.chunk(2 * cp.size())[i] for i in own_chunks(cp)])
            before = own[:, None].sub(1).clamp(min=0).expand(b, rows, 1)
            first = mask[:, 0].gather(2, before)[..., 0].T | (own == 0)[:, None]
            if get_pg_size(cp) > 1:
                first = gather(first.byte(), cp).bool()
            return Documents.from_first(first.expand(-1, sequences))

        return self.core_attention.compression.documents(mask, find, (sequences,))

    def _rotary_tables(
        self, embedding: Any, positions: slice, owner: Compression | HoldsPages, documents: Documents | None = None
    ) -> Rotary | None:
        """`(cos, sin)` from the angles `[s, 1 | b, 1, d_rot]` that Megatron passes, at `positions`, in float32.

        With context parallelism those are the angles of this rank's tokens, and the tables are for all. Every packed
        document begins anew, as it does in generation: DMC's zeroed channel has a partner, for which more counts than
        the difference of two positions. (With `packed_seq_params` Megatron passes the angles of the longest document,
        on every rank, of which all positions are wanted.)

        Megatron gives both channels of a pair their angle, the same one; the tables hold it once.
        Megatron passes one tensor to all layers, and the same one in every step: its tables are made once, and kept
        with their `owner`.
        """
        skip = self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]
        if embedding is None or skip:
            return None
        angles = embedding[0] if isinstance(embedding, tuple) else embedding
        known = owner.rotary_tables
        if known is not None and known[0] is angles and known[1] == positions and known[2] is documents:
            return known[3]
        tables = self._make_rotary_tables(angles, positions, documents)
        if isinstance(owner, HoldsPages) or not torch.is_inference_mode_enabled():  # training could not use them
            owner.rotary_tables = angles, positions, documents, tables
        return tables

    def _make_rotary_tables(self, angles: Tensor, positions: slice, documents: Documents | None) -> Rotary:
        if positions != slice(None):
            if len(angles) != positions.stop - positions.start:  # a table for all positions, not for this pass alone
                angles = angles[positions]
            if get_pg_size(self.pg_collection.cp) > 1:
                angles = gather(angles.detach(), self.pg_collection.cp)
        if documents is not None and angles.shape[1] == 1:  # otherwise every sequence has positions of its own
            angles = angles[documents.positions.clamp(max=len(angles) - 1), 0]
        angles = angles.squeeze(2).float()
        angles = angles[..., ::2] if self.config.rotary_interleaved else angles[..., : angles.shape[-1] // 2]
        angles = angles.squeeze(1) if angles.shape[1] == 1 else angles
        magnitude = self._yarn_concentration_factor
        return angles.cos() * magnitude, angles.sin() * magnitude

    def _cache(self, context: Any, hidden_states: Tensor) -> DMCCache:
        """This layer's cache, kept where Megatron's static context keeps keys and values."""
        caches = context.key_value_memory_dict
        if context.sequence_len_offset == 0 or self.layer_number not in caches:
            caches[self.layer_number] = DMCCache.empty(
                hidden_states.shape[1],
                self.num_query_groups_per_partition,
                self.hidden_size_per_attention_head,
                dtype=self.config.params_dtype,
                device=hidden_states.device,
            )
        cache = caches[self.layer_number]
        if cache.tokens != context.sequence_len_offset:
            raise DMCError(
                f"the cache of layer {self.layer_number} has seen {cache.tokens} tokens, but the context is at "
                f"{context.sequence_len_offset}: a compressed cache cannot be rewound, start a new context"
            )
        return cache

    @torch.no_grad()
    def zero_last_channel(self, decisions: bool) -> bool:
        """Set to 0 the query rows that produce the last channel, so that every token's importance is `sigmoid(c)`, and
        with `decisions` the key rows, so that `a` is `-c` for every token.

        Ends the stage `zero-out`. Returns whether anything had to change.
        """
        parameters = [
            p for p in (self.linear_qkv.weight, getattr(self.linear_qkv, "bias", None)) if p is not None and p.numel()
        ]
        query_rows, key_rows = self._last_rows(parameters[0].device)
        changed = False
        for rows, norm in ((query_rows, self.q_layernorm), *([(key_rows, self.k_layernorm)] if decisions else [])):
            changed |= any(bool(p[rows].any()) for p in parameters)
            for p in parameters:
                p[rows] = 0
            if norm is not None and getattr(norm, "bias", None) is not None:
                # A LayerNorm shifts a channel that is 0: its own gain and bias for that channel must vanish as well.
                norm.weight[-1] = -1.0 if self.config.layernorm_zero_centered_gamma else 0.0
                norm.bias[-1] = 0.0
        return changed

    def zeroed_rows(self) -> tuple[bool, bool]:
        """Whether the query rows, and the key rows, that produce the last channel are 0, as `zero-out` leaves them."""
        query_rows, key_rows = self._last_rows(self.linear_qkv.weight.device)
        return tuple(not bool(self.linear_qkv.weight[rows].any()) for rows in (query_rows, key_rows))

    def _last_rows(self, device) -> tuple[Tensor, Tensor]:
        """Rows of queries' and of keys' last channel in this rank's fused QKV projection, which lies as (queries,
        [gates,] key, value) per KV head."""
        d = self.hidden_size_per_attention_head
        groups, heads = self.num_query_groups_per_partition, self.num_attention_heads_per_partition
        per_group = heads // groups
        stride = per_group * (2 if self.config.attention_output_gate else 1) + 2
        group, head = torch.arange(groups, device=device)[:, None], torch.arange(per_group, device=device)
        queries, keys = group * stride + head, group * stride + stride - 2
        return (queries * d + d - 1).flatten(), (keys * d + d - 1).flatten()


def _kinds(config: TransformerConfig) -> set[str | None]:
    """What layers of the model communicate by in context parallelism; nothing without it."""
    if config.context_parallel_size == 1:
        return set()
    kinds = config.cp_comm_type
    return set(kinds) if isinstance(kinds, list) else {kinds}


def check_model(config: TransformerConfig) -> None:
    """Refuse a model that DMC cannot serve, by the name of the setting.

    Raises:
        DMCError: with everything that stands in the way.
    """
    refusals = [
        (config.multi_latent_attention, "multi_latent_attention", "its cache is already one latent vector per token"),
        (config.window_size is not None, "window_size", "sliding windows drop the entries that DMC merges"),
        (config.softmax_type != "vanilla", "softmax_type", "attention sinks are not part of DMC's softmax"),
        (config.attention_dropout > 0, "attention_dropout", "set it to 0 (--attention-dropout 0)"),
        (config.experimental_attention_variant is not None, "experimental_attention_variant", "DMC is one itself"),
        (
            config.num_query_groups % config.tensor_model_parallel_size,
            "tensor_model_parallel_size",
            f"ranks share out {config.num_query_groups} KV heads: set it to a divisor of {config.num_query_groups}",
        ),
        (
            "a2a" in _kinds(config)
            and config.num_query_groups // config.tensor_model_parallel_size % config.context_parallel_size,
            "context_parallel_size",
            f"with cp_comm_type = a2a ranks share out the {config.num_query_groups} KV heads, those of the same tokens "
            f"after tensor_model_parallel_size = {config.tensor_model_parallel_size} did, and it must divide what that "
            "leaves; all_gather leaves heads where they are",
        ),
        (
            _kinds(config) - {"a2a", "all_gather"},
            "cp_comm_type",
            "a merge reaches back over the borders of ranks' chunks: set it to a2a or all_gather (--cp-comm-type)",
        ),
        (
            config.gtp_weight_remat_size > 1,
            "gtp_weight_remat_size",
            "ranks have parts of weights, whose rows DMC sets to 0: leave --tensor-parallel-num-weight-shards out",
        ),
        (config.heterogeneous_block_specs, "heterogeneous_block_specs", "DMC's layers are all alike"),
        (config.fused_single_qkv_rope, "fused_single_qkv_rope", "DMC rotates after the merge"),
        (config.flash_decode, "flash_decode", "it stores rotated keys"),
        (config.qk_clip, "qk_clip", "DMC attention keeps no maximum logit"),
        (config.log_max_attention_logit, "log_max_attention_logit", "DMC attention keeps no maximum logit"),
        (getattr(config, "fp8_dot_product_attention", False), "fp8_dot_product_attention", "DMC attention is not fp8"),
        (config.cuda_graph_impl != "none", "cuda_graph_impl", "the schedule changes between steps"),
    ]
    if found := [f"{name} = {getattr(config, name)!r} ({why})" for bad, name, why in refusals if bad]:
        raise DMCError("DMC cannot be used with " + "; ".join(found))
