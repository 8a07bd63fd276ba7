"""Generation by a model in two processes, and in one: torchrun runs this script, a test imports it.

Steps driven by hand over a context that knows the process groups, and Megatron's engine. With pipeline stages, each
receives hidden states and passes its own on, and the last shares its logits. In float64, so that another
order of summation changes no decision and no token.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from test_engine import greedy, serve
from test_layer import config, gpt

from megatron_dmc.cache import PagedCache
from megatron_dmc.config import DMCConfig
from megatron_dmc.context import PagedContext, cache_shape
from megatron_dmc.engine import PageAccount

LAYOUTS = dict(TP=dict(tensor_model_parallel_size=2), PP=dict(pipeline_model_parallel_size=2))
WINDOWS = (12, 0)
PROMPTS, NEW = (20, 31, 7, 24), 12  # their tokens, and those that follow each
CHUNK = 16  # tokens of prompts at once: prompts come in pieces
SCARCE = 3  # pages for each head: enough for any one sequence, whatever it merges, not for all
STEPS = 4  # of decoding, after the first tokens


def build(window):
    """The model, or this rank's part of it."""
    from megatron.core import parallel_state as mpu

    cfg = config(
        num_layers=4, params_dtype=torch.float64, pipeline_dtype=torch.float64,
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=mpu.get_pipeline_model_parallel_world_size(),
    )  # fmt: skip
    dmc = DMCConfig(dmc_stage="retrofit", dmc_init_val=0.5, dmc_window_size=window)
    ends = dict(pre_process=mpu.is_pipeline_first_stage(), post_process=mpu.is_pipeline_last_stage())
    return gpt(cfg, dmc, **ends).double().eval()  # norms as well


class Stage(torch.nn.Module):
    """One stage of a pipeline, or all of it, to be called as the whole model is."""

    def __init__(self, model):
        super().__init__()
        self.model, self.groups = model, (model.pg_collection.tp, model.pg_collection.pp)

    def forward(self, tokens, positions, mask, *, inference_context, **options):
        from megatron.core.inference import communication_utils as pipeline

        model, group = self.model, self.groups[1]
        if not model.pre_process:
            hidden = torch.empty(tokens.shape[1], 1, model.config.hidden_size, dtype=torch.float64)
            pipeline.recv_from_prev_pipeline_rank_(hidden, group)
            model.set_input_tensor(hidden)
        output = model(tokens, positions, mask, inference_context=inference_context, **options)
        if not model.post_process:
            pipeline.send_to_next_pipeline_rank(output, group)
            step = inference_context.step
            output = output.new_empty(1, len(step.slots) + len(step.chunk_slots), model.vocab_size)
        torch.distributed.broadcast(output, group=group, group_src=group.size() - 1)
        return output


class Recorded(PagedContext):
    """Notes whether each step is `ok`, and the cache `dry`, when it has begun and when it is committed."""

    def __init__(self, stage, cache):
        super().__init__(stage, cache, stage.groups)
        self.notes = []
        if cache.shape.window:
            cache.recent_weights = cache.recent_weights.double()  # in float32 it takes none of a model in float64

    def begin(self, *arguments, **options):
        step = super().begin(*arguments, **options)
        if step.last_weights is not None:
            step.last_weights = step.last_weights.double()
        self._note("begun", step)
        return step

    def commit(self):
        step = self.step
        super().commit()
        self._note("committed", step)

    def _note(self, when, step):
        self.notes.append((when, "chunks" if step.chunk_lengths else "decoding", bool(step.ok), bool(self.cache.dry)))


def generate(model, prompts, new=NEW, **options):
    """The text through the engine, and what is left of the cache."""
    llm = serve(model, max_requests=4, max_step_tokens=CHUNK, **options)
    context = llm.context
    if context.cache.shape.window:
        context.cache.recent_weights = context.cache.recent_weights.double()  # in float32 it takes none in float64
    begin = context.begin_step

    def in_float64():
        begin()
        if context.step.last_weights is not None:
            context.step.last_weights = context.step.last_weights.double()

    context.begin_step = in_float64
    results = llm.generate(prompts, greedy(new, termination_id=-1))
    statistics = context.cache.statistics()
    return dict(
        text=[list(r.generated_tokens) for r in results], tokens=context.account.ended_tokens,
        notes=llm.engine.evicted_request_count,
        entries=context.account.ended_entries, lost=statistics.pages - statistics.pages_free,
        left=int(statistics.entries.sum() + statistics.tokens.sum() + context.cache.dry),
    )  # fmt: skip


def steps(stage, tokens, dry=None):
    """Decoding, step by step; unless `dry` is `None`, each first beside a chunk that a dry rank has no page for,
    and behind a sequence's first token for which it has none.

    The sequences that decode stay within their first pages. The logits of the steps that count, and what is left.
    """
    from megatron.core.inference.utils import InferenceMode

    *decode, last = range(len(tokens))
    shape = cache_shape(stage, slots=len(tokens), max_tokens=tokens.shape[1])
    pages = len(tokens) * shape.layers * shape.kv_heads
    context = Recorded(stage, PagedCache(shape, pages, dtype=torch.float64, device="cpu"))
    entered, logits, free = [0] * len(tokens), [], context.cache._free_count

    def go(slots, chunks):
        step = context.begin(
            torch.tensor(slots, dtype=torch.int64),
            chunk_slots=torch.tensor(list(chunks), dtype=torch.int64), chunk_lengths=list(chunks.values()),
        )  # fmt: skip
        brings = dict.fromkeys(slots, 1) | chunks
        new = torch.cat([tokens[slot, entered[slot] : entered[slot] + n] for slot, n in brings.items()])[None]
        with InferenceMode.active():
            found = stage(new, context.positions(), None, inference_context=context, runtime_gather_output=True)
        context.commit()
        if step.ok:
            logits.append(found[0])
            for slot, n in brings.items():
                entered[slot] += n

    go([], {slot: 3 + slot for slot in decode})
    for _ in range(STEPS):
        if dry is not None:
            hidden = int(free) if dry else 0
            free -= hidden
            go(decode, {last: 9})
            go([last], {})
            free += hidden
        go(decode, {})
    go(decode, {last: 9})
    held, entries = (x.clone() for x in (context.cache.tokens[:-1], context.cache.lengths[:, :-1]))
    context.cache.release(torch.arange(len(tokens)))
    return dict(
        logits=torch.cat(logits), tokens=held, entries=entries, notes=context.notes,
        lost=pages - int(free), left=int(context.cache.lengths.sum()),
    )  # fmt: skip


@torch.no_grad()
def scenarios(model, prompts, tokens, ranks=1, rank=0):
    """All that is compared, by name. On two ranks also what happens when one of them runs out of pages.

    The engine admits requests whatever those that run still need, so that in the crowded cache some give way.
    """
    PageAccount.peak = lambda self, prompt, answer: 0.0
    stage = Stage(model)
    # Ranks with more memory than others do as those.
    found = dict(steps=steps(stage, tokens), greedy=generate(model, prompts, cache_gib=0.02 * (1 + rank)))
    found["crowded"] = generate(model, prompts, pages=SCARCE)
    for dry in range(ranks) if ranks > 1 else ():
        found[f"steps, rank {dry} dry"] = steps(stage, tokens, rank == dry)
    return found


def main(folder):
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    from megatron_dmc.cpu import emulate_cuda

    emulate_cuda()
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))  # for ranks that do not agree
    rank, given = torch.distributed.get_rank(), torch.load(folder / "given.pt")
    for layout, sizes in LAYOUTS.items():
        parallel_state.initialize_model_parallel(**sizes)
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        found = {}
        for window in WINDOWS:
            model = build(window)
            model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder / str(window))))
            found[window] = scenarios(model, **given, ranks=2, rank=rank)
        torch.save(found, folder / f"{layout} {rank}.pt")
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
