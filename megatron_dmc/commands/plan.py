"""`megatron-dmc plan`: what a recipe takes on a number of GPUs, and its commands; nothing runs, no GPU is needed."""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from typing import Any

from megatron_dmc.arguments import as_on_hopper, gpt_config, parse
from megatron_dmc.config import DMCError
from megatron_dmc.recipe import ENDPOINT, Command, Launch, add_arguments, resolve

EXAMPLES = """\
examples:
  megatron-dmc plan examples/recipes/llama-2-7b.yaml --gpus 64
  megatron-dmc plan examples/recipes/llama-3.1-70b.yaml --gpus 128 --compression 8 --set global-batch-size=1024
  megatron-dmc plan examples/recipes/qwen2.5-7b.yaml --gpus 8 --json

Memory and GPU-hours are estimates, not measurements. `megatron-dmc run` carries the plan out."""

GIB = 2**30
FILLED = 0.9
"""Share of a GPU's memory that an estimate may fill. The rest is for CUDA, NCCL, workspaces and fragmentation."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="megatron-dmc plan",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        "--gpu-tflops", type=float, default=989.0,
        help="a GPU's dense bf16 peak, in TFLOP/s (default: 989, an H100 SXM)",
    )  # fmt: skip
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that the model's FLOPs reach (default: 0.4, assumed)"
    )
    parser.add_argument(
        "--gpu-memory-gib", type=float, default=79.0, help="a GPU's memory (default: 79, an 80 GB H100)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan = make_plan(parser.parse_args())
    print(json.dumps(plan.as_json(), indent=2) if plan.json else plan.as_text())


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on the most loaded GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    dmc: float
    teacher: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def parts(self) -> str:
        """Those that there are, in GiB."""
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in asdict(self).items() if size)


@dataclass(frozen=True)
class Plan:
    """A launch and what it is estimated to take.

    Attributes:
        args: Megatron's validated arguments, by stage.
        memory: of the stage that takes most.
        flops: the model's floating-point operations in one iteration, by stage.
        hours: GPU-hours, by stage.
    """

    launch: Launch
    args: dict[str, argparse.Namespace]
    memory: Memory
    flops: dict[str, float]
    hours: dict[str, float]
    assumptions: dict[str, float]
    json: bool = False

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens by stage."""
        args = self.args
        return {
            c.stage: c.iterations * args[c.stage].global_batch_size * args[c.stage].seq_length
            for c in self.launch.commands
        }

    @property
    def layout(self) -> dict[str, Any]:
        """Ranks along each dimension and batch sizes, of the first stage."""
        args = self.args[self.launch.commands[0].stage]
        return dict(
            gpus=self.launch.gpus,
            nodes=self.launch.nodes,
            tensor_parallel=args.tensor_model_parallel_size,
            sequence_parallel=args.sequence_parallel,
            pipeline_parallel=args.pipeline_model_parallel_size,
            virtual_pipeline=args.virtual_pipeline_model_parallel_size or 1,
            context_parallel=args.context_parallel_size,
            expert_parallel=args.expert_model_parallel_size,
            data_parallel=args.data_parallel_size,
            micro_batch_size=args.micro_batch_size,
            global_batch_size=args.global_batch_size,
            micro_batches=_micro_batches(args),
            sequence_length=args.seq_length,
        )

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values: bytes, tokens, FLOPs, hours, commands as words and as text for a shell."""
        stages = [
            dict(
                stage=command.stage,
                iterations=command.iterations,
                tokens=self.tokens[command.stage],
                flops_per_iteration=self.flops[command.stage],
                gpu_hours=self.hours[command.stage],
                begins_from=command.begins_from,
                folder=command.folder,
                command=command.words(),
                shell=command.shell(),
            )
            for command in self.launch.commands
        ]
        return dict(
            recipe=self.launch.recipe.name,
            compression=self.launch.compression,
            layout=self.layout,
            estimated_bytes_per_gpu=asdict(self.memory) | dict(total=self.memory.total),
            assumptions=self.assumptions,
            tokens=sum(self.tokens.values()),
            estimated_gpu_hours=sum(self.hours.values()),
            stages=stages,
        )

    def as_text(self) -> str:
        """The same to read."""
        at, memory = self.layout, self.memory
        virtual = f" (interleaved, {at['virtual_pipeline']} chunks)" if at["virtual_pipeline"] > 1 else ""
        lines = [
            f"{self.launch.recipe.name}, compression {self.launch.compression:g}x, on {at['gpus']} GPUs "
            f"({at['nodes']} node{'s' * (at['nodes'] > 1)})",
            "",
            f"layout      tensor {at['tensor_parallel']}{' with sequence' if at['sequence_parallel'] else ''}, "
            f"pipeline {at['pipeline_parallel']}{virtual}, context {at['context_parallel']}, "
            f"expert {at['expert_parallel']}, data {at['data_parallel']}",
            f"batch       {at['global_batch_size']:,} sequences of {at['sequence_length']:,} tokens: each replica "
            f"{at['micro_batches']} micro-batches of {at['micro_batch_size']}",
            f"memory      {memory.total / GIB:.1f} GiB per GPU (estimate): " + memory.parts,
            f"time        estimated at {self.assumptions['mfu']:.0%} of {self.assumptions['gpu_tflops']:g} TFLOP/s",
            "",
            f"{'stage':10}{'iterations':>12}{'tokens':>12}{'FLOP':>12}{'GPU-hours':>12}{'days':>8}",
        ]
        rows = [
            (c.stage, c.iterations, self.tokens[c.stage], c.iterations * self.flops[c.stage], self.hours[c.stage])
            for c in self.launch.commands
        ]
        rows.append(("in all", *(sum(row[i] for row in rows) for i in range(1, 5))))
        lines += [
            f"{name:10}{iterations:>12,}{tokens / 1e9:>11,.1f}B{flops:>12.2e}{hours:>12,.0f}"
            f"{hours / 24 / self.launch.gpus:>8.1f}"
            for name, iterations, tokens, flops, hours in rows
        ]
        if self.launch.nodes > 1:
            where = f"on each of the {self.launch.nodes} nodes"
            if any(ENDPOINT in c.launcher for c in self.launch.commands):
                where += f"; {ENDPOINT[1:]}: the first node and a free port, HOST:PORT"
            lines += ["", f"# {where}"]
        for command in self.launch.commands:
            lines += ["", f"# {command.stage}", command.shell()]
        return "\n".join(lines)


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan that parsed options ask for.

    Raises:
        DMCError: for a recipe that is wrong, a model that DMC or Megatron refuses, or one that does not fit.
    """
    for name in ("gpu_tflops", "mfu", "gpu_memory_gib"):
        if not getattr(options, name) > 0:
            raise DMCError(f"--{name.replace('_', '-')} must be above 0; got {getattr(options, name)}")
    launch = resolve(options)
    args = {command.stage: megatron_arguments(command, launch.gpus) for command in launch.commands}
    memory = max(map(estimate_memory, args.values()), key=lambda memory: memory.total)
    available = options.gpu_memory_gib * GIB * FILLED
    if memory.total > available:
        raise DMCError(
            f"{launch.recipe.name} on {launch.gpus} GPUs is estimated to take {memory.total / GIB:.1f} GiB per GPU "
            f"({memory.parts}); {available / GIB:.1f} of {options.gpu_memory_gib:g} GiB may be filled: use more GPUs, "
            "or --set a larger tensor-model-parallel-size, pipeline-model-parallel-size or context-parallel-size, or a "
            "smaller micro-batch-size, or recompute activations (--set recompute-granularity=full "
            "--set recompute-method=uniform --set recompute-num-layers=1)"
        )
    flops = {stage: _flops(parsed) for stage, parsed in args.items()}
    per_hour = options.mfu * options.gpu_tflops * 1e12 * 3600
    return Plan(
        launch,
        args,
        memory,
        flops,
        hours={command.stage: command.iterations * flops[command.stage] / per_hour for command in launch.commands},
        assumptions=dict(
            gpu_tflops=options.gpu_tflops, mfu=options.mfu, gpu_memory_gib=options.gpu_memory_gib, filled=FILLED
        ),
        json=options.json,
    )


def megatron_arguments(command: Command, gpus: int) -> argparse.Namespace:
    """A command's arguments, parsed and validated by Megatron as on Hopper GPUs, and the model checked by DMC.

    `padded_vocab_size` is set, which Megatron otherwise takes from the tokenizer.

    Raises:
        DMCError: for what Megatron or DMC refuses.
    """
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    from megatron_dmc.attention import check_model
    from megatron_dmc.commands.train import check_arguments

    what = f"the arguments of {command.stage}"
    args = parse(command.training(), gpus, what)
    check_arguments(args)
    with as_on_hopper(what):
        if args.padded_vocab_size is None:
            if args.vocab_size is None:
                raise DMCError(
                    "a plan must know the vocabulary: set padded-vocab-size (the embedding's rows) or vocab-size"
                )
            args.padded_vocab_size = calculate_padded_vocab_size(
                args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, False
            )
        unfused = copy.copy(args)
        unfused.apply_rope_fusion = False  # it asks for Transformer Engine, which need not be here
        config = gpt_config(unfused)
    check_model(config.transformer)
    stages = args.pipeline_model_parallel_size
    if args.virtual_pipeline_model_parallel_size is not None and _micro_batches(args) % stages:
        raise DMCError(
            f"an interleaved pipeline of {stages} stages takes multiples of {stages} micro-batches; each replica has "
            f"{_micro_batches(args)}: use fewer GPUs, a larger global-batch-size, or leave interleaving out "
            "(--set num-layers-per-virtual-pipeline-stage=false)"
        )
    return args


def _micro_batches(args: argparse.Namespace) -> int:
    return args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)


def _flops(args: argparse.Namespace) -> float:
    """Floating-point operations in an iteration, by Megatron's own count (recomputation not counted).

    A teacher's forward pass is a third of a training step's.
    """
    from megatron.training.training import num_floating_point_operations

    passes = 4 / 3 if args.dmc_teacher else 1
    return passes * num_floating_point_operations(copy.copy(args), args.global_batch_size)


def estimate_memory(args: argparse.Namespace) -> Memory:
    """Bytes on the most loaded GPU, in bf16 with Adam.

    Parameters are counted, and sharded, by Megatron's `compute_weight_and_optimizer_memory`, which has 2 bytes for a
    weight, 4 for its gradient and 12 for its float32 copy and two moments. The distributed optimizer shares the 12 out
    among data- and context-parallel ranks.

    Args:
        args: validated arguments, with `padded_vocab_size`.
    """
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    from megatron_dmc.distillation import SCORES

    def weights_and_optimizer(distributed: bool) -> float:
        changed = copy.copy(args)
        changed.use_distributed_optimizer = distributed
        changed.data_parallel_size = args.data_parallel_size * args.context_parallel_size
        return compute_weight_and_optimizer_memory(changed)

    parameters = weights_and_optimizer(distributed=False) / 18
    state = weights_and_optimizer(args.use_distributed_optimizer)
    activations, dmc = estimate_activations(args)
    teacher = 0.0
    if args.dmc_teacher:  # its weights, and logits of a micro-batch twice: its own, and the gradient in another copy
        tokens = args.micro_batch_size * args.seq_length / args.context_parallel_size
        logits = tokens * args.padded_vocab_size / args.tensor_model_parallel_size
        teacher = 2 * parameters + 2 * 2 * logits + 5 * 4 * min(logits, SCORES)
    return Memory(2 * parameters, 4 * parameters, state - 6 * parameters, activations, dmc, teacher)


def estimate_activations(args: argparse.Namespace) -> tuple[float, float]:
    """Bytes that wait for the backward pass on the most loaded GPU: the model's activations, and what DMC adds.

    Korthikanti et al., *Reducing Activation Recomputation in Large Transformer Models*, 2022, section 4, item by item:
    Megatron's own `compute_activation_memory` has their sum for models without SwiGLU, grouped queries, context
    parallelism and full recomputation. For a token, in bytes, with `h` the hidden size, `q` and `kv` the channels of
    all query and of all KV heads, `f` the MLP's hidden size:

    - inputs of the two norms 4h, of the QKV projection 2h, of the MLP 2h, shared out by sequence parallelism alone;
    - queries 2q, keys and values 4kv, attention's output 2q, and of the MLP 4f, with SwiGLU 6f, shared out by tensor
      parallelism. Fused attention keeps no scores; dropout is not counted. An expert's inputs and outputs count for
      each expert that a token is sent to, and a load that is in balance is assumed;
    - DMC: unrotated keys and values beside the merged ones 4kv; log-sum and score of a token's own entry 8 per query
      head, decision and weight 8 per KV head (`megatron_dmc.ops.fused`).

    Full recomputation keeps the inputs of layers (2h), and all of the layers that it is computing again. Recomputation
    by modules is counted for attention alone. The first pipeline stage holds as many micro-batches as there are stages
    (interleaved: somewhat more), the last one holds one, and the logits: 2 bytes in bf16, 4 for the softmax.
    """
    t, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    sequence = t if args.sequence_parallel else 1
    tokens = args.seq_length * args.micro_batch_size / args.context_parallel_size
    layers = args.num_layers / pp
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    q, kv = args.kv_channels * args.num_attention_heads, args.kv_channels * groups
    gated = 6 if args.swiglu else 4
    mlp = gated * args.ffn_hidden_size
    if args.num_experts is not None:
        mlp = args.moe_router_topk * (gated * args.moe_ffn_hidden_size + 4 * args.hidden_size)
        mlp += gated * (args.moe_shared_expert_intermediate_size or 0)
    attention = 2 * q + 4 * kv
    extra = 4 * kv + 8 * args.num_attention_heads + 8 * groups
    modules = args.recompute_modules or ["core_attn"]
    if args.recompute_granularity == "selective" and "core_attn" in modules:
        extra = 0  # attention's inputs are kept unrotated, once
    layer = tokens * (8 * args.hidden_size / sequence + (attention + 2 * q + mlp) / t)
    dmc = tokens * extra / t

    kept, kept_dmc, again = layers, layers, 0.0
    inputs = tokens * 2 * args.hidden_size / sequence
    if args.recompute_granularity == "full":
        at_once = min(args.recompute_num_layers or 1, layers)
        if args.recompute_method == "uniform":
            kept = kept_dmc = 0
            inputs *= layers / at_once
            again = at_once
        else:  # block: so many layers of a stage are computed again, one after the other
            kept = kept_dmc = layers - at_once
            inputs *= at_once
            again = 1
    else:
        inputs = 0

    in_flight = min(pp, _micro_batches(args))
    if args.virtual_pipeline_model_parallel_size is not None:
        in_flight = pp * (1 + (pp - 1) / (pp * args.virtual_pipeline_model_parallel_size))
    logits = tokens * 6 * args.padded_vocab_size / t
    first = in_flight * (kept * layer + inputs) + again * layer + (logits if pp == 1 else 0)
    last = kept * layer + inputs + again * layer + logits
    if first >= last:
        return first, (in_flight * kept_dmc + again) * dmc
    return last, (kept_dmc + again) * dmc
