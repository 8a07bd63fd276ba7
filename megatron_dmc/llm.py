"""Serve a DMC model from Python: `LLM`, and `AsyncLLM` for programs built on asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.inference import inference_client
from megatron.core.inference.apis import MegatronAsyncLLM, MegatronLLM, _llm_base
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.sampling_params import SamplingParams

from megatron_dmc.checkpoint import LoadedModel, load
from megatron_dmc.config import DMCError
from megatron_dmc.engine import DMCController, DMCInferenceContext, DMCInferenceEngine, failure
from megatron_dmc.openai_answers import Tokens


def inference_config(
    *,
    max_sequence_length: int,
    cache_gib: float | None = None,
    memory_share: float = 0.9,
    max_requests: int | None = None,
    max_step_tokens: int = 8192,
    prompt_log_probs: bool = False,
    cuda_graphs: int = 16,
    **settings: Any,
) -> InferenceConfig:
    """Megatron's `InferenceConfig` with what serving DMC usually wants; the one place where defaults stand.

    Args:
        max_sequence_length: the longest sequence, prompt and answer.
        cache_gib: memory for the whole cache in GiB; by default
        memory_share: of what is free on the device now.
        max_requests: requests at once, at most (`DMCInferenceContext`).
        max_step_tokens: tokens of one step, at most; longer prompts enter in chunks.
        prompt_log_probs: keep logits of all tokens, which log-probabilities of prompts need.
        cuda_graphs: sizes of batch that steps of decoding are captured for, at most.
        settings: anything else of `InferenceConfig`.
    """
    if cache_gib is None:
        if not 0 < memory_share <= 1:
            raise DMCError(f"memory_share must be above 0 and at most 1; got {memory_share}")
        cache_gib = torch.cuda.mem_get_info()[0] * memory_share / 2**30
    return InferenceConfig(
        **{
            "max_sequence_length": max_sequence_length,
            "buffer_size_gb": cache_gib,
            "max_requests": max_requests,
            "max_tokens": max_step_tokens,
            "materialize_only_last_token_logits": not prompt_log_probs,
            "enable_chunked_prefill": True,
            "num_cuda_graphs": cuda_graphs,
            **settings,
        }
    )


@contextlib.contextmanager
def _classes_of_dmc(model: Any, fp8: bool, coordinator: bool) -> Iterator[None]:
    """While this is open, Megatron's LLM classes build DMC's context, controller, engine and client.

    Their constructor names the classes that it builds and takes no others.
    """
    engine = DMCInferenceEngine
    with contextlib.ExitStack() as patches:
        if coordinator:
            try:
                from megatron_dmc import messages, serving_engine
            except ModuleNotFoundError as error:
                raise DMCError(
                    f'a coordinator needs the package {error.name}: pip install "megatron-dmc[serve]"'
                ) from error
            engine = serving_engine.ServingEngine
            patches.enter_context(mock.patch.object(inference_client, "InferenceClient", messages.StreamingClient))
        patches.enter_context(
            mock.patch.multiple(
                _llm_base,
                DynamicInferenceContext=lambda _, config: DMCInferenceContext(model, config, fp8=fp8),
                TextGenerationController=DMCController,
                DynamicInferenceEngine=engine,
            )
        )
        yield


class _FromCheckpoint:
    """What `LLM` and `AsyncLLM` add to Megatron's classes: they begin with a checkpoint.

    Args:
        checkpoint: a checkpoint of the stage retrofit or finetune (`megatron_dmc.checkpoint.load`), or what `load`
            returned.
        tokenizer_model: where the tokenizer is now, if it has moved since training.
        tensor_model_parallel_size, pipeline_model_parallel_size: how torchrun's ranks split the model; what is left of
            them is data parallel. Every rank constructs the object with the same arguments. Without the coordinator
            all of them generate, each the same text of the same prompts; with it, rank 0 alone may be asked
            (`is_primary_rank`) and the others wait (`wait_for_shutdown`).
        cache_fp8: store the cache's entries in 8 bits.
        use_coordinator, coordinator_host, coordinator_port: Megatron's coordinator, which deals requests out to
            data-parallel ranks.
        seed: of random choices.
        max_sequence_length: the longest sequence, prompt and answer; by default what the model was trained for.
        settings: memory and limits, see `inference_config`.

    Raises:
        DMCError: for a checkpoint or settings that cannot be served.
    """

    def __init__(
        self,
        checkpoint: str | Path | LoadedModel,
        *,
        tokenizer_model: str | None = None,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        cache_fp8: bool = False,
        use_coordinator: bool = True,
        coordinator_host: str | None = None,
        coordinator_port: int | None = None,
        seed: int = 0,
        max_sequence_length: int | None = None,
        **settings: Any,
    ) -> None:
        loaded = checkpoint
        if not isinstance(loaded, LoadedModel):
            loaded = load(
                checkpoint,
                tokenizer_model=tokenizer_model,
                tensor_model_parallel_size=tensor_model_parallel_size,
                pipeline_model_parallel_size=pipeline_model_parallel_size,
            )
        self.loaded = loaded
        limit = loaded.args.max_position_embeddings
        length = limit if max_sequence_length is None else max_sequence_length
        if loaded.args.position_embedding_type == "learned_absolute" and length > limit:
            raise DMCError(f"max_sequence_length {length} exceeds the model's {limit} positions")
        loaded.model.config.inference_sampling_seed = seed
        with _classes_of_dmc(loaded.model, cache_fp8, coordinator=use_coordinator):
            super().__init__(
                model=loaded.model,
                tokenizer=loaded.tokenizer,
                inference_config=inference_config(max_sequence_length=length, **settings),
                use_coordinator=use_coordinator,
                coordinator_host=coordinator_host,
                coordinator_port=coordinator_port,
            )


class LLM(_FromCheckpoint, MegatronLLM):
    """Generate from a compressed cache, many prompts at a time.

        llm = LLM("checkpoints/dmc-4x", cache_gib=20)
        for request in llm.generate(["import os", "class Queue"], SamplingParams(top_k=1, num_tokens_to_generate=64)):
            print(request.generated_text)

    `generate`, `shutdown` and the rest are those of Megatron's `MegatronLLM`. Requests that cannot be served come back
    with the status FAILED and an event that says why.

    Args:
        checkpoint, settings: see `_FromCheckpoint`; without the coordinator, unless asked for.
    """

    def __init__(self, checkpoint: str | Path | LoadedModel, *, use_coordinator: bool = False, **settings: Any) -> None:
        super().__init__(checkpoint, use_coordinator=use_coordinator, **settings)

    def stream(
        self, prompts: list[str] | list[list[int]], sampling_params: SamplingParams | None = None
    ) -> Iterator[tuple[int, list[int], bool]]:
        """Generate, and yield what each step brought: `(prompt's index, its next tokens, whether it has ended)`.

        Tokens that may turn out to belong to a stop word come once that is settled. Without the coordinator only.

        Raises:
            DMCError: if one of the prompts cannot be served; then none is.
        """
        engine = self.engine
        ids = [int(next(engine.request_counter)) for _ in prompts]
        try:
            futures = [engine.add_request(i, p, sampling_params) for i, p in zip(ids, prompts, strict=True)]
            for index, future in enumerate(futures):
                if future.done():
                    raise DMCError(f"prompt {index} cannot be served: {failure(future.result()[-1])}")
            given, running = [0] * len(ids), set(range(len(ids)))
            while running:
                engine.step_modern()
                for index in sorted(running):
                    ended = futures[index].done()
                    record = futures[index].result() if ended else engine.requests[ids[index]].record
                    tokens = [t for piece in record.requests for t in piece.generated_tokens]
                    words = record[-1].stop_word_ids
                    settled = len(tokens) - (max(map(len, words)) if words and not ended else 0)
                    if settled > given[index] or ended:
                        yield index, tokens[given[index] : settled], ended
                        given[index] = max(settled, given[index])
                    running -= {index} if ended else set()
        finally:  # nobody waits for what is left
            for request_id in ids:
                engine.cancel(request_id)
            while engine.has_unfinished_requests():
                engine.step_modern()
            engine.forget_failed()


class AsyncLLM(_FromCheckpoint, MegatronAsyncLLM):
    """The same for asyncio, over Megatron's `MegatronAsyncLLM` and its coordinator: `await llm.generate(…)`."""

    def __init__(self, checkpoint: str | Path | LoadedModel, **settings: Any) -> None:
        super().__init__(checkpoint, **settings)
        self._end_stream: set[Callable[[], None]] = set()

    async def shutdown(self) -> None:
        """As Megatron's; streams that are open end with a `DMCError`."""
        for end in list(self._end_stream):
            end()
        await super().shutdown()

    async def stream(
        self, prompt: str | list[int], sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[Tokens]:
        """Generate, and yield what each step brought: tokens, and log-probabilities if they were asked for.

        Tokens that may turn out to belong to a stop word come once that is settled. Closing the generator cancels the
        request. On rank 0 alone.

        Raises:
            DMCError: if the prompt cannot be served, or the engine is shut down before the answer has ended.
        """
        self._assert_primary()
        down = DMCError("the engine has been shut down")
        if self._shutdown_called:
            raise down
        here, arrived = asyncio.get_running_loop(), asyncio.Queue()
        client = self._coord_runtime.client

        def end() -> None:
            following.cancel()
            with contextlib.suppress(RuntimeError):  # the stream's event loop has ended before
                here.call_soon_threadsafe(arrived.put_nowait, down)

        async def follow() -> None:
            """On the event loop of the client, whose thread is another."""
            try:
                async with contextlib.aclosing(client.stream(prompt, sampling_params or SamplingParams())) as pieces:
                    async for piece in pieces:
                        here.call_soon_threadsafe(arrived.put_nowait, piece)
                here.call_soon_threadsafe(arrived.put_nowait, None)
            except Exception as error:
                here.call_soon_threadsafe(arrived.put_nowait, error)

        following = self._loop_manager.submit(follow())
        self._end_stream.add(end)
        try:
            while (item := await arrived.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._end_stream.discard(end)
            following.cancel()
