"""The model families that `megatron-dmc convert` knows: `config.json`, Megatron's flags and arguments, and tensors.

All of them are one architecture, Llama's, with these differences:

| family                    | `model_type` | QKV bias | QK-norm |
|---------------------------|--------------|----------|---------|
| Llama-2, Llama-3.x        | `llama`      |          |         |
| Mistral                   | `mistral`    |          |         |
| Qwen2.5                   | `qwen2`      | yes      |         |
| Qwen3, dense              | `qwen3`      |          | yes     |

Queries and keys need no permutation: Hugging Face and Megatron both rotate the halves of a head.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.config import DMCError

FAMILIES = {
    "llama": ("LlamaForCausalLM", False, False),
    "mistral": ("MistralForCausalLM", False, False),
    "qwen2": ("Qwen2ForCausalLM", True, False),
    "qwen3": ("Qwen3ForCausalLM", False, True),
}
"""By `model_type`: the class of transformers, whether Q, K and V have a bias, whether Q and K have a norm."""

LLAMA3_SCALING = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
"""Llama 3's scaling of rotary frequencies as Megatron has it; the factor alone can be chosen."""

ARGUMENTS = dict(
    hybrid_layer_pattern=None,
    num_experts=None,
    multi_latent_attention=False,
    experimental_attention_variant=None,
    heterogeneous_layers_config_path=None,
    heterogeneous_layers_config_encoded_json=None,
    normalization="RMSNorm",
    layernorm_zero_centered_gamma=False,
    apply_residual_connection_post_layernorm=False,
    swiglu=True,
    add_bias_linear=False,
    position_embedding_type="rope",
    rotary_percent=1.0,
    rotary_interleaved=False,
    rotary_seq_len_interpolation_factor=None,
    no_rope_freq=None,
    window_size=None,
    softmax_type="vanilla",
    attention_output_gate=False,
    qk_l2_norm=False,
    mtp_num_layers=None,
    use_mup=False,
)
"""Arguments of Megatron that change the model, and the one value that these families have."""


@dataclass(frozen=True)
class Chunk:
    """A part of one of Megatron's tensors, and the tensors of Hugging Face that it is made of.

    Attributes:
        key: name in the checkpoint.
        shape: of the whole tensor; layers are stacked along the first axis of those in `decoder.layers`.
        offset, size: where the part lies in it.
        sources: names in Hugging Face's files: one, or the projections of queries, keys and values.
        source_shapes: their shapes.
        groups: KV heads, for queries, keys and values; Megatron has [queries, key, value] of one after the other.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    groups: int = 1

    def join(self, tensors: list[Tensor]) -> Tensor:
        """This part, `size`, from its sources."""
        if len(tensors) == 1:
            return tensors[0].reshape(self.size)
        rows = [t.reshape(self.groups, t.shape[0] // self.groups, *t.shape[1:]) for t in tensors]
        return torch.cat(rows, dim=1).reshape(self.size)

    def split(self, part: Tensor) -> list[Tensor]:
        """The sources, from this part; contiguous."""
        if len(self.sources) == 1:
            return [part.reshape(self.source_shapes[0])]
        rows = [shape[0] // self.groups for shape in self.source_shapes]
        parts = part.reshape(self.groups, sum(rows), *self.source_shapes[0][1:]).split(rows, dim=1)
        return [p.reshape(shape).contiguous() for p, shape in zip(parts, self.source_shapes, strict=True)]


@dataclass(frozen=True)
class Architecture:
    """What defines a model.

    Attributes:
        model_type: the family, a key of `FAMILIES`.
        vocabulary: rows of the embedding.
        groups: KV heads.
        head_dim: channels of a head.
        rope_factor: of Llama 3's scaling; `None` without scaling.
        tied: the output layer is the embedding.
    """

    model_type: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    positions: int
    epsilon: float
    rope_base: int
    rope_factor: float | None
    tied: bool

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.model_type][1]

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.model_type][2]

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> Architecture:
        """From the content of a `config.json`; `where` it is, for messages.

        Raises:
            DMCError: for a model type or a setting that Megatron's GPT model, or this converter, does not have.
        """
        from transformers import CONFIG_MAPPING

        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise DMCError(f"{where}: model_type is {model_type!r}; convert knows {', '.join(FAMILIES)}")
        try:  # transformers fills in what older files leave out
            full = CONFIG_MAPPING[model_type].from_dict(dict(config)).to_dict()
        except Exception as error:  # whatever unfit values make of its checks
            raise DMCError(f"{where}: transformers cannot read it as {model_type}: {error}") from error
        rope = {**(full.get("rope_scaling") or {}), **(full.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        base = rope.get("rope_theta", full.get("rope_theta", 10000.0))
        window = full.get("sliding_window")
        if full.get("use_sliding_window") is False or (window or 0) >= full["max_position_embeddings"]:
            window = None
        partial = rope.get("partial_rotary_factor", full.get("partial_rotary_factor"))
        scaling = {key: rope.get(key) for key in LLAMA3_SCALING} if kind == "llama3" else LLAMA3_SCALING
        _refuse(
            where,
            [
                (config.get("quantization_config") is not None, "quantization_config",
                 config.get("quantization_config"), "none: convert the weights before quantization"),
                (window is not None, "sliding_window", window, "null, or at least max_position_embeddings"),
                (full.get("hidden_act") != "silu", "hidden_act", full.get("hidden_act"), "silu"),
                (bool(full.get("attention_dropout")), "attention_dropout", full.get("attention_dropout"), "0"),
                (bool(full.get("attention_bias")), "attention_bias", True, "false"),
                (bool(full.get("mlp_bias")), "mlp_bias", True, "false"),
                (kind not in ("default", "llama3"), "rope_type", kind, "default or llama3"),
                (partial not in (None, 1.0), "partial_rotary_factor", partial, "1"),
                (not isinstance(base, (int, float)) or base != int(base), "rope_theta", base, "a whole number"),
                *(
                    (scaling[key] != value, key, scaling[key], f"{value:g}, which is fixed in Megatron")
                    for key, value in LLAMA3_SCALING.items()
                ),
            ],
        )  # fmt: skip
        heads = full["num_attention_heads"]
        return cls(
            model_type=model_type,
            layers=full["num_hidden_layers"],
            hidden=full["hidden_size"],
            ffn=full["intermediate_size"],
            heads=heads,
            groups=full.get("num_key_value_heads") or heads,
            head_dim=full.get("head_dim") or full["hidden_size"] // heads,
            vocabulary=full["vocab_size"],
            positions=full["max_position_embeddings"],
            epsilon=full["rms_norm_eps"],
            rope_base=int(base),
            rope_factor=float(rope["factor"]) if kind == "llama3" else None,
            tied=bool(full.get("tie_word_embeddings")),
        )

    @classmethod
    def from_args(cls, args: argparse.Namespace, vocabulary: int, where: str) -> Architecture:
        """From the arguments that a checkpoint holds, and the rows of its embedding.

        Raises:
            DMCError: for a model that none of the families has.
        """
        _refuse(
            where,
            [
                (getattr(args, name, value) != value, name, getattr(args, name, value), str(value))
                for name, value in ARGUMENTS.items()
            ],
        )
        kind = (bool(getattr(args, "add_qkv_bias", False)), bool(getattr(args, "qk_layernorm", False)))
        types = [name for name, (_, *differences) in FAMILIES.items() if tuple(differences) == kind]
        if not types:
            raise DMCError(f"{where}: add_qkv_bias and qk_layernorm are both set; of the families none has both")
        try:
            return cls(
                model_type=types[0],
                layers=args.num_layers,
                hidden=args.hidden_size,
                ffn=args.ffn_hidden_size,
                heads=args.num_attention_heads,
                groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
                head_dim=args.kv_channels,
                vocabulary=vocabulary,
                positions=args.max_position_embeddings,
                epsilon=args.layernorm_epsilon,
                rope_base=args.rotary_base,
                rope_factor=args.rope_scaling_factor if args.use_rope_scaling else None,
                tied=not args.untie_embeddings_and_output_weights,
            )
        except AttributeError as error:
            raise DMCError(f"{where} holds other arguments than Megatron 0.19 saves: {error}") from error

    def flags(self) -> dict[str, Any]:
        """Megatron's flags, without dashes, as the part `model` of a recipe has them."""
        flags: dict[str, Any] = {
            "num-layers": self.layers,
            "hidden-size": self.hidden,
            "ffn-hidden-size": self.ffn,
            "num-attention-heads": self.heads,
        }
        if self.groups != self.heads:
            flags |= {"group-query-attention": True, "num-query-groups": self.groups}
        if self.head_dim * self.heads != self.hidden:
            flags |= {"kv-channels": self.head_dim}
        flags |= {
            "max-position-embeddings": self.positions,
            "position-embedding-type": "rope",
            "rotary-base": self.rope_base,
        }
        if self.rope_factor is not None:
            flags |= {"use-rope-scaling": True, "rope-scaling-factor": self.rope_factor}
        flags |= {
            "normalization": "RMSNorm",
            "norm-epsilon": self.epsilon,
            "swiglu": True,
            "disable-bias-linear": True,
        }
        switches = {
            "add-qkv-bias": self.qkv_bias,
            "qk-layernorm": self.qk_norm,
            "untie-embeddings-and-output-weights": not self.tied,
        }
        flags |= {name: True for name, on in switches.items() if on}
        return flags | {"padded-vocab-size": self.vocabulary, "attention-dropout": 0, "hidden-dropout": 0}

    def config(self) -> dict[str, Any]:
        """The content of a `config.json`, in the form that older transformers read too."""
        scaling = None
        if self.rope_factor is not None:
            scaling = dict(rope_type="llama3", factor=self.rope_factor, **LLAMA3_SCALING)
        return dict(
            architectures=[FAMILIES[self.model_type][0]],
            model_type=self.model_type,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.head_dim,
            max_position_embeddings=self.positions,
            rms_norm_eps=self.epsilon,
            rope_theta=float(self.rope_base),
            rope_scaling=scaling,
            tie_word_embeddings=self.tied,
            hidden_act="silu",
            attention_dropout=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )

    def chunks(self) -> Iterator[Chunk]:
        """All parts of the model's tensors, from the embedding to the output layer.

        One form serves layers of Transformer Engine and local ones: the local layers' `sharded_state_dict` renames
        its norms to those of the fused layers (`sharded_state_dict_keys_map` of Megatron's layer specs).
        """
        vocabulary = (self.vocabulary, self.hidden)
        yield self._whole("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocabulary)
        for layer in range(self.layers):
            yield from self._layer(layer)
        yield self._whole("decoder.final_layernorm.weight", "model.norm.weight", (self.hidden,))
        if not self.tied:
            yield self._whole("output_layer.weight", "lm_head.weight", vocabulary)

    def stateful(self) -> tuple[list[str], list[str]]:
        """Names of the states of 8-bit training that layers ask their checkpoint for: of each layer, of the model.

        Local linear layers have them as well, empty; norms only where they are Transformer Engine's, fused or not.
        """
        names = ["self_attention.linear_qkv.", "self_attention.linear_proj.", "mlp.linear_fc1.", "mlp.linear_fc2."]
        names += ["self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"]
        if self.qk_norm:
            names += ["self_attention.q_layernorm.", "self_attention.k_layernorm."]
        return [f"decoder.layers.{name}_extra_state" for name in names], ["decoder.final_layernorm._extra_state"]

    @staticmethod
    def _whole(key: str, source: str, shape: tuple[int, ...]) -> Chunk:
        return Chunk(key, shape, (0,) * len(shape), shape, (source,), (shape,))

    def _layer(self, layer: int) -> Iterator[Chunk]:
        hidden, ffn, dim = self.hidden, self.ffn, self.head_dim
        rows = [self.heads * dim, self.groups * dim, self.groups * dim]

        def part(key: str, sources: list[str], shapes: list[tuple[int, ...]], of: int = 1, index: int = 0) -> Chunk:
            """Layer `layer` of a tensor whose rows are `of` such parts."""
            size = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            return Chunk(
                key=f"decoder.layers.{key}",
                shape=(self.layers, size[0] * of, *size[1:]),
                offset=(layer, size[0] * index, *(0 for _ in size[1:])),
                size=(1, *size),
                sources=tuple(f"model.layers.{layer}.{source}" for source in sources),
                source_shapes=tuple(shapes),
                groups=self.groups,
            )

        projections = [f"self_attn.{x}_proj" for x in "qkv"]
        qkv = "self_attention.linear_qkv"
        yield part(f"{qkv}.layer_norm_weight", ["input_layernorm.weight"], [(hidden,)])
        yield part(f"{qkv}.weight", [f"{p}.weight" for p in projections], [(n, hidden) for n in rows])
        if self.qkv_bias:
            yield part(f"{qkv}.bias", [f"{p}.bias" for p in projections], [(n,) for n in rows])
        if self.qk_norm:
            for x in "qk":
                yield part(f"self_attention.{x}_layernorm.weight", [f"self_attn.{x}_norm.weight"], [(dim,)])
        yield part("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], [(hidden, rows[0])])
        yield part("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], [(hidden,)])
        # Megatron keeps the gate and the linear half of SwiGLU apart, so that tensor-parallel ranks get rows of both.
        for index, half in enumerate(("gate", "up")):
            yield part("mlp.linear_fc1.weight", [f"mlp.{half}_proj.weight"], [(ffn, hidden)], of=2, index=index)
        yield part("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], [(hidden, ffn)])


def _refuse(where: str, refusals: list[tuple[bool, str, Any, str]]) -> None:
    """(Whether it is refused, setting, given, allowed): all that stand in the way, in one message."""
    if found := [f"{name} is {given!r}, and must be {allowed}" for bad, name, given, allowed in refusals if bad]:
        raise DMCError(f"{where} cannot be converted: {'; '.join(found)}")


def size_in_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize
