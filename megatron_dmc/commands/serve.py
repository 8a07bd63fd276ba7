"""`megatron-dmc serve`: serve a retrofitted model over HTTP, with OpenAI's interface."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from megatron_dmc.config import DMCError
from megatron_dmc.cpu import emulate_cuda

KEY_VARIABLE = "MEGATRON_DMC_API_KEY"

EXAMPLES = f"""\
examples:
  megatron-dmc serve checkpoints/dmc-4x
  {KEY_VARIABLE}=… megatron-dmc serve checkpoints/dmc-4x --host 0.0.0.0 --port 8000 --cache-gib 20
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{{"prompt": "import os", "max_tokens": 32, "temperature": 0}}'

CHECKPOINT is the folder that --save named in training (its latest iteration), or one iter_… folder in it. If the
environment variable {KEY_VARIABLE} is set, requests need it as their API key. SIGTERM lets running requests finish.
Paths: /v1/completions, /v1/chat/completions, /v1/models, /health, /ready, /metrics."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="megatron-dmc serve",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of the stage retrofit or finetune")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: 8000)")
    parser.add_argument("--model-name", help="what requests call the model (default: the checkpoint folder's name)")
    parser.add_argument(
        "--max-sequence-length", type=int, help="of prompt and answer (default: what the model was trained for)"
    )
    parser.add_argument("--max-requests", type=int, help="requests in the cache at once (default: by its memory)")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--cache-gib", type=float, help="memory for the cache in GiB")
    memory.add_argument(
        "--memory-share", type=float, default=0.9, help="or the share of what is free on the device (default: 0.9)"
    )
    parser.add_argument("--cache-fp8", action="store_true", help="store the cache's entries in 8 bits")
    parser.add_argument("--max-step-tokens", type=int, default=8192, help="tokens of one step (default: 8192)")
    parser.add_argument(
        "--max-concurrent", type=int, default=256, help="answers under way before requests get 429 (default: 256)"
    )
    parser.add_argument("--max-body-mib", type=float, default=4, help="size of a request in MiB (default: 4)")
    parser.add_argument("--max-prompt-tokens", type=int, help="of one prompt (default: what a sequence holds)")
    parser.add_argument("--max-new-tokens", type=int, help="of one answer (default: what a sequence holds)")
    parser.add_argument("--request-timeout", type=float, help="seconds that a request may take (default: any time)")
    parser.add_argument(
        "--drain-seconds", type=float, default=30, help="for running requests to finish at the end (default: 30)"
    )
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now, if it has moved since training")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    args = parser.parse_args()
    _check(args)

    emulate_cuda()
    try:
        from megatron_dmc import messages  # noqa: F401
        from megatron_dmc.openai_requests import ServerOptions
        from megatron_dmc.server import EngineBackend, run
    except ModuleNotFoundError as error:
        raise DMCError(f'serving needs the package {error.name}: pip install "megatron-dmc[serve]"') from error
    from megatron_dmc.llm import AsyncLLM

    llm = AsyncLLM(
        args.checkpoint,
        tokenizer_model=args.tokenizer_model,
        cache_fp8=args.cache_fp8,
        coordinator_host="127.0.0.1",
        seed=args.seed,
        max_sequence_length=args.max_sequence_length,
        cache_gib=args.cache_gib,
        memory_share=args.memory_share,
        max_requests=args.max_requests,
        max_step_tokens=args.max_step_tokens,
    )
    backend = EngineBackend(llm)
    options = ServerOptions(
        model_name=args.model_name or Path(args.checkpoint).resolve().name,
        api_key=os.environ.get(KEY_VARIABLE) or None,
        max_concurrent=args.max_concurrent,
        max_body_bytes=int(args.max_body_mib * 2**20),
        max_prompt_tokens=args.max_prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        request_timeout=args.request_timeout,
        drain_seconds=args.drain_seconds,
    )

    async def serve() -> bool:
        alive = False
        try:
            alive = await run(backend, options, args.host, args.port)
        except DMCError:
            alive = True
            raise
        finally:
            if alive:
                await backend.close()
        return alive

    if not asyncio.run(serve()):
        backend.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # what is left of a dead engine, threads and sockets, might never end


def _check(args: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DMCError(
            f"checkpoints are loaded into one process so far, and WORLD_SIZE is {os.environ['WORLD_SIZE']}: start one "
            "server for each GPU, without torchrun"
        )
    for name, value in vars(args).items():
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if numeric and name not in ("port", "seed", "drain_seconds") and value <= 0:
            raise DMCError(f"--{name.replace('_', '-')} must be above 0; got {value}")
    if not 0 <= args.port < 65536:
        raise DMCError(f"--port must be 0 to 65535; got {args.port}")
    if args.drain_seconds < 0:
        raise DMCError(f"--drain-seconds must be 0 or more; got {args.drain_seconds}")
