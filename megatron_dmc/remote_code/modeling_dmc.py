"""Llama, Mistral, Qwen2 and Qwen3 with a KV cache that compresses itself, in plain PyTorch.

Dynamic Memory Compression (Nawrot et al., *Dynamic Memory Compression: Retrofitting LLMs for Accelerated Inference*,
ICML 2024, arXiv 2403.09636): for every token, each KV head decides whether its key and value are appended to the cache
or merged, as a weighted mean, into the entry before. The models are transformers' own, but for attention and cache.

Shapes: `b` sequences, `s` new tokens, `h` query heads, `g` KV heads (query head `i` reads KV head `i // (h/g)`), `d`
channels of a head. Entries are stored in the model's dtype; merging, scores and softmax are computed in float32, or in
float64 for a model in float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import LlamaModel

from .configuration_dmc import DMCLlamaConfig, DMCMistralConfig, DMCQwen2Config, DMCQwen3Config

SCORES = 2**25
"""How many attention scores are in memory at a time, at most (if a query's own are not more)."""

_ARGUMENTS = list(inspect.signature(LlamaModel.forward).parameters)[1:]
_CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"  # renamed between 5.0 and 5.24


class DMCCacheLayer(CacheLayerMixin):
    """The compressed cache of one layer.

    Attributes:
        keys, values: `[b, g, n, d]` in the model's dtype, rotated merged keys and merged values; `n` is the number of
            entries of the longest head, and behind a head's own entries there is nothing of use.
        lengths: `[b, g]` int64, entries of each head; the last of them is open, a next token may merge into it.
        tokens: columns of `input_ids` that went in, padding included.
        seen: `[b]` int64, tokens of each sequence, without padding.
        tail: what a merge of the next token may still need. With a window, of the last `w = window - 1` tokens: keys
            and values `[b, g, w, d]` in the model's dtype, weights `[b, g, w]` in float32 (float64 in a model of
            float64), decisions `[b, g, w]` (bool). Without, the one running weighted mean of the open entry, like
            the weights in float32 or float64.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Empty again, for any number of sequences."""
        self.keys = self.values = self.lengths = self.seen = self.tail = None
        self.tokens = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """No entries yet, for sequences and heads as in `key_states` `[b, g, s, d]`."""
        b, g = key_states.shape[:2]
        self.keys, self.values = key_states.new_zeros(2, b, g, 0, key_states.shape[-1])
        self.lengths = torch.zeros(b, g, dtype=torch.int64, device=key_states.device)
        self.seen = torch.zeros(b, dtype=torch.int64, device=key_states.device)
        self.is_initialized = True

    @torch.no_grad()
    def write(self, key: Tensor, value: Tensor, real: Tensor, merges: Tensor, survives: Tensor) -> None:
        """Enter new tokens: merged keys and values `[b, g, s, d]` as they stand after each token.

        Args:
            real: `[b, s]` bool, false for padding.
            merges: `[b, g, s]` bool, whether a token merged into the entry before it.
            survives: `[b, g, s]` bool, the last token of every entry.
        """
        slots = self.lengths[..., None] - 1 + (real[:, None] & ~merges).long().cumsum(-1)
        self.lengths = slots[..., -1] + 1
        more = int(self.lengths.max()) - self.keys.shape[2]
        if more > 0:
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        i, j, t = survives.nonzero(as_tuple=True)
        slots = slots[i, j, t]
        self.keys[i, j, slots], self.values[i, j, slots] = key[i, j, t], value[i, j, t]
        self.tokens += key.shape[2]
        self.seen = self.seen + real.sum(1)

    def get_seq_length(self) -> int:
        """Tokens, not entries: positions and attention masks count those."""
        return self.tokens

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its older name

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Of a mask over tokens. `query_length` is a number, or in older versions the tensor of positions."""
        return self.tokens + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "keys and values alone cannot be entered into a DMC cache, which merges by the queries, too: use it with "
            "the DMC model it came with"
        )

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "a DMC cache cannot be cropped: tokens that have merged into an entry cannot be taken out of it. Generate "
            "without assisted decoding (no assistant_model, no prompt_lookup_num_tokens), or keep a copy.deepcopy of "
            "the cache as it was"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences that `indices` (int64, or a bool mask) names, in its order."""
        self._replace(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self._replace(lambda x: x.repeat_interleave(repeats, 0))

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.lengths, self.seen, self.tail = change(self.lengths), change(self.seen), tuple(map(change, self.tail))
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        self.keys, self.values = change(self.keys[:, :, :longest]), change(self.values[:, :, :longest])


class DMCCache(Cache):
    """The compressed KV cache of a DMC model, for `past_key_values` (or `cache`, its newer name).

    The model makes one by itself. Make your own, `model.new_cache()`, to go on from it in later calls:
    `model.generate(**inputs, past_key_values=cache)` reads and changes it in place. `copy.deepcopy` copies it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(layers=[DMCCacheLayer() for _ in range(config.num_hidden_layers)])

    @property
    def ratio(self) -> float:
        """The compression ratio: tokens per entry, over all layers, KV heads and sequences; 1 of an empty cache."""
        filled = self._filled()
        entries = sum(int(layer.lengths.sum()) for layer in filled)
        return sum(int(layer.seen.sum()) * layer.lengths.shape[1] for layer in filled) / entries if entries else 1.0

    @property
    def entry_bytes(self) -> int:
        """Bytes of the keys and values of all entries."""
        return sum(
            int(layer.lengths.sum()) * 2 * layer.keys.shape[-1] * layer.keys.element_size() for layer in self._filled()
        )

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors: entries with the padding behind those of shorter heads, and the open entries' state,
        which is the same however long the sequences are."""
        return sum(x.nbytes for layer in self._filled() for x in (layer.keys, layer.values, *layer.tail))

    @property
    def seen(self) -> Tensor | int:
        """`[b]` int64, tokens of each sequence without padding; 0 while the cache is empty."""
        return self.layers[0].seen if self.layers[0].is_initialized else 0

    def _filled(self) -> list[DMCCacheLayer]:
        return [layer for layer in self.layers if layer.is_initialized]


def dmc_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    real: Tensor,
    layer: DMCCacheLayer | None,
    *,
    window: int,
    offset: float,
    scale: float,
) -> Tensor:
    """New tokens, one or many, attend to a cache and to themselves, then enter it.

    What comes out does not depend on how a sequence is cut into calls.

    Args:
        query: `[b, h, s, d]`, after any QK-norm and before rotation.
        key, value: `[b, g, s, d]`, likewise.
        cos, sin: `[1 | b, s, d/2]`, of the angles of the pairs of channels `(i, i + d/2)`.
        real: `[b, s]` bool, false for the padding that a sequence may begin with.
        layer: the cache, changed in place; `None` for whole sequences and nothing to go on from.
        window, offset: see `configuration_dmc`.
        scale: of the scores.

    Returns:
        `[b, s, h, d]`, of no meaning for padding.
    """
    keep, layer = layer is not None, DMCCacheLayer() if layer is None else layer
    if not layer.is_initialized:
        layer.lazy_initialization(key)
    if layer.lengths.shape != key.shape[:2]:
        raise ValueError(
            f"the cache holds {len(layer.lengths)} sequences and was given tokens of {len(key)}: give it the same "
            "ones, or change it first (batch_repeat_interleave, batch_select_indices)"
        )
    wide, tokens = torch.promote_types(key.dtype, torch.float32), key.shape[2]

    # The last channel of a key decides: positive means merge. A sequence's first token has nothing to merge into,
    # and padding before it stays apart.
    first = real & (layer.seen[:, None] + real.cumsum(1) == 1)
    merges = (key[..., -1].to(wide) - offset > 0) & (real & ~first)[:, None]
    # The last channel of the queries, over the heads of a group, is the token's weight in a merge.
    weight = query[..., -1].to(wide).unflatten(1, (key.shape[1], -1)).mean(2)
    weight = torch.sigmoid(weight + offset) + 2**-7

    run = (key, value, weight, merges)
    if layer.tail is not None:
        run = tuple(torch.cat(pair, 2) for pair in zip(layer.tail, run, strict=True))
    merged = _merge(*(x.to(wide) for x in run), window)
    if keep:
        with torch.no_grad():
            if window:
                layer.tail = tuple(x[:, :, max(0, x.shape[2] - (window - 1)) :].clone() for x in run)
            else:
                mean_key, mean_value, total = (x[:, :, -1:].clone() for x in merged)
                layer.tail = (mean_key, mean_value, total, torch.zeros_like(total, dtype=torch.bool))
    merged_key, merged_value = (x[:, :, -tokens:] for x in merged[:2])

    # As the cache will hold them, so that it makes no difference whether it already does.
    merged_key, merged_value = _rotate(merged_key, cos, sin).to(key.dtype), merged_value.to(key.dtype)
    survives = real[:, None] & torch.cat([~merges[:, :, 1:], torch.ones_like(merges[:, :, :1])], 2)
    # Entries of the cache are visible, but for an open one that the first new token merges into.
    closed = layer.lengths - merges[:, :, 0].long()
    visible = torch.arange(layer.keys.shape[2], device=key.device) < closed[..., None]
    output = _attend(
        _rotate(query.to(wide), cos, sin) * scale,
        torch.cat([layer.keys, merged_key], 2).to(wide),
        torch.cat([layer.values, merged_value], 2).to(wide),
        visible,
        survives,
    )
    if keep:
        layer.write(merged_key, merged_value, real, merges, survives)
    return output.to(value.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, survives: Tensor) -> Tensor:
    """Softmax attention of `query` `[b, h, s, d]` over `key, value` `[b, g, n + s, d]`, a block of queries at a time.

    Of the first `n` entries all queries see those that are `visible` `[b, g, n]`; of the new ones a query sees its own
    as it stands, and earlier ones that `survives` `[b, g, s]`. Returns `[b, s, h, d]`.
    """
    (b, h, s, d), (g, n) = query.shape, visible.shape[1:]
    rows = max(1, SCORES // (b * h * (n + s)))
    query, outputs, token = query.unflatten(1, (g, -1)), [], torch.arange(s, device=query.device)
    for begin in range(0, s, rows):
        end = min(begin + rows, s)
        own, seen = token[begin:end, None], token[:end]
        new = (survives[:, :, None, :end] & (seen < own)) | (seen == own)
        mask = torch.cat([visible[:, :, None].expand(-1, -1, end - begin, -1), new], -1)
        block = query[:, :, :, begin:end]
        scores = (block.flatten(2, 3) @ key[:, :, : n + end].mT).view(*block.shape[:4], n + end)
        weights = scores.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1)
        outputs.append((weights.flatten(2, 3) @ value[:, :, : n + end]).view(block.shape))
    return torch.cat(outputs, 3).permute(0, 3, 1, 2, 4).reshape(b, s, h, d)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` `[b, heads, s, d]`, its last channel zero before and, since that mixes it, after."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    left, right = x.chunk(2, -1)
    right = torch.cat([right[..., :-1], torch.zeros_like(right[..., -1:])], -1)
    turned = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
    return torch.cat([turned[..., :-1], torch.zeros_like(turned[..., -1:])], -1)


def _merge(key: Tensor, value: Tensor, weight: Tensor, alpha: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted means of keys and values over each token's open entry, at most `window` tokens, and the weights' sums.

    `k_t = Σ_j m(t, t-j) k_{t-j} / Σ_j m(t, t-j)` with `m(t, t-j) = w_{t-j} α_{t-j+1} ⋯ α_t` and `0 <= j < window`.
    Keys and values `[b, g, s, d]`, weights and decisions (0 or 1) `[b, g, s]`.
    """
    terms = torch.cat([key, value, torch.ones_like(weight)[..., None]], -1) * weight[..., None]
    sums = _sums(terms, alpha[..., None], min(window or key.shape[2], key.shape[2]))
    merged_key, merged_value, total = sums.split([key.shape[-1], value.shape[-1], 1], -1)
    return merged_key / total, merged_value / total, total[..., 0]


def _sums(terms: Tensor, alpha: Tensor, window: int) -> Tensor:
    """`S_n(t) = Σ_{j<n} (Π_{i<j} α_{t-i}) terms_{t-j}` for `n = window`, along dimension 2.

    By doubling: with `P_n(t) = Π_{i<n} α_{t-i}`, `S_{m+n}(t) = S_m(t) + P_m(t) S_n(t-m)` and
    `P_{m+n}(t) = P_m(t) P_n(t-m)`.
    """

    def later(x: Tensor, steps: int) -> Tensor:
        return F.pad(x[:, :, : max(0, x.shape[2] - steps)], (0, 0, min(steps, x.shape[2]), 0))

    def extend(first: tuple[Tensor, Tensor, int], second: tuple[Tensor, Tensor, int]) -> tuple[Tensor, Tensor, int]:
        (sum_m, product_m, m), (sum_n, product_n, n) = first, second
        return sum_m + product_m * later(sum_n, m), product_m * later(product_n, m), m + n

    power, result = (terms, alpha, 1), None  # S and P of length 1, 2, 4, …
    while window:
        if window & 1:
            result = power if result is None else extend(result, power)
        window >>= 1
        if window:
            power = extend(power, power)
    return result[0]


class DMCAttention(nn.Module):
    """Attention with DMC in place of a layer's own, whose projections and norms it takes over."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj
        if hasattr(attention, "q_norm"):
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """`hidden_states` `[b, s, hidden]` in and out; `attention_mask` is what `_prepare` makes of the user's."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        cache = kwargs.get(_CACHE)
        output = dmc_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            *(table[..., : self.head_dim // 2] for table in position_embeddings),
            attention_mask[:, 0, 0],
            None if cache is None else cache.layers[self.layer_idx],
            window=self.config.dmc_window_size,
            offset=self.config.dmc_init_val,
            scale=self.scaling,
        )
        return self.o_proj(output.flatten(2)), None


def _prepare(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A decoder's arguments as DMC needs them, before its `forward`.

    The cache becomes a `DMCCache`, `attention_mask` bool `[b, 1, 1, s]` of the new tokens, which transformers hands to
    the layers as it is, and positions those of tokens without padding.

    Raises:
        ValueError: for what a compressed cache does not support.
    """
    if model.training:
        raise ValueError(
            "this model evaluates and generates, with hard decisions: call model.eval(). To train it, convert it to "
            "Megatron's format with megatron-dmc convert"
        )
    kwargs = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: attention with DMC returns no weights, which would be over merged entries")
    given = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
    cache = given[1] if given[0] is None else given[0]
    use_cache = kwargs.get("use_cache")
    if cache is None and (model.config.use_cache if use_cache is None else use_cache):
        cache = DMCCache(model.config)
    if cache is not None and not isinstance(cache, DMCCache):
        raise ValueError(
            f"a DMC model needs its own cache, and was given a {type(cache).__name__}: give none, or model.new_cache()"
        )
    kwargs[_CACHE] = cache
    inputs = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    if inputs is None:
        return (), kwargs  # which the decoder refuses
    past, seen = (0, 0) if cache is None else (cache.get_seq_length(), cache.seen)
    real = _real_tokens(kwargs.get("attention_mask"), inputs, past, seen)
    kwargs["attention_mask"] = real[:, None, None]
    before = seen[:, None].to(real.device) if isinstance(seen, Tensor) else seen
    positions = (before + real.cumsum(1) - 1).clamp(min=0)
    given = kwargs.get("position_ids")
    if given is not None and ((given.to(real.device) != positions) & real).any():
        raise ValueError(
            "position_ids must count each sequence's tokens from 0, without padding, one sequence to a row: leave "
            "position_ids out"
        )
    kwargs["position_ids"] = positions
    return (), kwargs


def _real_tokens(mask: Any, inputs: Tensor, past: int, seen: Tensor | int) -> Tensor:
    """`[b, s]` bool, which of the tokens `inputs` `[b, s, …]` are no padding, by the user's `attention_mask`."""
    b, s = inputs.shape[:2]
    if mask is None:
        return torch.ones(b, s, dtype=torch.bool, device=inputs.device)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (b, past + s):
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [sequences, tokens] = {(b, past + s)}, of the {past} tokens in the cache and the "
            f"{s} new ones; got {given}"
        )
    real = mask.bool()
    if (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError(
            "attention_mask has zeros behind ones: with DMC padding can only come before a sequence's first token "
            '(tokenizer.padding_side = "left"). Without an attention_mask, generate takes each pad token for padding'
        )
    if past and (real[:, :past].sum(1) != (seen.to(real.device))).any():
        raise ValueError(
            f"attention_mask tells of {real[:, :past].sum(1).tolist()} tokens in the cache, and there are "
            f"{seen.tolist()}: give the mask that the cache was filled with, extended for the new tokens"
        )
    return real[:, past:]


def _in_full_precision(rotary: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before a rotary embedding's `forward(x, position_ids)`, which gives its tables the dtype of `x`."""
    kwargs = dict(zip(("x", "position_ids"), args, strict=False)) | kwargs
    x = kwargs["x"]
    kwargs["x"] = torch.empty(0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return (), kwargs


class DMCMixin:
    """What turns a family's `…ForCausalLM` into a model with DMC."""

    def __init__(self, config: Any) -> None:
        window, offset = getattr(config, "dmc_window_size", None), getattr(config, "dmc_init_val", None)
        if not isinstance(window, int) or window < 0 or not isinstance(offset, (int, float)):
            raise ValueError(
                "config.json must have dmc_window_size, a whole number of tokens (0 for no limit), and dmc_init_val, "
                f"a number; got {window!r} and {offset!r}"
            )
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn = DMCAttention(layer.self_attn)
        # Hooks leave the signatures of `forward`, by which `generate` chooses what to pass, as they are in the
        # installed version of transformers.
        self.model.register_forward_pre_hook(_prepare, with_kwargs=True)
        self.model.rotary_emb.register_forward_pre_hook(_in_full_precision, with_kwargs=True)

    def new_cache(self) -> DMCCache:
        """An empty cache, for any number of sequences."""
        return DMCCache(self.config)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """`generate` asks for its cache here."""
        if generation_mode == "assisted_generation":
            raise ValueError(
                "assisted decoding takes rejected tokens out of the cache again, which a DMC cache cannot: leave out "
                "assistant_model and prompt_lookup_num_tokens"
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation = {generation_config.cache_implementation!r} is not for DMC, whose cache is its "
                "own: leave cache_implementation out"
            )
        if model_kwargs.get(_CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[_CACHE] = self.new_cache()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)


class DMCLlamaForCausalLM(DMCMixin, LlamaForCausalLM):
    """Llama with DMC."""

    config_class = DMCLlamaConfig


class DMCMistralForCausalLM(DMCMixin, MistralForCausalLM):
    """Mistral with DMC."""

    config_class = DMCMistralConfig


class DMCQwen2ForCausalLM(DMCMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with DMC."""

    config_class = DMCQwen2Config


class DMCQwen3ForCausalLM(DMCMixin, Qwen3ForCausalLM):
    """Qwen3 with DMC."""

    config_class = DMCQwen3Config
