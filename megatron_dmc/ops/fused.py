"""DMC attention for training, on a stock causal attention kernel and four fused CUDA kernels around it.

`dmc_attention` here computes what `megatron_dmc.ops.reference.dmc_attention` computes, in memory linear in the length:

1. *prepare* (`csrc/prepare.cu`) makes decisions, merges keys and values and rotates. A key's bias `log(1 - α)` goes
   into its last channel, which DMC leaves free; the queries' last channel holds the constant that multiplies it. (So
   the bias has the keys' precision, as the products of queries and keys have.)
2. A causal attention kernel, cuDNN's or PyTorch's flash kernel, does the heavy part and returns the log-sum-exp.
3. *merge_diagonal* (`csrc/merge_diagonal.cu`) adds what the kernel missed: the bias must not apply to a token's own
   key.

The backward pass hands the merged output and log-sum-exp to the attention kernel's own backward pass, then adds the
diagonal's gradients and rotates back (*merge_diagonal_backward_*), then goes through the merge
(*prepare_backward_*, `csrc/prepare_backward.cu`).

Windows that the kernels have no room for merge by the reference's operations instead, and without one (`window=0`)
keys and values merge as in `megatron_dmc.ops.unlimited`.
"""

from __future__ import annotations

import functools
import math
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_dmc.config import KERNELS
from megatron_dmc.ops import reference, unlimited
from megatron_dmc.ops.documents import Documents, separate
from megatron_dmc.ops.noise import LogisticNoise
from megatron_dmc.ops.reference import Rotary

HEAD_SIZES = (64, 96, 128, 256)

_kernels = torch.ops.megatron_dmc  # csrc/bindings.cpp; tests put the emulated ones here


def dmc_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None,
    *,
    window: int = 12,
    offset: float = 5.0,
    temperature: float | None = None,
    noise: Tensor | LogisticNoise | None = None,
    documents: Documents | None = None,
    interleaved: bool = False,
    scale: float | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention over keys and values that merge into their predecessors.

    Arguments and results as for `reference.dmc_attention`, differentiable in `query`, `key` and `value`, and:

    Args:
        query, key, value: any strides with 1 in the last dimension, such as views of a fused projection.
        noise: a tensor, or `LogisticNoise`, drawn inside the kernel.
        kernel: one of `KERNELS` or "auto", see `choose_kernel`.

    Raises:
        ValueError: for arguments that do not fit or a kernel that cannot run; the message names the argument.
    """
    tensor_noise = None if isinstance(noise, LogisticNoise) else noise
    reference._check(query, key, value, rotary, window, temperature, tensor_noise, documents)
    if noise is not None and temperature is None:
        raise ValueError("noise belongs to soft decisions: give a temperature as well")
    kernel = choose_kernel(query, documents, kernel)
    if kernel == "reference":
        if isinstance(noise, LogisticNoise):
            noise = noise.sample(*key.shape[:3])
        return reference.dmc_attention(
            query, key, value, rotary,
            window=window, offset=offset, temperature=temperature, noise=noise, documents=documents,
            interleaved=interleaved, scale=scale,
        )  # fmt: skip
    check_fused(query, key, value, rotary, noise, kernel)
    borders, longest = None, 0
    if documents is not None:
        key, borders, longest = separate(key, documents.first), documents.borders, documents.longest
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if not 0 < window <= max_window(query.dtype, query.shape[-1]):
        return _attention_any_window(
            query, key, value, rotary, window, offset, temperature, noise, interleaved, scale, kernel, borders, longest
        )
    cos, sin = (None, None) if rotary is None else (t.float().contiguous() for t in rotary)
    drawn = noise if isinstance(noise, LogisticNoise) else LogisticNoise(None)
    output, alpha, *_ = torch.ops.megatron_dmc.attention(
        query, key, value, cos, sin, None if tensor_noise is None else tensor_noise.float().contiguous(), drawn.key,
        drawn.stream, drawn.first_head, drawn.scale, borders, longest, window, offset, temperature, interleaved, scale,
        kernel,
    )  # fmt: skip
    return output, alpha


def zero_out_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: Rotary | None,
    *,
    last_channel: float,
    documents: Documents | None = None,
    interleaved: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`reference.zero_out_attention`, in memory linear in the length with documents, too, where flash runs."""
    settings = dict(last_channel=last_channel, interleaved=interleaved, scale=scale)
    if documents is None or not flash_takes(query):
        return reference.zero_out_attention(query, key, value, rotary, documents=documents, **settings)
    reference._check(query, key, value, rotary, 0, None, None, documents)
    query, key = (reference.fade_last_channel(x, rotary, last_channel, interleaved) for x in (query, key))
    rows = map(heads_first, (query, key, value))
    output, _ = attend("flash", *rows, scale, True, documents.borders, documents.longest)
    return output.permute(2, 0, 1, 3)


def choose_kernel(query: Tensor, documents: Documents | None = None, kernel: str = "auto") -> str:
    """Which of `KERNELS` runs for queries `[s, b, h, d]` like these and `documents` (or `None`) where `kernel` is asked
    for. It is that one, but flash, which knows documents, for cuDNN, which does not.

    "auto" asks for cuDNN on Hopper and later, else for PyTorch's flash kernel; for the reference on CPUs, in float32
    and float64, for other head sizes, and where the extension was not built. cuDNN's backward pass is not
    deterministic: under `torch.use_deterministic_algorithms` "auto" asks for flash.

    Raises:
        ValueError: for a kernel of another name.
    """
    if kernel == "auto":
        kernel = _fastest_kernel(query)
    elif kernel not in KERNELS:
        raise ValueError(f"kernel must be auto or one of {', '.join(KERNELS)}; got {kernel!r}")
    return "flash" if kernel == "cudnn" and documents is not None else kernel


def _fastest_kernel(query: Tensor) -> str:
    if (reason := _unsupported(query)) is not None:
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            warnings.warn(f"DMC attention runs on the slow reference operations: {reason}", stacklevel=3)
        return "reference"
    if query.dtype == torch.float32:
        return "reference"
    return "flash" if _no_cudnn(query) else "cudnn"


def flash_takes(query: Tensor) -> bool:
    """Whether PyTorch's flash kernel takes queries `[s, b, h, d]` like these. (The fused kernels take fewer.)"""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    channels, capability = query.shape[-1], torch.cuda.get_device_capability(query.device)
    if channels % 8 == 0 and channels <= 256 and capability >= (8, 0):
        return True
    warnings.warn(
        f"attention within packed documents takes memory quadratic in their length: the flash kernel takes heads of "
        f"multiples of 8 up to 256 channels, on compute capability 8.0 or later; there are {channels}, on "
        f"{capability[0]}.{capability[1]}",
        stacklevel=3,
    )
    return False


def _no_cudnn(query: Tensor) -> str | None:
    """Why cuDNN's attention cannot take queries like these, or `None`. (Hopper's is the first that is worth it.)"""
    if torch.cuda.get_device_capability(query.device)[0] < 9 or not _has_cudnn():
        return "it needs Hopper or later and cuDNN 9"
    if query.shape[-1] > 128 or query.shape[0] < 2:
        return f"it takes heads of at most 128 channels and 2 tokens or more; query is {tuple(query.shape)}"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward pass is not deterministic"
    return None


@torch.compiler.assume_constant_result
def _has_cudnn() -> bool:
    try:
        return torch.backends.cudnn.is_available() and torch.backends.cudnn.version() >= 90000
    except RuntimeError as error:  # another cuDNN was loaded before torch's own
        warnings.warn(f"DMC attention runs on the flash kernel, because torch cannot use cuDNN: {error}", stacklevel=2)
        return False


def _unsupported(query: Tensor) -> str | None:
    """Why the fused kernels cannot take queries like these, or `None`."""
    if not query.is_cuda:
        return f"the fused kernels need a CUDA device, query is on {query.device}"
    if (reason := load_extension()) is not None:
        return reason
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the fused kernels take bfloat16, float16 and float32, query is {query.dtype}"
    if query.shape[-1] not in HEAD_SIZES:
        return f"the fused kernels are built for heads of {HEAD_SIZES} channels, query has {query.shape[-1]}"
    if torch.cuda.get_device_capability(query.device)[0] < 8:
        return "the fused kernels need compute capability 8.0 or later"
    return None


def check_fused(query, key, value, rotary, noise, kernel) -> None:
    if (reason := _unsupported(query)) is not None:
        raise ValueError(f"kernel {kernel!r} cannot run: {reason}; use kernel='reference'")
    if query.dtype == torch.float32 and kernel != "dense":
        raise ValueError(f"kernel {kernel!r} takes bfloat16 and float16, query is float32; use 'dense' or 'reference'")
    if kernel == "cudnn" and (reason := _no_cudnn(query)) is not None:
        raise ValueError(f"kernel 'cudnn' cannot run: {reason}; use 'flash'")
    for name, x in dict(query=query, key=key, value=value).items():
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name} must have query's dtype and device, {query.dtype} on {query.device}; "
                f"got {x.dtype} on {x.device}"
            )
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must have stride 1 in its last dimension; its strides are {x.stride()}")
    others = dict(cos=rotary and rotary[0], sin=rotary and rotary[1])
    others["noise"] = noise.key if isinstance(noise, LogisticNoise) else noise
    for name, x in others.items():
        if x is not None and x.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}; it is on {x.device}")


@torch.compiler.assume_constant_result
def load_extension() -> str | None:
    """Load the compiled operators; returns why there are none, or `None` when they are there."""
    return _load_extension()


@functools.cache
def _load_extension() -> str | None:
    spec = find_spec("megatron_dmc._cuda")
    if spec is None or spec.origin is None:
        return (
            "the CUDA extension was not built; install megatron-dmc where nvcc is on the PATH (pip install -v . says "
            "what it does)"
        )
    torch.ops.load_library(spec.origin)
    _register_fakes()
    return None


@torch.compiler.assume_constant_result
def max_window(dtype: torch.dtype, channels: int) -> int:
    return _kernels.max_window(dtype, channels)


# The heavy part. Tensors are [b, h|g, s, d] views; the log-sum-exp is [b, h, s] in float32.

_aten = torch.ops.aten


def attend(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = True,
    borders: Tensor | None = None, longest: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp. If not `causal`, every query sees every key, of which there may be another number.

    `borders` and `longest` are those of `Documents`, which do not see each other.
    """
    if kernel == "flash" and borders is not None:
        rows = (_as_rows(x) for x in (query, key, value))
        output, lse = attend_documents(*rows, scale, (borders, longest), (borders, longest))
        return _as_sequences(output, query), lse.unflatten(1, (len(query), -1)).transpose(0, 1)
    if kernel == "cudnn":
        output, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
    elif kernel == "flash":
        output, lse, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    else:
        scores = _dense_scores(query, key, scale, causal, borders)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse[..., None]).unflatten(1, (key.shape[1], -1))
        output = torch.einsum("bgrij,bgjd->ibgrd", weights, value.float()).flatten(2, 3).to(query.dtype)
        output = output.contiguous().permute(1, 2, 0, 3)
    return output, lse.view(output.shape[:3])


def attend_documents(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, of_queries: tuple[Tensor, int],
    of_keys: tuple[Tensor, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp of the flash kernel, causal within documents. Differentiable.

    Args:
        query, key, value: rows `[tokens, h | g, d]`, one document after the other.
        of_queries, of_keys: where documents begin among the rows and their end, int32 `[documents + 1]`, and the tokens
            of the longest. Of a document with more keys than queries, the last query sees the last key.

    Returns:
        `[tokens, h, d]` and float32 `[h, tokens]`.
    """
    (borders, longest), (key_borders, longest_key) = of_queries, of_keys
    output, lse, *_ = _aten._flash_attention_forward(
        query, key, value, borders, key_borders, longest, longest_key, 0.0, True, False, scale=scale
    )
    return output, lse


def attend_backward(
    kernel: str, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float,
    causal: bool = True, borders: Tensor | None = None, longest: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value; `output` and `lse` may be of more keys than these."""
    s, n, lse = query.shape[2], key.shape[2], lse.contiguous()
    unused = torch.empty((), dtype=torch.int64, device=query.device)  # dropout's random state
    if kernel == "flash" and borders is not None:
        rows = (_as_rows(x) for x in (grad, query, key, value, output))
        grads = _aten._flash_attention_backward(
            *rows, lse.transpose(0, 1).flatten(1).contiguous(), borders, borders, longest, longest, 0.0, causal, unused,
            unused, scale=scale,
        )  # fmt: skip
        return tuple(_as_sequences(x, query) for x in grads)
    if kernel == "cudnn":
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, output, lse[..., None], unused, unused, None, None, None, s, n, 0.0, causal,
            scale=scale,
        )  # fmt: skip
    if kernel == "flash":
        return _aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, output, lse, None, None, s, n, 0.0, causal, unused, unused, scale=scale
        )
    grouped = lambda x: x.float().unflatten(1, (key.shape[1], -1))  # noqa: E731
    weights = torch.exp(_dense_scores(query, key, scale, causal, borders) - lse[..., None])
    delta = (grad.float() * output.float()).sum(-1, keepdim=True)
    grad_weights = torch.einsum("bgrid,bgjd->bgrij", grouped(grad), value.float()).flatten(1, 2)
    grad_scores = grouped(weights * (grad_weights - delta) * scale)
    grads = (
        torch.einsum("bgrij,bgjd->ibgrd", grad_scores, key.float()).flatten(2, 3),
        torch.einsum("bgrij,bgrid->jbgd", grad_scores, grouped(query)),
        torch.einsum("bgrij,bgrid->jbgd", grouped(weights), grouped(grad)),
    )
    return tuple(g.to(query.dtype).contiguous().permute(1, 2, 0, 3) for g in grads)


def _as_rows(x: Tensor) -> Tensor:
    """From sequences `[b, heads, s, d]` to their tokens `[b·s, heads, d]`."""
    return x.transpose(1, 2).flatten(0, 1)


def _as_sequences(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(0, (len(like), -1)).transpose(1, 2)


def _dense_scores(query: Tensor, key: Tensor, scale: float, causal: bool, borders: Tensor | None) -> Tensor:
    scores = torch.einsum("bgrid,bgjd->bgrij", query.float().unflatten(1, (key.shape[1], -1)), key.float())
    scores = scores.flatten(1, 2) * scale
    if not causal:
        return scores
    if borders is not None:
        count = torch.arange(query.shape[0] * query.shape[2], dtype=borders.dtype, device=query.device)
        document = torch.bucketize(count, borders, right=True).view(len(query), 1, -1)
        scores = scores.masked_fill(document[..., None] != document[:, :, None], -math.inf)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(future, -math.inf)


def heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


def tokens_first(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3).contiguous()


# Everything from prepared tensors on. `bias_per_channel` times a key's last channel is its bias.


def query_channel(dtype: torch.dtype, scale: float) -> float:
    """The queries' last channel: `1 / scale` as `dtype` can hold it, so that keys hold about the bias itself."""
    return torch.tensor(1 / scale, dtype=dtype).item()


def _merged_attention(
    query, key, value, diagonal, borders, longest, scale, bias_per_channel, kernel
) -> tuple[Tensor, Tensor]:
    output, lse = attend(kernel, *map(heads_first, (query, key, value)), scale, True, borders, longest)
    output, lse = tokens_first(output), lse.contiguous()
    _kernels.merge_diagonal_(output, lse, diagonal, key, value, bias_per_channel)
    return output, lse


def _merged_attention_backward(
    grad_output, query, key, value, output, lse, diagonal, cos, sin, borders, longest, interleaved, scale,
    bias_per_channel, kernel,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of what was given to *prepare*'s rotation: queries, merged keys and values; and of the biases."""
    grad_output = readable(grad_output)
    rows = map(heads_first, (grad_output, query, key, value, output))
    grads = attend_backward(kernel, *rows, lse, scale, True, borders, longest)
    grad_query, grad_key, grad_value = map(tokens_first, grads)
    grad_bias = _kernels.merge_diagonal_backward_(
        grad_output, output, lse, diagonal, query, key, value, grad_query, grad_key, grad_value, cos, sin, interleaved,
        scale, bias_per_channel,
    )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_bias


def readable(x: Tensor) -> Tensor:
    """`x`, or a copy whose rows the kernels can read 16 bytes at a time."""
    whole = 16 // x.element_size()
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    readable = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % whole == 0 for stride in strides)
    return x if readable else x.clone(memory_format=torch.contiguous_format)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    noise: Tensor | None,
    noise_key: Tensor | None,
    noise_stream: int,
    noise_first_head: int,
    noise_scale: float,
    borders: Tensor | None,
    longest: int,
    window: int,
    offset: float,
    temperature: float | None,
    interleaved: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns output and alpha, and for the backward pass: prepared query, key and value, log-sum-exp, the diagonal's
    scores, importance."""
    channel = query_channel(query.dtype, scale)
    query, key, value, diagonal, alpha, weight = _kernels.prepare(
        readable(query), readable(key), readable(value), cos, sin, noise, noise_key, noise_stream, noise_first_head,
        window, offset, temperature, interleaved, scale, channel, noise_scale=noise_scale,
    )  # fmt: skip
    output, lse = _merged_attention(query, key, value, diagonal, borders, longest, scale, scale * channel, kernel)
    return output, alpha, query, key, value, lse, diagonal, weight


def _backward(
    grad_output: Tensor | None,
    grad_alpha: Tensor | None,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    attention_query: Tensor,
    attention_key: Tensor,
    attention_value: Tensor,
    output: Tensor,
    lse: Tensor,
    diagonal: Tensor,
    alpha: Tensor,
    weight: Tensor,
    borders: Tensor | None,
    longest: int,
    window: int,
    temperature: float | None,
    interleaved: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_output is None:  # only the decisions were used
        grad_output = torch.zeros_like(output)
    grad_query, grad_merged_key, grad_merged_value, grad_bias = _merged_attention_backward(
        grad_output, attention_query, attention_key, attention_value, output, lse, diagonal, cos, sin, borders, longest,
        interleaved, scale, scale * query_channel(key.dtype, scale), kernel,
    )  # fmt: skip
    grad_key, grad_value = _kernels.prepare_backward_(
        grad_query, grad_merged_key, grad_merged_value, grad_bias, grad_alpha, readable(key), readable(value), alpha,
        weight, window, temperature,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


_attention = torch.library.custom_op("megatron_dmc::attention", mutates_args=(), device_types="cuda")(_forward)
_attention_backward = torch.library.custom_op("megatron_dmc::attention_backward", mutates_args=(), device_types="cuda")(
    _backward
)


@_attention.register_fake
def _(query, key, value, *_):
    s, b, h, _ = query.shape
    scores = query.new_empty(b, h, s, dtype=torch.float32)
    scalars = query.new_empty(key.shape[:3], dtype=torch.float32)
    rows = [x.new_empty(x.shape) for x in (query, query, key, value)]
    return rows[0], scalars, *rows[1:], scores, torch.empty_like(scores), torch.empty_like(scalars)


@_attention_backward.register_fake
def _(grad_output, grad_alpha, key, value, cos, sin, attention_query, *_):
    return tuple(x.new_empty(x.shape) for x in (attention_query, key, value))


def _save(ctx, inputs, output):
    _, key, value, cos, sin, *_, borders, longest, window, _, temperature, interleaved, scale, kernel = inputs
    out, alpha, query_, key_, value_, lse, diagonal, weight = output
    ctx.save_for_backward(key, value, cos, sin, query_, key_, value_, out, lse, diagonal, alpha, weight, borders)
    ctx.settings = longest, window, temperature, interleaved, scale, kernel
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_alpha, *_):
    grads = torch.ops.megatron_dmc.attention_backward(grad_output, grad_alpha, *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * 15


_attention.register_autograd(_differentiate, setup_context=_save)


def _register_fakes() -> None:
    """What the compiled operators return, for tracing."""

    @torch.library.register_fake("megatron_dmc::prepare")
    def _(query, key, value, *_):
        s, b, h, _ = query.shape
        rows = [x.new_empty(x.shape) for x in (query, key, value)]
        scalars = query.new_empty(key.shape[:3], dtype=torch.float32)
        return *rows, query.new_empty(b, h, s, dtype=torch.float32), scalars, torch.empty_like(scalars)

    for name in ("merge_past_", "merge_diagonal_", "paged_attention_", "paged_chunks_"):
        torch.library.register_fake(f"megatron_dmc::{name}", lambda *_: None)

    @torch.library.register_fake("megatron_dmc::merge_diagonal_backward_")
    def _(grad_output, output, lse, diagonal, query, key, *_):
        return key.new_empty(key.shape[:3], dtype=torch.float32)

    @torch.library.register_fake("megatron_dmc::prepare_backward_")
    def _(grad_query, grad_key, grad_value, grad_bias, grad_alpha, key, value, *_):
        return key.new_empty(key.shape), value.new_empty(value.shape)


# Any window: a merge of PyTorch operations, then the same attention.


def _attention_any_window(
    query, key, value, rotary, window, offset, temperature, noise, interleaved, scale, kernel, borders, longest
) -> tuple[Tensor, Tensor]:
    if isinstance(noise, LogisticNoise):
        noise = noise.sample(*key.shape[:3])

    def prepare(query: Tensor, key: Tensor, value: Tensor):
        alpha, keep = reference.decide(key, offset, temperature, noise)
        weight = reference.importance(query, key.shape[2], offset)
        if 0 < window < len(key):
            merged_key, merged_value = reference.merge(key, value, weight, alpha, window)
        else:
            merged_key, merged_value = unlimited.merge(key, value, weight, alpha)
        rotated = (reference.rotate_without_last(x, rotary, interleaved) for x in (query, merged_key))
        return *(x.to(query.dtype) for x in (*rotated, merged_value)), reference.key_bias(keep), alpha

    # The merge's intermediate sums are many times its inputs: recompute them.
    *prepared, bias, alpha = checkpoint(prepare, query, key, value, use_reentrant=False, preserve_rng_state=False)
    return _BiasedAttention.apply(*prepared, bias, borders, longest, scale, kernel), alpha


class _BiasedAttention(torch.autograd.Function):
    """Causal attention with a bias per key `[s, b, g]`, but not for a token's own key; last channels must be 0."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, borders: Tensor | None, longest: int,
        scale: float, kernel: str,
    ) -> Tensor:  # fmt: skip
        channel = query_channel(query.dtype, scale)
        groups = query.float().unflatten(2, (key.shape[2], -1))
        diagonal = (groups * key.float()[:, :, :, None]).sum(-1).flatten(2).permute(1, 2, 0).contiguous() * scale
        query, key = (
            query.clone(memory_format=torch.contiguous_format),
            key.clone(memory_format=torch.contiguous_format),
        )
        query[..., -1] = channel
        key[..., -1] = (bias / (scale * channel)).clamp(min=-30000.0)
        value = value.contiguous()
        output, lse = _merged_attention(query, key, value, diagonal, borders, longest, scale, scale * channel, kernel)
        ctx.save_for_backward(query, key, value, output, lse, diagonal, borders)
        ctx.settings = longest, scale, scale * channel, kernel
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        query, key, value, output, lse, diagonal, borders = ctx.saved_tensors
        longest, *settings = ctx.settings
        grads = _merged_attention_backward(
            grad_output, query, key, value, output, lse, diagonal, None, None, borders, longest, False, *settings
        )
        return *grads, None, None, None, None
