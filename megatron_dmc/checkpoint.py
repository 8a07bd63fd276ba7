"""Open a checkpoint of Megatron's distributed format to generate from it, whatever layout it was trained in."""

from __future__ import annotations

import atexit
import os
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.arguments import gpt_config
from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.cpu import CPU_ARGUMENTS, default_environment
from megatron_dmc.resume import TRACKER

NOT_THE_MODEL = dict(
    virtual_pipeline_model_parallel_size=None,
    num_layers_per_virtual_pipeline_stage=None,
    num_virtual_stages_per_pipeline_rank=None,
    pipeline_model_parallel_layout=None,
    decoder_first_pipeline_num_layers=None,
    decoder_last_pipeline_num_layers=None,
    account_for_embedding_in_pipeline_split=False,
    account_for_loss_in_pipeline_split=False,
    context_parallel_size=1,
    expert_model_parallel_size=1,
    expert_tensor_parallel_size=None,
    tensor_parallel_num_weight_shards=None,
    expert_tensor_parallel_num_weight_shards=None,
    gtp_weight_remat_size=1,
    expert_gtp_weight_remat_size=1,
    sequence_parallel=False,
    tp_comm_overlap=False,
    recompute_granularity=None,
    recompute_method=None,
    recompute_num_layers=None,
    cuda_graph_impl="none",
    gradient_accumulation_fusion=False,
    spec=None,
)
"""Arguments of a training run that do not concern the model itself, as generation needs them."""


@dataclass
class LoadedModel:
    """A model in evaluation mode, with what it was trained with.

    Attributes:
        model: Megatron's `GPTModel`.
        tokenizer: Megatron's tokenizer of the training run, or the one asked for.
        args: the arguments that the checkpoint holds, adapted to this process and its layout.
        dmc: DMC's settings, `dmc_stage` `None` for a model without.
    """

    model: Any
    tokenizer: Any
    args: Namespace
    dmc: DMCConfig

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def find_checkpoint(path: str | Path) -> Path:
    """The folder of one saved iteration: `path` itself, or the latest under the folder that `--save` named.

    Raises:
        DMCError: where there is none, or it is of another format.
    """
    from megatron.core.dist_checkpointing import check_is_distributed_checkpoint

    path = Path(path)
    tracker = path / TRACKER
    if tracker.is_file():
        latest = tracker.read_text().strip()
        path = path / (f"iter_{int(latest):07d}" if latest.isdigit() else latest)
    if not path.is_dir():
        raise DMCError(f"no checkpoint at {path}: give the folder that --save named, or one iter_… folder in it")
    if not check_is_distributed_checkpoint(str(path)):
        raise DMCError(f"{path} is not a checkpoint of Megatron's distributed format (--ckpt-format torch_dist)")
    return path


def load(
    path: str | Path,
    *,
    tokenizer_model: str | None = None,
    need_dmc: bool = True,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
) -> LoadedModel:
    """Load a checkpoint onto the GPU, or onto the CPU (in float32) where there is none.

    Under torchrun every rank calls this, and gets its part of the model.

    Args:
        path: see `find_checkpoint`.
        tokenizer_model: another place of the tokenizer than the one it had in training.
        need_dmc: refuse a checkpoint that has not been through `retrofit`.
        tensor_model_parallel_size, pipeline_model_parallel_size: the layout here, whatever it was in training; see
            `start_megatron`.

    Raises:
        DMCError: for a checkpoint, tokenizer or model that does not fit, or a layout that does not.
    """
    from megatron.core import dist_checkpointing

    path = find_checkpoint(path)
    args = dist_checkpointing.load_common_state_dict(str(path)).get("args")
    if args is None:
        raise DMCError(f"{path} holds no arguments to build the model from")
    if (pattern := getattr(args, "hybrid_layer_pattern", None)) is not None:
        raise DMCError(
            f"{path} is of a hybrid model ({pattern}): DMC trains those, and does not generate from them yet"
        )
    dmc = DMCConfig.from_args(args)
    if need_dmc and not dmc.merges:
        stage = f"only been through stage {dmc.dmc_stage}" if dmc.dmc_stage else "not been trained with DMC"
        raise DMCError(f"{path} has {stage}: its cache does not compress before the stage retrofit")
    padding = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    _check_layout(args, tensor_model_parallel_size, pipeline_model_parallel_size)
    start_megatron(tensor_model_parallel_size, pipeline_model_parallel_size)
    _adapt(args, tensor_model_parallel_size, pipeline_model_parallel_size)
    tokenizer = _tokenizer(args, tokenizer_model, padding)
    model = build_model(args, dmc)
    read_weights(model, path)
    return LoadedModel(model.eval(), tokenizer, args, dmc)


def read_weights(model: torch.nn.Module, path: Path) -> None:
    """The weights of a checkpoint, see `find_checkpoint`, into the model.

    Raises:
        DMCError: for weights that the checkpoint lacks.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    state = {"model": model.sharded_state_dict(metadata=dist_checkpointing.load_content_metadata(str(path)))}
    state, _, lacking = dist_checkpointing.load(state, str(path), strict=StrictHandling.RETURN_UNEXPECTED)
    # Where Transformer Engine is installed, norms are its own, whatever the layers are made of: they have a state of
    # 8-bit training, that a checkpoint from where it was not installed lacks.
    weights = sorted(name for name in lacking if "._extra_state" not in name)
    if weights:
        raise DMCError(f"{path} lacks weights of the model that its arguments describe: {', '.join(weights)}")
    missing, unknown = model.load_state_dict(state["model"], strict=False)
    left = sorted(name for name in [*missing, *unknown] if not name.endswith("._extra_state"))
    if left:
        raise DMCError(f"{path} does not fit the model that its arguments describe: {', '.join(left)}")


def _check_layout(args: Namespace, tp: int, pp: int) -> None:
    """Whether a model can be split so; before any rank waits for another."""
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    for size, name, count, what in (
        (tp, "tensor_model_parallel_size", groups, "KV heads"),
        (pp, "pipeline_model_parallel_size", args.num_layers, "layers"),
    ):
        if size < 1 or count % size:
            raise DMCError(f"{name} must divide the model's {count} {what}; got {size}")


def _adapt(args: Namespace, tp: int, pp: int) -> None:
    """From the training run's machine and layout to this process and its own."""
    from megatron.core import parallel_state

    vars(args).update(
        NOT_THE_MODEL,
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
    )
    if torch.cuda.get_device_name() == "CPU":  # emulated
        vars(args).update(CPU_ARGUMENTS, bf16=False, fp16=False, params_dtype=torch.float32, fp8=None)
        return
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        args.transformer_impl, args.no_persist_layer_norm = "local", True


def start_megatron(tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1) -> None:
    """Megatron's process groups: of torchrun's ranks, or of this process alone. What is left of them is data parallel.

    Raises:
        DMCError: for a number of processes that is no multiple of the layout, and where Megatron has been started with
            another one.
    """
    from megatron.core import parallel_state, tensor_parallel

    sizes = (tensor_model_parallel_size, pipeline_model_parallel_size)
    default_environment()
    world = int(os.environ["WORLD_SIZE"])
    if world % (sizes[0] * sizes[1]):
        raise DMCError(
            f"{sizes[0]} tensor-parallel ranks of {sizes[1]} pipeline stages need a multiple of {sizes[0] * sizes[1]} "
            f"processes, and there are {world}: torchrun --nproc-per-node {sizes[0] * sizes[1]} …"
        )
    if not torch.distributed.is_initialized():
        if world == 1:
            torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
        else:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group("nccl")
        atexit.register(_end_process_groups)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(*sizes)
        tensor_parallel.model_parallel_cuda_manual_seed(0)
    started = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if started != sizes:
        raise DMCError(f"Megatron has been started with {started} tensor and pipeline ranks; asked for are {sizes}")


def _end_process_groups() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _tokenizer(args: Namespace, tokenizer_model: str | None, padding: int) -> Any:
    """The tokenizer; its vocabulary, padded to a multiple of `padding`, must be the model's.

    Published models have other padding: Qwen2.5-7B 399 rows of 152,064. One row in a hundred is taken for that.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    trained_with = args.padded_vocab_size
    if tokenizer_model is not None:
        args.tokenizer_model = tokenizer_model
    try:
        tokenizer = build_tokenizer(args)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise DMCError(
            f"cannot build the checkpoint's tokenizer ({args.tokenizer_type}, {args.tokenizer_model}): {error}; "
            "if it has moved, say where to with --tokenizer-model"
        ) from error
    spare = max(padding - 1, trained_with // 100)
    if not trained_with - spare <= tokenizer.vocab_size <= trained_with:
        raise DMCError(
            f"the tokenizer {args.tokenizer_model} has {tokenizer.vocab_size} tokens, the model an embedding of "
            f"{trained_with}: give the tokenizer that the model was trained with"
        )
    tp = args.tensor_model_parallel_size
    args.padded_vocab_size = -(-trained_with // tp) * tp  # Megatron's checkpoints allow for another padding
    return tokenizer


def build_model(args: Namespace, dmc: DMCConfig, perform_initialization: bool = True) -> torch.nn.Module:
    """The model that arguments describe, this rank's part of it, on its device.

    Args:
        dmc: without a stage, the model is Megatron's own.
        perform_initialization: draw random weights.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder

    config = gpt_config(args)
    if dmc.dmc_stage is not None:
        from megatron_dmc.spec import dmc_layer_spec

        config.transformer_layer_spec = partial(dmc_layer_spec, dmc=dmc)
    config.transformer.perform_initialization = perform_initialization
    config.finalize()
    model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    return model.to(device=torch.cuda.current_device(), dtype=args.params_dtype)
