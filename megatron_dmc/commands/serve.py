"""`megatron-dmc serve`: serve a retrofitted model over HTTP, with OpenAI's interface."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dmc.config import DMCError
from megatron_dmc.cpu import emulate_cuda

if TYPE_CHECKING:
    from megatron_dmc.front_end import FrontEnd
    from megatron_dmc.llm import AsyncLLM
    from megatron_dmc.ranks import Lifeline

KEY_VARIABLE = "MEGATRON_DMC_API_KEY"

EXAMPLES = f"""\
examples:
  megatron-dmc serve checkpoints/dmc-4x
  {KEY_VARIABLE}=… megatron-dmc serve checkpoints/dmc-4x --host 0.0.0.0 --port 8000 --cache-gib 20
  torchrun --nproc-per-node 8 -m megatron_dmc serve checkpoints/dmc-4x --tensor-model-parallel-size 4
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{{"prompt": "import os", "max_tokens": 32, "temperature": 0}}'

CHECKPOINT is the folder that --save named in training (its latest iteration), or one iter_… folder in it. If the
environment variable {KEY_VARIABLE} is set, requests need it as their API key. SIGTERM lets running requests finish
(torchrun kills its ranks 30 seconds after it got one). Under torchrun, ranks that the sizes below leave over are data
parallel; the server is that of rank 0.
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
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, help="ranks that share a layer (default: 1)"
    )
    parser.add_argument(
        "--pipeline-model-parallel-size", type=int, default=1, help="ranks that share out the layers (default: 1)"
    )
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now, if it has moved since training")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default: 0)")
    args = parser.parse_args()
    _check(args)

    emulate_cuda()
    try:
        from megatron_dmc.front_end import FrontEnd, listen
        from megatron_dmc.openai_requests import ServerOptions
    except ModuleNotFoundError as error:
        raise DMCError(f'serving needs the package {error.name}: pip install "megatron-dmc[serve]"') from error

    if int(os.environ.get("RANK", "0")):
        _follow(args)
        return
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
    with FrontEnd(listen(args.host, args.port), options) as front_end:
        _lead(args, front_end)


def _engine(args: argparse.Namespace) -> tuple[AsyncLLM, Lifeline]:
    """This rank's part of the engine, and its connection to the others."""
    from megatron_dmc.checkpoint import load
    from megatron_dmc.llm import AsyncLLM
    from megatron_dmc.ranks import Lifeline, meeting_host

    loaded = load(
        args.checkpoint,
        tokenizer_model=args.tokenizer_model,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
    )
    host = meeting_host()
    llm = AsyncLLM(
        loaded,
        cache_fp8=args.cache_fp8,
        coordinator_host=host,
        seed=args.seed,
        max_sequence_length=args.max_sequence_length,
        cache_gib=args.cache_gib,
        memory_share=args.memory_share,
        max_requests=args.max_requests,
        max_step_tokens=args.max_step_tokens,
    )
    return llm, Lifeline(host)


def _lead(args: argparse.Namespace, front_end: FrontEnd) -> None:
    """Rank 0: the engine with the HTTP server in front, until that has ended, or anything that it needs."""
    from megatron_dmc.front_end import EngineAddress

    llm, lifeline = _engine(args)
    front_end.open(EngineAddress.of(llm))  # before a signal can write into the same pipe
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: front_end.end())
    coordinator = llm.engine.inference_coordinator_process
    reason = None
    while reason is None and front_end.process.is_alive():
        front_end.process.join(0.2)
        if lifeline.lost is not None:
            reason = f"rank {lifeline.lost} has died"
        elif llm.engine.engine_loop_task.done():
            reason = "the engine has ended"
        elif not coordinator.is_alive():
            reason = "the coordinator's process has ended"
    if reason is None and front_end.process.exitcode:
        reason = "the process of the HTTP server has ended"
    if reason is None:
        if asyncio.run(end_engine(llm)):
            lifeline.end()
            return
        reason = "the engine does not end"
    print(f"megatron-dmc serve: {reason}", file=sys.stderr, flush=True)
    front_end.died(reason)
    front_end.process.join(10)
    front_end.process.kill()
    coordinator.kill()
    sys.stdout.flush()
    os._exit(1)  # what is left of a dead engine, threads and collectives, might never end; the other ranks follow


async def end_engine(llm: AsyncLLM) -> bool:
    """End the engine on all ranks, and its coordinator; returns whether the ranks have heard of it."""
    process, ended = llm.engine.inference_coordinator_process, False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(30):
            await llm.shutdown()
            ended = True
    await asyncio.to_thread(process.join, 2)  # the message that ends it may have been lost with its socket
    process.kill()
    process.join()
    return ended


def _follow(args: argparse.Namespace) -> None:
    """The other ranks: the engine, until rank 0 ends it or dies."""
    llm, _ = _engine(args)
    for number in (signal.SIGTERM, signal.SIGINT):  # for rank 0 to mind, which has requests to finish
        signal.signal(number, signal.SIG_IGN)
    engine = llm.engine.engine_loop_task
    while not engine.done():  # to await it would be in vain: its event loop dies with it
        time.sleep(0.2)
    if engine.exception() is not None:  # Megatron has printed it
        sys.stderr.flush()
        os._exit(1)  # by which rank 0 learns of it; what is left of the engine might never end
    asyncio.run(llm.shutdown())


def _check(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if numeric and name not in ("port", "seed", "drain_seconds") and value <= 0:
            raise DMCError(f"--{name.replace('_', '-')} must be above 0; got {value}")
    if not 0 <= args.port < 65536:
        raise DMCError(f"--port must be 0 to 65535; got {args.port}")
    if args.drain_seconds < 0:
        raise DMCError(f"--drain-seconds must be 0 or more; got {args.drain_seconds}")
