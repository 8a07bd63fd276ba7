"""Training attention: DMC's beside plain cuDNN causal attention with rotation, FlexAttention and a dense bias.

    python benchmarks/training_attention.py [--out benchmarks/results/training-attention-h200.json]

One run on one GPU measures everything. Forward keeps what backward needs; times are medians of CUDA graph replays.
The decisions merge about three tokens of four, as at a compression ratio of 4.
- plain: rotation (the fastest of Transformer Engine's fused kernel and torch.compile) and cuDNN attention.
- dmc: everything from unrotated queries, keys and values on; with `--windows` also with these instead of 12.
- flex, dense: attention alone, on tensors that are already merged and rotated, with the same bias per key: as
  FlexAttention's score function, and as the bias in the last channel whose diagonal a dense bias takes back (the
  published implementation's way).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

try:
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb as transformer_engine_rotation
except ImportError:
    transformer_engine_rotation = None
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import circumstances, copy_bandwidth, milliseconds, save, table
from megatron_dmc.ops import fused
from megatron_dmc.ops.noise import LogisticNoise

SHAPES = {  # tokens, sequences, query heads, KV heads, channels
    "llama2_7b_4x4096": (4096, 4, 8, 8, 128),
    "llama3_8b_1x8192": (8192, 1, 32, 8, 128),
    "llama2_7b_2x4096_tp1": (4096, 2, 32, 32, 128),
}
WINDOW, OFFSET, TEMPERATURE = 12, 5.0, 0.1


def projection(tokens, sequences, heads, kv_heads, channels):
    """Queries, keys and values as views of one fused projection, and as the layer makes them."""
    group = heads // kv_heads
    qkv = torch.randn(tokens, sequences, kv_heads, group + 2, channels, device="cuda")
    qkv[..., group, -1] = OFFSET + 1.8 * torch.randn_like(qkv[..., 0, 0]) + 2.0
    qkv = qkv.bfloat16()
    query = qkv[..., :group, :].flatten(2, 3) if group > 1 else qkv[..., 0, :]
    return [x.requires_grad_() for x in (query.detach(), qkv[..., group, :].detach(), qkv[..., group + 1, :].detach())]


def angles(tokens, channels):
    frequencies = 500000.0 ** (-torch.arange(0, channels, 2, device="cuda") / channels)
    return torch.arange(tokens, device="cuda")[:, None] * frequencies


def rotations(angle):
    """Ways to rotate queries and keys `[s, b, h, d]`; the fastest is the ceiling's."""
    angle = torch.cat([angle, angle], -1)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]

    @torch.compile
    def compiled(x):
        first, second = x.float().chunk(2, -1)
        return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    ways = {"torch.compile": compiled}
    if transformer_engine_rotation is not None:
        angle = angle[:, None, None].float()
        ways["transformer_engine"] = lambda x: transformer_engine_rotation(x, angle, tensor_format="sbhd", fused=True)
    return ways


def measure(name, forward, inputs, grad, flops):
    """Times, rates and peak memory of `forward` and of the gradients of its output."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = forward()
    torch.autograd.grad(output, inputs, grad)
    peak = torch.cuda.max_memory_allocated() - before
    del output

    def both():
        torch.autograd.grad(forward(), inputs, grad)

    forward_ms, both_ms = milliseconds(forward), milliseconds(both)
    row = dict(
        way=name, forward_ms=forward_ms, backward_ms=both_ms - forward_ms, both_ms=both_ms,
        forward_tflops=flops / forward_ms / 1e9, backward_tflops=2.5 * flops / (both_ms - forward_ms) / 1e9,
        peak_mib=peak / 2**20,
    )  # fmt: skip
    print(name, {k: round(v, 4) for k, v in row.items() if k != "way"}, flush=True)
    return row


def attention(shape, bandwidth, windows):
    tokens, sequences, heads, kv_heads, channels = shape
    group, scale = heads // kv_heads, 1 / math.sqrt(channels)
    flops = 4 * sequences * heads * tokens**2 * channels / 2
    query, key, value = projection(*shape)
    grad = torch.randn(tokens, sequences, heads, channels, device="cuda", dtype=torch.bfloat16)
    angle = angles(tokens, channels)
    rotary = (angle.cos(), angle.sin())
    noise = LogisticNoise.draw(query.device)
    heads_first = lambda x: x.permute(1, 2, 0, 3)  # noqa: E731

    def dmc(window=WINDOW):
        return fused.dmc_attention(
            query, key, value, rotary, window=window, offset=OFFSET, temperature=TEMPERATURE, noise=noise
        )[0]

    rows, ways = [measure("dmc", dmc, (query, key, value), grad, flops)], {}
    for window in windows:
        name = f"window {window}" if window else "no window"
        rows.append(measure(name, lambda window=window: dmc(window), (query, key, value), grad, flops))
    for name, rotate in rotations(angle).items():

        def plain(rotate=rotate):
            q, k, v = (heads_first(x) for x in (rotate(query), rotate(key), value))
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                output = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
            return output.permute(2, 0, 1, 3)

        try:
            row = measure(f"plain, rotation by {name}", plain, (query, key, value), grad, flops)
            ways[row["both_ms"]] = row
        except Exception as error:  # a peer that cannot run must not hide the rest
            print(f"rotation by {name} failed: {error!r}"[:300])
    plain = ways[min(ways)]
    rows.append(plain)

    # Attention alone, on prepared tensors.
    channel = fused.query_channel(torch.bfloat16, scale)
    prepared = torch.ops.megatron_dmc.prepare(
        query, key, value, *rotary, None, noise.key, 0, 0, WINDOW, OFFSET, TEMPERATURE, False, scale, channel
    )
    aq, ak, av = (x.detach() for x in prepared[:3])
    bias = (ak[..., -1].float() * scale * channel).permute(1, 2, 0).contiguous().requires_grad_()
    q, k, v = (heads_first(x).detach().contiguous().requires_grad_() for x in (aq, ak, av))

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def biased(score, batch, head, i, j):
            return score + torch.where(i == j, 0.0, bias[batch, head // group, j])

        mask = create_block_mask(lambda batch, head, i, j: i >= j, None, None, tokens, tokens, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(q, k, v, score_mod=biased, block_mask=mask, enable_gqa=group > 1)

    def dense():
        def run():
            wide = bias.repeat_interleave(group, 1).bfloat16()
            q2 = torch.cat([q[..., :-1] * scale, torch.ones_like(q[..., :1])], -1)
            k2 = torch.cat([k[..., :-1].repeat_interleave(group, 1), wide[..., None]], -1)
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
                return scaled_dot_product_attention(
                    q2, k2, v.repeat_interleave(group, 1), attn_mask=torch.diag_embed(-wide), is_causal=True, scale=1.0
                )

        return run

    for name, make in (("flex", flex), ("dense", dense)):
        try:
            rows.append(measure(name, make(), (q, k, v, bias), heads_first(grad).contiguous(), flops))
        except Exception as error:
            print(f"{name} failed: {error!r}"[:500])
    torch.cuda.empty_cache()
    return rows, kernels(shape, query, key, value, rotary, noise, prepared, grad, bandwidth)


def kernels(shape, query, key, value, rotary, noise, prepared, grad, bandwidth):
    """Each of our kernels alone: bytes, counted once, over time, over copy bandwidth."""
    channels = shape[-1]
    scale = 1 / math.sqrt(channels)
    channel = fused.query_channel(torch.bfloat16, scale)
    aq, ak, av, diagonal, alpha, weight = (x.detach() for x in prepared)
    q, k, v = query.detach(), key.detach(), value.detach()
    ops = torch.ops.megatron_dmc
    output, lse = fused.attend("cudnn", *(x.permute(1, 2, 0, 3) for x in (aq, ak, av)), scale)
    output, lse = output.permute(2, 0, 1, 3).contiguous(), lse.contiguous()
    # What the diagonal misses nothing of is not touched, and not counted.
    missing = (ak[..., -1] != 0).float().mean().item()
    row, kv_row, scalars, scores = q.nbytes, k.nbytes, alpha.nbytes, lse.nbytes
    tables = 2 * rotary[0].nbytes
    gq, gk, gv = torch.randn_like(aq), torch.randn_like(ak), torch.randn_like(av)
    gbias, galpha = torch.randn_like(alpha), torch.randn_like(alpha)
    runs = {
        "prepare_fwd": (
            lambda: ops.prepare(
                q, k, v, *rotary, None, noise.key, 0, 0, WINDOW, OFFSET, TEMPERATURE, False, scale, channel
            ),
            2 * row + 4 * kv_row + scores + 2 * scalars + tables,
        ),
        "merge_fwd": (
            lambda: ops.merge_diagonal_(output, lse, diagonal, ak, av, scale * channel),
            missing * (2 * row + kv_row + 3 * scores) + scalars // 2,
        ),
        "merge_bwd": (
            lambda: ops.merge_diagonal_backward_(
                grad, output, lse, diagonal, aq, ak, av, gq, gk, gv, *rotary, False, scale, scale * channel
            ),
            2 * row + 6 * kv_row + missing * (3 * row + 2 * scores) + scalars + tables,
        ),
        "prepare_bwd": (
            lambda: ops.prepare_backward_(gq, gk, gv, gbias, galpha, k, v, alpha, weight, WINDOW, TEMPERATURE),
            6 * kv_row + 4 * scalars + row // channels,
        ),
    }
    rows = []
    for name, (run, size) in runs.items():
        ms = milliseconds(run)
        rows.append(
            dict(kernel=name, ms=ms, mib=size / 2**20, tb_per_s=size / ms / 1e9, bandwidth=size / ms * 1e3 / bandwidth)
        )
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows, dict(merged=(alpha > 0.5).float().mean().item(), diagonals_missing=missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/training-attention.json")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only these (default: all)")
    parser.add_argument("--windows", type=int, nargs="+", default=[], help="other windows; 0: no limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="to note where the checkout has no history")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    bandwidth = copy_bandwidth()
    result = dict(circumstances(args.commit), seed=args.seed, copy_tb_per_s=bandwidth / 1e12, shapes={}, ratios={})
    print({k: v for k, v in result.items() if k not in ("shapes", "ratios")})
    text = []
    for name in args.shape or SHAPES:
        print(f"== {name}", flush=True)
        ways, (kernel_rows, decisions) = attention(SHAPES[name], bandwidth, args.windows)
        by_way = {row["way"].split(",")[0]: row for row in ways}
        ratios = {row["kernel"] + "_bandwidth": row["bandwidth"] for row in kernel_rows}
        ours, plain = by_way["dmc"], by_way["plain"]
        for direction in ("fwd", "bwd"):
            part = dict(fwd="forward_ms", bwd="backward_ms")[direction]
            ratios[f"attention_{direction}_over_plain"] = ours[part] / plain[part]
        for peer in ("flex", "dense"):
            if peer in by_way:
                ratios[f"{peer}_over_attention"] = by_way[peer]["both_ms"] / ours["both_ms"]
        for way, row in by_way.items():
            if "window" in way:
                ratios[f"{way.replace(' ', '_')}_over_dmc"] = row["both_ms"] / ours["both_ms"]
        result["shapes"][name] = dict(shape=SHAPES[name], **decisions, ways=ways, kernels=kernel_rows)
        result["ratios"][name] = ratios
        columns = ["way", "forward_ms", "backward_ms", "forward_tflops", "backward_tflops", "peak_mib"]
        text += [
            f"\n{name}",
            table(ways, columns),
            table(kernel_rows, ["kernel", "ms", "mib", "tb_per_s", "bandwidth"]),
        ]
        text += [f"{key}: {value:.3f}" for key, value in ratios.items()]
        torch.cuda.empty_cache()
    print("\n".join(text))
    save(result, args.out)


if __name__ == "__main__":
    main()
