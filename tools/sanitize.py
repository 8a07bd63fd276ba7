"""Run the CUDA kernels under compute-sanitizer, on a GPU:

    python tools/sanitize.py [memcheck racecheck initcheck synccheck]

The exit code is that of the first tool that finds something. Shapes are small and fit nothing: tiles, warps and groups
of heads are all cut short somewhere.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def kernels() -> None:
    import math

    import torch

    from megatron_dmc.ops import fused

    reason = fused.load_extension()
    if reason is not None:
        raise SystemExit(reason)
    ops = torch.ops.megatron_dmc
    for dtype, tokens, sequences, heads, kv_heads, channels, window, width, interleaved in (
        (torch.bfloat16, 197, 2, 6, 3, 128, 12, 128, False),
        (torch.bfloat16, 70, 1, 4, 1, 64, 33, 32, True),
        (torch.float16, 45, 3, 2, 2, 256, 17, 256, False),
        (torch.float16, 130, 1, 3, 3, 96, 1, 20, False),
        (torch.float32, 50, 2, 4, 2, 64, 12, 0, False),
    ):
        query = torch.randn(tokens, sequences, heads, channels, device="cuda").to(dtype)
        key, value = (torch.randn(tokens, sequences, kv_heads, channels, device="cuda").to(dtype) for _ in range(2))
        angle = torch.rand(tokens, width // 2, device="cuda")
        rotary = (angle.cos(), angle.sin()) if width else (None, None)
        noise_key = torch.zeros(1, dtype=torch.int64, device="cuda")
        scale = 1 / math.sqrt(channels)
        prepared = ops.prepare(
            query, key, value, *rotary, None, noise_key, 0, 0, window, 0.0, 0.5, interleaved, scale, 8.0
        )
        aq, ak, av, diagonal, alpha, weight = prepared
        output, lse, grad = torch.randn_like(query), torch.randn_like(diagonal), torch.randn_like(query)
        ops.merge_past_(output[1:], lse[..., 1:], torch.randn_like(query)[1:], torch.randn_like(diagonal)[..., 1:])
        ops.merge_diagonal_(output, lse, diagonal, ak, av, 8 * scale)
        grads = [torch.randn_like(x) for x in (query, key, value)]
        grad_bias = ops.merge_diagonal_backward_(
            grad, output, lse, diagonal, aq, ak, av, *grads, *rotary, interleaved, scale, 8 * scale
        )
        ops.prepare_backward_(*grads, grad_bias, torch.randn_like(alpha), key, value, alpha, weight, window, 0.5)
        torch.cuda.synchronize()
        print(dtype, tokens, channels, "done", flush=True)
    generation()


def generation() -> None:
    """Chunks and decoding, and both in one step, over several pages and heads."""
    import torch

    from megatron_dmc.cache import CacheShape, PagedCache
    from megatron_dmc.ops.paged import paged_attention

    for dtype, heads, kv_heads, channels, window, fp8 in (
        (torch.bfloat16, 6, 3, 128, 12, False),
        (torch.float16, 4, 1, 64, 0, False),
        (torch.bfloat16, 2, 2, 256, 5, False),
        (torch.bfloat16, 4, 2, 128, 12, True),
        (torch.float16, 3, 3, 96, 1, False),
    ):
        shape = CacheShape(1, 3, heads, kv_heads, channels, 400, window, fp8)
        cache = PagedCache(shape, 300, dtype=dtype, device="cuda")
        # Whole boxes of keys are read, with their scales, and scores of those that do not exist thrown away; initcheck
        # minds the reading.
        cache.pages.view(torch.uint8).zero_()
        if cache.scales is not None:
            cache.scales.zero_()
        angle = torch.rand(400, channels // 2, device="cuda")
        for slots, new_tokens, chunks in (
            ([], 1, {0: 170, 2: 33}),
            ([2, -1], 1, {0: 150, 1: 1}),
            ([0, 1, 2], 8, {}),
            ([1, 0], 1, {}),
        ):
            slots, chunk_slots = (torch.tensor(list(x), dtype=torch.int64, device="cuda") for x in (slots, chunks))
            step = cache.begin(slots, new_tokens, chunk_slots=chunk_slots, chunk_lengths=list(chunks.values()))
            query, key, value = (
                torch.randn(step.tokens, n, channels, device="cuda").to(dtype) for n in (heads, kv_heads, kv_heads)
            )
            paged_attention(query, key, value, (angle.cos(), angle.sin()), cache, 0, step, offset=0.0)
            cache.commit(step)
            assert step.ok
        torch.cuda.synchronize()
        print("generation", dtype, channels, "done", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["kernels"]:
        kernels()
        sys.exit()
    environment = os.environ | dict(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    for tool in sys.argv[1:] or ["memcheck", "racecheck", "initcheck", "synccheck"]:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "kernels"]
        code = subprocess.run(command, env=environment).returncode
        print(f"{tool}: {'clean' if code == 0 else f'exit code {code}'}", flush=True)
        if code:
            sys.exit(code)
