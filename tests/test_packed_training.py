"""Training on packed documents, which Megatron marks in two ways, in one process and in parallel layouts."""

import re

import pytest
import torch
from runs import (
    DESCENT,
    MODEL,
    STAGE,
    STEPS,
    TRAIN,
    WITHOUT_DATA,
    assert_same_training,
    launcher,
    python,
    train,
    weights,
    write_documents,
)

from megatron_dmc.config import DMCError

pytestmark = pytest.mark.usefixtures("megatron")

RETROFIT = [*STAGE, "--dmc-window-size", "5"]
BORDERS = ["--dataloader-inter-document-masking"]
MASKS = ["--reset-attention-mask"]


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    """Flags for data of documents of 1 to 15 tokens, the last of each the one that ends documents."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(0, 15, (200,), generator=generator).tolist()
    documents = [torch.randint(0, 62, (length,), generator=generator).tolist() for length in lengths]
    return write_documents(tmp_path_factory.mktemp("data") / "short", documents)


@pytest.fixture(scope="module")
def trained(base, short_documents, tmp_path_factory):
    """A function that trains with some flags more: the run and its weights."""

    def run(*flags, processes=1):
        folder = tmp_path_factory.mktemp("packed")
        saved = ["--load", base, "--save", folder, "--save-interval", STEPS]
        program = ["tests/train_with_sequence_parallel.py"] if "--sequence-parallel" in flags else TRAIN
        flags = [*DESCENT, *RETROFIT, *short_documents, *saved, *flags]
        return train(*flags, processes=processes, program=program, model=WITHOUT_DATA), weights(folder)

    return run


@pytest.fixture(scope="module")
def alone(trained):
    return trained(*BORDERS)


def test_documents_are_kept_apart(trained, alone):
    """Both of Megatron's ways mean the same, and something other than none."""
    assert_same_training(*trained(*MASKS), alone)
    mixed, _ = trained()
    assert mixed.values("lm loss") != pytest.approx(alone[0].values("lm loss"), rel=1e-3)


LAYOUTS = {
    "borders, gathered context": (2, [*BORDERS, *"--context-parallel-size 2 --cp-comm-type all_gather".split()]),
    "borders, four stages": (4, [*BORDERS, *"--pipeline-model-parallel-size 4 --micro-batch-size 1".split()]),
    "borders, interleaved stages of two with sequence, recomputed": (
        4,
        [
            *BORDERS,
            *"--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --micro-batch-size 1".split(),
            *"--tensor-model-parallel-size 2 --sequence-parallel".split(),
            *"--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split(),
        ],
    ),
    "masks, exchanged context": (2, [*MASKS, *"--context-parallel-size 2 --cp-comm-type a2a".split()]),
    "masks, two stages of two": (
        4, [*MASKS, *"--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2".split()],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(trained, alone, layout):
    processes, flags = LAYOUTS[layout]
    assert_same_training(*trained(*flags, processes=processes), alone)


def test_experts_and_evaluation(trained, tmp_path):
    """A mixture of experts on several sequences a micro-batch, evaluated after every step: both ways mean the same."""
    experts = "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none".split()
    train(*experts, "--train-iters", 1, "--save", tmp_path, "--save-interval", 1)
    evaluated = [*experts, "--load", tmp_path, *"--split 80,20,0 --eval-interval 1 --eval-iters 2".split()]
    masks = trained(*MASKS, *evaluated)
    borders = trained(*BORDERS, *evaluated, "--expert-model-parallel-size", 2, processes=2)
    assert_same_training(*borders, masks)
    losses, expected = (
        [float(loss) for loss in re.findall(r"validation loss at iteration \d+ +\| lm loss value: (\S+)", run.output)]
        for run, _ in (borders, masks)
    )
    assert len(losses) >= STEPS and losses == pytest.approx(expected, rel=2e-5)


def test_what_would_mix_documents_is_refused():
    from types import SimpleNamespace

    from megatron_dmc.config import DMCConfig
    from megatron_dmc.megatron_hooks import check_arguments

    fine = dict(
        reset_attention_mask=False, create_attention_mask_in_dataloader=True, dataloader_inter_document_masking=False,
        sft=False, hybrid_context_parallel=False, pipeline_model_parallel_size=1, context_parallel_size=1,
        virtual_pipeline_model_parallel_size=None, micro_batch_size=2, hybrid_layer_pattern=None, mtp_num_layers=None,
        position_embedding_type="rope", seq_length=64, cp_comm_type=["a2a"], use_megatron_fsdp=False,
        use_torch_fsdp2=False, overlap_moe_expert_parallel_comm=False,
    )  # fmt: skip
    masks, borders = dict(reset_attention_mask=True), dict(dataloader_inter_document_masking=True)
    context, mamba = dict(context_parallel_size=2), dict(hybrid_layer_pattern="M*-")
    stages = dict(pipeline_model_parallel_size=3, micro_batch_size=1)
    mrope = dict(position_embedding_type="mrope")
    for flags in ({}, mrope, masks, borders | context, borders | mamba, masks | borders | stages):
        check_arguments(SimpleNamespace(**fine | flags), DMCConfig("retrofit"))
    for flags, message in (
        (masks | dict(create_attention_mask_in_dataloader=False), "needs the data loader's masks"),
        (masks | dict(pipeline_model_parallel_size=3), "of 3 pipeline stages, 1 chunks each"),
        (
            masks | dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            "of 2 pipeline stages, 2 chunks each",
        ),
        (borders | dict(pipeline_model_parallel_size=2), "use --micro-batch-size 1"),
        (dict(sft=True, context_parallel_size=2), "--sft: with context parallelism"),
        (masks | mamba, "Mamba layers read no masks"),
        (borders | mamba | context, "Megatron's Mamba layers expect"),
        (borders | context | dict(mtp_num_layers=1), "multi-token prediction expects"),
        *((packed | mrope, "--position-embedding-type mrope") for packed in (masks, borders, dict(sft=True))),
        (dict(hybrid_context_parallel=True), "--hybrid-context-parallel"),
    ):
        with pytest.raises(DMCError, match=message):
            check_arguments(SimpleNamespace(**fine | flags), DMCConfig("retrofit"))


def test_refusals_end_a_run():
    run = python(
        *launcher(1), "-m", "megatron_dmc", "train", *MODEL, *RETROFIT, *MASKS, "--train-iters", 1,
        "--no-create-attention-mask-in-dataloader",
    )  # fmt: skip
    assert run.code != 0 and "--reset-attention-mask needs the data loader's masks" in run.output
