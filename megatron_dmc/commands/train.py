"""`megatron-dmc train`: Megatron's own pretraining of GPT and hybrid models, with a DMC stage where one is asked for.

The data and loss functions are what Megatron's `pretrain_gpt.py` and `pretrain_hybrid.py` have, which its wheel does
not bring.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from megatron_dmc import distillation
from megatron_dmc.arguments import gpt_config
from megatron_dmc.config import DMCConfig, DMCError, add_flags
from megatron_dmc.cpu import default_environment, emulate_cuda
from megatron_dmc.distillation import Teacher
from megatron_dmc.resume import TRACKER

EXAMPLES = """\
Megatron's training loop: every Megatron argument, and the --dmc-… flags (at the end of this page).
Without --dmc-stage the model trains as it is. A stage begins with --finetune from the checkpoint of the one before.

examples (MODEL stands for the architecture, batch size and data arguments, the same in each):
  torchrun --nproc-per-node 8 -m megatron_dmc train MODEL --dmc-stage zero-out --load base --finetune \\
      --save zero-out --train-iters 250
  torchrun --nproc-per-node 8 -m megatron_dmc train MODEL --dmc-stage retrofit --dmc-cr 4 --load zero-out --finetune \\
      --save retrofit --train-iters 12000
  torchrun --nproc-per-node 8 -m megatron_dmc train MODEL --dmc-stage finetune --dmc-cr 4 --load retrofit --finetune \\
      --save dmc-4x --train-iters 2000
To go on after an interruption, give the same line with --load set to the stage's own --save, and no --finetune.
"""


def main() -> None:
    emulate_cuda()
    default_environment()

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_dmc.megatron_hooks import keep_compiled_helpers

    keep_compiled_helpers()
    args = parse_and_validate_args(extra_args_provider=_arguments)
    dmc, teacher = check_arguments(args)
    _without_apex(args)
    _check_checkpoint_exists(args)
    hybrid = args.hybrid_layer_pattern is not None
    if hybrid and find_spec("transformer_engine") is None:
        raise DMCError("--hybrid-layer-pattern: Megatron's hybrid models are made of Transformer Engine; install it")
    model = (hybrid_config_from_args if hybrid else gpt_config)(args)
    if dmc.dmc_stage is not None:
        if hybrid:
            from megatron_dmc.hybrid import dmc_stack

            model.hybrid_stack_spec = dmc_stack(args.hybrid_layer_pattern, dmc=dmc)
        else:
            from megatron_dmc.spec import dmc_layer_spec

            model.transformer_layer_spec = partial(dmc_layer_spec, dmc=dmc)
    _datasets.is_distributed = True
    if teacher is not None:
        teacher.check(args)
    forward_step = partial(_forward_step, teacher)
    try:
        pretrain(pretrain_cfg_container_from_args(args, model), _datasets, ModelType.encoder_or_decoder, forward_step)
    finally:
        if torch.distributed.is_initialized() and sys.exc_info()[0] is None:
            torch.distributed.destroy_process_group()


def check_arguments(args: argparse.Namespace) -> tuple[DMCConfig, Teacher | None]:
    """The settings and the teacher that a run's arguments ask for; a plan checks its commands by this as well.

    Raises:
        DMCError: for arguments that do not go together.
    """
    from megatron_dmc import megatron_hooks

    dmc = DMCConfig.from_args(args)
    if args.sft:
        raise DMCError("--sft needs the data sets of Megatron's own pretrain_gpt.py: run that with --spec")
    if args.overlap_moe_expert_parallel_comm:
        raise DMCError(megatron_hooks.OVERLAPPED_EXPERTS)
    if dmc.dmc_stage is not None:
        if args.spec is not None:
            raise DMCError("--spec and --dmc-stage both name the layers: leave one of them out")
        megatron_hooks.check_arguments(args, dmc)
    elif args.dataloader_inter_document_masking and args.context_parallel_size > 1:
        raise DMCError(
            "--dataloader-inter-document-masking with --context-parallel-size above 1 and no --dmc-stage: Megatron's "
            "own attention expects every document shared out by itself, and here whole sequences are; leave one of the "
            "two out"
        )
    return dmc, Teacher.from_args(args)


def _without_apex(args: argparse.Namespace) -> None:
    """Switch off, where Apex is missing, what Megatron has on by default and cannot build a model with."""
    from megatron.core.tensor_parallel import layers

    if args.gradient_accumulation_fusion and not layers._grad_accum_fusion_available:
        args.gradient_accumulation_fusion = False
        if args.rank == 0:
            print("megatron-dmc: gradient accumulation is not fused, for want of Apex (fused_weight_gradient_mlp_cuda)")


def _arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    for action in parser._actions:  # some of Megatron's own help has a bare percent sign, on which argparse stumbles
        try:
            _ = (action.help or "") % vars(action)
        except (TypeError, ValueError):
            action.help = action.help.replace("%", "%%")
    parser.prog = "megatron-dmc train"
    parser.usage = "torchrun … -m megatron_dmc train [--dmc-stage STAGE] [MEGATRON'S ARGUMENTS]"
    parser.description = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return distillation.add_flags(add_flags(parser))


def _check_checkpoint_exists(args: argparse.Namespace) -> None:
    """Megatron starts from random weights where `--load` has nothing; a stage of DMC must not."""
    from megatron.training.checkpointing import checkpoint_exists

    if args.dmc_stage is None or args.load is None or checkpoint_exists(args.load):
        return
    if args.pretrained_checkpoint is None:
        raise DMCError(f"no checkpoint in --load {args.load} (it must be a folder with {TRACKER})")


def _datasets(num_samples: list[int], vp_stage: int | None = None):
    """Training, validation and test datasets of the given numbers of samples."""
    from megatron.core import parallel_state
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import get_blend_and_blend_per_split

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    tokenizer = build_tokenizer(args)
    _check_vocabulary([*(blend or ([], None))[0], *((blend_per_split or [None])[0] or ([], None))[0]], tokenizer)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        inter_document_masking=args.dataloader_inter_document_masking,
    )

    def needed_here() -> bool:
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        return first and (args.dataloader_inter_document_masking or _takes_tokens(vp_stage))

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, needed_here, config).build()


def _check_vocabulary(prefixes: list[str], tokenizer) -> None:
    """Refuse data that another tokenizer made, as far as its vocabulary tells (`prepare-data` notes it)."""
    for prefix in prefixes:
        note = f"{prefix}.json"
        if os.path.isfile(note):
            with open(note) as file:
                made_with = json.load(file)["vocab_size"]
            if made_with != tokenizer.vocab_size:
                raise DMCError(
                    f"{prefix} was prepared with a tokenizer of {made_with} tokens, --tokenizer-model has "
                    f"{tokenizer.vocab_size}: use the tokenizer that prepared the data"
                )


def _forward_step(teacher: Teacher | None, data_iterator, model):
    """One micro-batch: the model's losses per token and the function that sums them."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args

    batch = _batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    inputs = [batch.get(name) for name in ("tokens", "position_ids", "attention_mask")]
    packed, loss_mask = _packed(batch), batch.get("loss_mask")
    if teacher is None or not model.training:
        losses = model(*inputs, labels=batch.get("labels"), loss_mask=loss_mask, packed_seq_params=packed)
        return losses, partial(_loss, loss_mask, {"lm loss": losses})
    expected = teacher.logits(*inputs, packed_seq_params=packed)
    half = dict(fp32_output=False) if get_args().bf16 or get_args().fp16 else {}  # of the wrapper that there is then
    logits = model(*inputs, packed_seq_params=packed, **half)
    of_model = get_attr_wrapped_model(model, "compute_language_model_loss")
    losses, of_text, apart = teacher.losses(
        logits, expected, lambda logits: of_model(batch["labels"], logits.transpose(0, 1).contiguous())
    )
    return losses, partial(_loss, loss_mask, {"lm loss": of_text, "distillation loss": apart})


def _packed(batch: dict[str, torch.Tensor]) -> Any:
    """Where documents begin, for Megatron's layers, with `--dataloader-inter-document-masking`."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.training import get_args
    from megatron.training.training import update_seqlen_stats_from_cu_seqlens

    if batch.get("cu_seqlens") is None:
        return None
    args = get_args()
    borders, longest = batch["cu_seqlens"][0], int(batch["max_seqlen"])
    update_seqlen_stats_from_cu_seqlens(borders)  # for the FLOPs that Megatron logs
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=args.seq_length,
        total_tokens=args.micro_batch_size * args.seq_length if args.hybrid_layer_pattern else None,  # for Mamba layers
    )


def _predicts_more(vp_stage: int | None) -> bool:
    """Whether this pipeline stage has layers of multi-token prediction."""
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.training import get_args

    args = get_args()
    if args.mtp_num_layers is None:
        return False
    layout = args.pipeline_model_parallel_layout
    if isinstance(layout, str):  # as it was given: Megatron reads it for the model's own settings alone
        layout = PipelineParallelLayerLayout(layout, args.pipeline_model_parallel_size)
    return mtp_on_this_rank(layout=layout, mtp_num_layers=args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)


def _takes_tokens(vp_stage: int | None) -> bool:
    """Whether this pipeline stage reads the data: the first, the last, and those of multi-token prediction."""
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return is_first_or_last_pipeline_stage(vp_stage) or _predicts_more(vp_stage)


def _batch(data_iterator, vp_stage: int | None) -> dict[str, torch.Tensor]:
    """The next micro-batch, on every tensor-parallel rank of the stages that need it."""
    from megatron.core import parallel_state
    from megatron.core.utils import (
        flatten_batch_for_packed_sequences,
        get_batch_on_this_cp_rank,
        get_batch_on_this_tp_rank,
    )
    from megatron.training import get_args

    args = get_args()
    packed = args.dataloader_inter_document_masking
    has_tokens = _takes_tokens(vp_stage)
    if not has_tokens and not packed:
        return {}
    batch = {}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        batch = {name: x.cuda(non_blocking=True) for name, x in next(data_iterator).items()}
        batch.setdefault("cu_seqlens_padded")
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_predicts_more(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not has_tokens:
        return {name: batch[name] for name in ("cu_seqlens", "max_seqlen")}
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
        use_per_sequence_balancing=packed,
    )


def _loss(loss_mask: torch.Tensor, shown: dict[str, torch.Tensor], losses: torch.Tensor):
    """Sum of the losses, the number of tokens that count, and for the log that number with each of the sums `shown`."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    mask = loss_mask.view(-1).float()

    def summed(values: torch.Tensor) -> torch.Tensor:
        return torch.sum(values.view(-1).float() * mask)

    loss = summed(losses)
    tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected in (torch.isnan, torch.isinf):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"the loss of a micro-batch {rejected.__name__.replace('is', 'is ')}",
                tolerance=0.0,
                fatal=True,
            )
    sums = {name: torch.stack([summed(values.detach()), tokens]) for name, values in shown.items()}
    return loss, tokens, sums
