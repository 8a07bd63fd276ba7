"""Every place where DMC reaches into Megatron's training loop. Checked against megatron-core 0.19.2.

The loop has no callback for a step's begin and end, so `install` wraps functions of `megatron.training`:

- `train_step`: the schedule before a step; after it the offset for the next, the log line, and at the end of the stage
  `zero-out` the zeroed rows. Every rank comes here once per step, whatever layers it holds.
- `finalize_model_grads`, between the last backward pass and the optimizer: the reduction of what layers have counted.
  (Reducing inside a layer would deadlock a pipeline: its first stage would wait for a stage that waits for its
  activations.) A script that brings its own `finalize_model_grads_func` has it after the optimizer's step.
- `evaluate`: the schedule, for a run that only evaluates.
- `save_checkpoint`, `check_checkpoint_args`: the share of merged tokens and the multiplier, on which the next step's
  loss depends, travel with the arguments that Megatron saves. What `--save-retain-interval` deletes has two whole
  ones after it.
- `_load_base_checkpoint`: so does the offset, for a stage that begins from a checkpoint as well; a checkpoint of
  another model, whose weights load all the same, is warned of.
- `read_metadata`: a run goes on from the latest checkpoint that is whole (`megatron_dmc.resume`).

A loop of one's own calls `Compression.begin_step`, `reduce_counts` and `end_step` instead, and keeps what these change.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dmc import resume
from megatron_dmc.arguments import other_model
from megatron_dmc.compression import Compression, StepReport
from megatron_dmc.config import AS_PUBLISHED, DMCConfig, DMCError

RETAIN_INTERVAL = "dmc_save_retain_interval"
"""Where `--save-retain-interval` is kept from Megatron, which would delete the last checkpoint but one unseen."""

MERGE_RATE = "dmc_merge_rate"
MULTIPLIER = "dmc_multiplier"
"""Names under which `Compression.merge_rate` and `multiplier` are saved among the arguments."""

OVERLAPPED_EXPERTS = (
    "--overlap-moe-expert-parallel-comm: Megatron then takes the forward pass apart, which neither DMC's layers nor "
    "megatron-dmc's training step provide for; leave it out"
)


def keep_compiled_helpers() -> None:
    """Let Megatron use the dataset helpers that its wheel ships compiled.

    The wheel has no Makefile, and `initialize_megatron`, which would run it, ends the process without one.
    """
    from megatron.core.datasets import utils

    if (Path(utils.__file__).parent / "Makefile").exists():
        return
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        raise DMCError(
            "this installation of megatron-core has neither compiled dataset helpers nor their Makefile; reinstall it"
        )
    utils.compile_helpers = lambda: None


def install(compression: Compression) -> None:
    """Join a model's compression to `megatron.training`, where that is the training loop."""
    try:
        from megatron.training import checkpointing, training
        from megatron.training.global_vars import get_args
    except ImportError:  # megatron-core without its training loop
        return
    try:
        args = get_args()
    except AssertionError:  # the model is built outside of the loop
        return
    check_arguments(args, compression.config)
    if args.save_retain_interval is not None:
        setattr(args, RETAIN_INTERVAL, args.save_retain_interval)
        args.save_retain_interval = None
    compression.seed = args.seed
    compression.packed_by_mask = args.reset_attention_mask
    vars(args).update(asdict(compression.config))
    _wrap(training, "train_step", _train_step)
    _wrap(training, "finalize_model_grads", _finalize_model_grads)
    _wrap(training, "evaluate", _evaluate)
    _wrap(training, "save_checkpoint", _save_checkpoint)
    _wrap(checkpointing, "check_checkpoint_args", _check_checkpoint_args)
    _wrap(checkpointing, "_load_base_checkpoint", _load_base_checkpoint)
    _wrap(checkpointing, "read_metadata", _read_metadata)


def check_arguments(args: Any, dmc: DMCConfig) -> None:
    """Refuse what DMC cannot train with, as far as Megatron's arguments tell.

    Raises:
        DMCError: with everything that stands in the way.
    """
    _check_packing(args)
    window, chunk = dmc.dmc_window_size, args.seq_length // (2 * args.context_parallel_size)
    gathers = dmc.merges and args.context_parallel_size > 1 and "all_gather" in args.cp_comm_type
    sharded = "it shares out single weights, and DMC sets rows of them to 0: use --use-distributed-optimizer instead"
    refusals = [
        (args.use_megatron_fsdp, f"--use-megatron-fsdp: {sharded}"),
        (args.use_torch_fsdp2, f"--use-torch-fsdp2: {sharded}"),
        (args.overlap_moe_expert_parallel_comm, OVERLAPPED_EXPERTS),
        (
            gathers and not 1 <= window <= chunk,
            f"--dmc-window-size {window}: with --cp-comm-type all_gather, a window is at least 1 (0, unlimited, is "
            f"not possible) and at most the {chunk} tokens of a chunk; choose another one, longer sequences or a2a",
        ),
    ]
    if found := [message for refused, message in refusals if refused]:
        raise DMCError("DMC cannot train with " + "; ".join(found))


def _check_packing(args: Any) -> None:
    """Refuse ways to pack documents that would not keep them apart, or that Megatron loses on the way."""
    instead = "use --dataloader-inter-document-masking instead"
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    borders, context = args.dataloader_inter_document_masking, args.context_parallel_size > 1
    masks = args.reset_attention_mask and not borders
    mamba = "M" in (args.hybrid_layer_pattern or "")
    refusals = [
        (
            masks and not args.create_attention_mask_in_dataloader,
            "--reset-attention-mask needs the data loader's masks: leave out --no-create-attention-mask-in-dataloader, "
            f"or {instead}",
        ),
        (
            masks and (stages > 2 or chunks > 1),
            f"--reset-attention-mask: of {stages} pipeline stages, {chunks} chunks each, Megatron gives masks to the "
            f"first and the last alone; {instead}",
        ),
        (
            borders and stages > 1 and args.micro_batch_size > 1,
            f"--dataloader-inter-document-masking: Megatron's pipeline stages expect {args.micro_batch_size} sequences "
            "side by side and get them one after the other; use --micro-batch-size 1",
        ),
        (
            args.sft and context,
            "--sft: with context parallelism Megatron shares out every document by itself, and DMC's merges need "
            f"whole chunks; {instead}",
        ),
        (masks and mamba, f"--reset-attention-mask: Mamba layers read no masks; {instead}"),
        (
            borders and context and mamba,
            "--dataloader-inter-document-masking: with context parallelism Megatron's Mamba layers expect every "
            "document shared out by itself; leave one of the two out",
        ),
        (
            borders and context and args.mtp_num_layers,
            "--dataloader-inter-document-masking: with context parallelism Megatron's multi-token prediction expects "
            "every document shared out by itself; leave one of the two out",
        ),
        (
            (masks or borders or args.sft) and args.position_embedding_type == "mrope",
            "--position-embedding-type mrope: its angles are those of position ids, not of a token's place in its "
            "document; use rope, or leave packing out",
        ),
        (args.hybrid_context_parallel, "--hybrid-context-parallel: DMC knows one context-parallel group; leave it out"),
    ]
    if found := [message for refused, message in refusals if refused]:
        raise DMCError("DMC cannot keep packed documents apart with " + "; ".join(found))


def _wrap(module: Any, name: str, wrapper: Callable) -> None:
    original = getattr(module, name)
    if not hasattr(original, "dmc_wraps"):
        wrapped = functools.wraps(original)(functools.partial(wrapper, original))
        wrapped.dmc_wraps = original
        setattr(module, name, wrapped)


def _compression_of(model: list) -> Compression | None:
    """The one `Compression` of a model; where every pipeline chunk has a config of its own, theirs are joined."""
    from megatron.core.utils import get_model_config

    first = getattr(get_model_config(model[0]), "dmc_compression", None)
    for chunk in model[1:] if first is not None else ():
        config = get_model_config(chunk)
        if config.dmc_compression is not first:
            config.dmc_compression = first
            for layer in dmc_layers([chunk]):
                layer.core_attention.compression = first
    return first


def dmc_layers(model: list) -> list:
    """The DMC attention layers of a model's chunks on this rank."""
    from megatron_dmc.attention import DMCSelfAttention

    return [module for chunk in model for module in chunk.modules() if isinstance(module, DMCSelfAttention)]


def _train_step(original, forward_step_func, data_iterator, model, optimizer, *args, iteration=None, **kwargs):
    compression = _compression_of(model)
    if compression is None:
        return original(forward_step_func, data_iterator, model, optimizer, *args, iteration=iteration, **kwargs)
    from megatron.training.global_vars import get_args
    from megatron.training.utils import print_rank_0

    settings = get_args()
    iteration = settings.curr_iteration if iteration is None else iteration
    begins = compression.iteration is None
    if begins:
        _begin_training(compression, model, iteration)
    compression.begin_step(iteration, settings.train_iters)
    losses, *rest = original(forward_step_func, data_iterator, model, optimizer, *args, iteration=iteration, **kwargs)
    _, _, should_exit, *_ = rest
    if should_exit:  # Megatron's search for faults: the step will be made again, after a restart
        compression.forget_step()
        return losses, *rest
    report = compression.end_step()
    if begins and compression.kernel is not None:
        print_rank_0(f"> DMC attention runs on: {compression.kernel}")
    _log(compression, report, losses, iteration + 1)
    if compression.config.dmc_stage == "zero-out" and iteration + 1 >= settings.train_iters:
        _end_zero_out(compression.config, model, optimizer)
    return losses, *rest


def _finalize_model_grads(original, model, *args, **kwargs):
    original(model, *args, **kwargs)
    if (compression := _compression_of(model)) is not None:
        compression.reduce_counts()


def _take_up(compression: Compression) -> None:
    """What the loaded checkpoint, if any, says beside weights."""
    from megatron.training.global_vars import get_args

    args = get_args()
    compression.merge_rate = getattr(args, MERGE_RATE, 0.0)
    compression.multiplier = getattr(args, MULTIPLIER, 0.0)
    compression.offset = getattr(args, "dmc_init_val", compression.offset)


def _begin_training(compression: Compression, model: list, iteration: int) -> None:
    _take_up(compression)
    config = compression.config
    if config.dmc_stage != "retrofit" or iteration > 0:
        return
    zeroed = [layer.zeroed_rows() for layer in dmc_layers(model)]
    if not all(queries for queries, _ in zeroed):
        warnings.warn(
            "retrofitting starts from a model whose last query channel is in use: run the stage zero-out first",
            stacklevel=2,
        )
    elif config.dmc_zero_decisions and not all(keys for _, keys in zeroed):
        values = ", ".join(
            f"{name} = {AS_PUBLISHED[name]:g}" for name in ("dmc_init_val", "dmc_temp", "dmc_noise_scale")
        )
        warnings.warn(
            "retrofitting starts from a model whose decisions are what its last key channel was for attention: run the "
            f"stage zero-out with dmc_zero_decisions, or retrofit without it, as published ({values})",
            stacklevel=2,
        )


def _end_zero_out(config: DMCConfig, model: list, optimizer: Any) -> None:
    for layer in dmc_layers(model):
        layer.zero_last_channel(config.dmc_zero_decisions)
    # The optimizer's float32 copies must not bring the rows back.
    if not getattr(optimizer, "is_stub_optimizer", False):
        optimizer.reload_model_params()


def _log(compression: Compression, report: StepReport | None, losses: dict, iteration: int) -> None:
    """Add DMC to the losses that Megatron writes to its log line, to TensorBoard and to Weights & Biases."""
    if not losses:  # a rank that does not log
        return
    import torch
    from megatron.training.global_vars import get_args, get_tensorboard_writer

    device = next(iter(losses.values())).device
    if report is None:
        losses["last channel"] = torch.tensor(compression.last_channel, device=device)
        return
    losses["compression loss"] = report.loss.float()
    losses["compression ratio"] = report.ratio.float()
    losses["target compression ratio"] = torch.tensor(report.target, device=device)
    writer = get_tensorboard_writer()
    if writer and iteration % get_args().tensorboard_log_interval == 0:
        for layer, ratio in enumerate(report.layer_ratios.tolist(), 1):
            if ratio == ratio:  # a layer that decides
                writer.add_scalar(f"compression ratio by layer/{layer:03d}", ratio, iteration)


def _evaluate(original, forward_step_func, data_iterator, model, *args, **kwargs):
    compression = _compression_of(model)
    if compression is not None and compression.iteration is None:
        from megatron.training.global_vars import get_args

        settings = get_args()
        _take_up(compression)
        compression.begin_step(settings.iteration, settings.train_iters or 0)
        compression.iteration = None  # training has not begun
    return original(forward_step_func, data_iterator, model, *args, **kwargs)


def _save_checkpoint(original, iteration, model, *args, **kwargs):
    compression = _compression_of(model)
    if compression is None:
        return original(iteration, model, *args, **kwargs)
    from megatron.training.global_vars import get_args

    settings = get_args()
    if compression.iteration is None:
        _take_up(compression)
    setattr(settings, MERGE_RATE, float(compression.merge_rate))
    setattr(settings, MULTIPLIER, compression.multiplier)
    settings.dmc_init_val = compression.offset
    result = original(iteration, model, *args, **kwargs)
    interval = getattr(settings, RETAIN_INTERVAL, None)
    if interval is not None and settings.rank == 0 and settings.save and "://" not in settings.save:
        _delete_superseded(Path(settings.save), interval)
    return result


def _delete_superseded(save: Path, interval: int) -> None:
    """An asynchronous save is not named yet: then what counts are those before it."""
    try:
        path = resume.superseded(save, interval)
        if path is not None:
            shutil.rmtree(path)
            print(f"> deleted {path}: two later checkpoints are whole", flush=True)
    except OSError as error:  # training goes on without room made
        warnings.warn(f"cannot delete checkpoints in {save}: {error}", stacklevel=2)


def _read_metadata(original, tracker: str):
    """Which iteration to load. A stage does not begin (`--finetune`) from another checkpoint than the one named."""
    from megatron.training.global_vars import get_args
    from megatron.training.utils import print_rank_0

    args, load = get_args(), Path(tracker).parent
    if "://" in str(tracker):  # on an object store
        return original(tracker)
    text, found = _on_rank_0(lambda: (resume.tracked(load), None))[0], None
    if args.ckpt_step:
        return original(tracker) if resume.is_iteration(text) or text == "release" else (args.ckpt_step, False)
    if text == "release":
        return original(tracker)
    try:
        iteration, problems = _on_rank_0(lambda: resume.checkpoint_to_resume(load))
        found = "; ".join(problems)
    except DMCError as error:
        if load.name != "non_persistent":
            raise
        print_rank_0(f"WARNING: {error}")
        return -1, False  # as if there were none: persistent ones may be whole
    if not problems:
        return original(tracker)
    if args.finetune and load.name != "non_persistent":
        raise DMCError(
            f"the checkpoint to begin the stage from is not whole: {found}. To begin from the one before, add "
            f"--ckpt-step {iteration}"
        )
    print_rank_0(f"WARNING: going on from iteration {iteration}, the latest checkpoint that is whole: {found}")
    _on_rank_0(lambda: resume.rewrite_tracker(load, iteration))
    return iteration, False


def _on_rank_0(do: Callable[[], Any]) -> Any:
    """What one rank finds, on all of them; also what it raises, so that nobody waits for it."""
    import torch

    alone = not torch.distributed.is_initialized()
    found: list = [None, None]
    if alone or torch.distributed.get_rank() == 0:
        try:
            found[0] = do()
        except DMCError as error:
            found[1] = error
        except Exception as error:
            found[1] = DMCError(f"{type(error).__name__}: {error}")
    if not alone:
        torch.distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _load_base_checkpoint(original, *positional, **named):
    """A stage that merges takes up the offset of a checkpoint that does: it may have moved in the stage finetune. And
    Megatron compares a model's sizes with a checkpoint's, not what else makes it another one: that is warned of."""
    from megatron.training.global_vars import get_args
    from megatron.training.utils import print_rank_0

    found = original(*positional, **named)
    args, saved = get_args(), (found[0] or {}).get("args")
    if saved is not None and (differ := other_model(saved, args)):
        print_rank_0(
            f"WARNING: the checkpoint is of another model than this run's: {'; '.join(differ)}. Unless that is meant, "
            "give the model's flags; `megatron-dmc convert` leaves them in model.yaml"
        )
    if saved is None or not (ours := DMCConfig.from_args(args)).merges:
        return found
    if DMCConfig.from_args(saved).merges:
        if saved.dmc_init_val != args.dmc_init_val:
            print_rank_0(f"> DMC's offset is the checkpoint's, {saved.dmc_init_val}, not {args.dmc_init_val}")
            args.dmc_init_val = saved.dmc_init_val
        _warn_of_other_settings(DMCConfig.from_args(saved), ours)
    elif not ours.soft:
        warnings.warn(
            "the stage finetune teaches no decisions, and the checkpoint that it begins from has learned none: run the "
            "stage retrofit first",
            stacklevel=2,
        )
    return found


def _warn_of_other_settings(saved: DMCConfig, ours: DMCConfig) -> None:
    """Decisions are learned for one window, and for one scale of noise, their unit and that of the offset's moves."""
    names = ["dmc_window_size", "dmc_noise_scale", *(["dmc_temp"] if ours.soft else [])]
    if differ := [name for name in names if getattr(saved, name) != getattr(ours, name)]:
        warnings.warn(
            f"the decisions of the checkpoint were learned {saved.flags(differ)}, this run is {ours.flags(differ)}",
            stacklevel=3,
        )


def _check_checkpoint_args(original, checkpoint_args, *rest, **kwargs):
    """On resuming (not with `--finetune`): take up the merge rate, and refuse another stage or another form of DMC."""
    from megatron.training.global_vars import get_args

    args = get_args()
    saved_stage = getattr(checkpoint_args, "dmc_stage", None)
    if saved_stage != args.dmc_stage:
        raise DMCError(
            f"the checkpoint is from stage {saved_stage or 'none (not trained with DMC)'}, this run is stage "
            f"{args.dmc_stage}: add --finetune to begin the stage from its weights"
        )
    saved, ours = (DMCConfig.from_args(x) for x in (checkpoint_args, args))
    of_stage = {"zero-out": "dmc_zero_decisions", "retrofit": "dmc_hard_steps", "finetune": "dmc_hard_finetune"}
    names = ["dmc_window_size"]
    if ours.merges and ours.soft:
        names += ["dmc_moving_offset", "dmc_temp"]
    if ours.dmc_stage is not None:
        names.append(of_stage[ours.dmc_stage])
    if ours.merges:
        names.append("dmc_noise_scale")  # the offset moves by it
    if differ := [name for name in names if getattr(saved, name) != getattr(ours, name)]:
        theirs = ", ".join(f"{name} {getattr(saved, name)}" for name in differ)
        got = ", ".join(str(getattr(ours, name)) for name in differ)
        raise DMCError(f"the checkpoint was trained with {theirs}; got {got}: go on {saved.flags(differ)}")
    for name in (MERGE_RATE, MULTIPLIER):
        setattr(args, name, getattr(checkpoint_args, name, 0.0))
    return original(checkpoint_args, *rest, **kwargs)
