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
        ops.merge_diagonal_(output, lse, diagonal, ak, av, 8 * scale)
        grads = [torch.randn_like(x) for x in (query, key, value)]
        grad_bias = ops.merge_diagonal_backward_(
            grad, output, lse, diagonal, aq, ak, av, *grads, *rotary, interleaved, scale, 8 * scale
        )
        ops.prepare_backward_(*grads, grad_bias, torch.randn_like(alpha), key, value, alpha, weight, window, 0.5)
        torch.cuda.synchronize()
        print(dtype, tokens, channels, "done", flush=True)


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
