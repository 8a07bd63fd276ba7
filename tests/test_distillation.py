"""Learning from the original model: the divergence and its gradient, and training runs."""

import pytest
import torch
import torch.nn.functional as F
from conftest import GPUS, HAVE_GPU
from runs import DESCENT, MODEL, STAGE, STEPS, TOLERANCE, assert_same_training, python, train, weights

from megatron_dmc import distillation
from megatron_dmc.config import DMCError
from megatron_dmc.distillation import Teacher, divergence

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_divergence(fresh_seed, monkeypatch, dtype):
    """Against PyTorch's own in float64, in blocks that do not divide the tokens."""
    monkeypatch.setattr(distillation, "SCORES", 4 * 33)
    student, teacher = (3 * torch.randn(2, 7, 33, dtype=torch.float64) for _ in range(2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    upstream = torch.randn(2, 7, dtype=torch.float64)
    exact = student.detach().double().requires_grad_()
    logs = [x.double().log_softmax(-1) for x in (exact, teacher)]
    expected = F.kl_div(logs[0], logs[1], log_target=True, reduction="none").sum(-1)
    (expected * upstream).sum().backward()
    found = divergence(student, teacher.clone())
    (found * upstream).sum().backward()
    assert found.dtype == torch.promote_types(dtype, torch.float32) and student.grad.dtype == dtype
    close = dict(rtol=1e-10, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(found.double(), expected.detach(), **close)
    torch.testing.assert_close(student.grad.double(), exact.grad, **close)


def test_divergence_of_logits_that_are_far_apart():
    """No overflow, and none of infinity minus infinity, where a share is zero in float32."""
    student = torch.tensor([[0.0, 3e4], [-3e4, 0.0]], requires_grad=True)
    found = divergence(student, torch.tensor([[3e4, 0.0], [-3e4, 0.0]]))
    found.sum().backward()
    assert found.tolist() == [3e4, 0.0] and student.grad.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A function that trains from `base` with some flags more: the run and its weights."""

    def run(*flags, processes=1):
        folder = tmp_path_factory.mktemp("distilled")
        saved = ["--load", base, "--finetune", "--save", folder, "--save-interval", STEPS]
        return train(*DESCENT, *saved, *flags, processes=processes), weights(folder)

    return run


@pytest.mark.parametrize("flags", ["--micro-batch-size 1", "--bf16 --micro-batch-size 2"])
def test_a_model_has_nothing_to_learn_from_itself(base, trained, flags):
    run, found = trained("--dmc-teacher", base, *flags.split())
    assert len(run.steps) == STEPS and max(run.values("distillation loss")) < 1e-5
    plain = train(*DESCENT, "--load", base, "--finetune", "--train-iters", 1, *flags.split())
    assert run.values("lm loss")[0] == pytest.approx(plain.values("lm loss")[0], rel=1e-5)
    assert run.values("lm loss")[0] > 1
    for name, weight in weights(base).items():
        torch.testing.assert_close(
            found[name].to(weight.dtype), weight, rtol=1e-2 if "bf16" in flags else 1e-5, atol=1e-6
        )


def test_weights_of_the_two_losses(base, trained):
    """Beside a teacher that agrees, a step is so much shorter as the text counts less."""
    one = ["--train-iters", 1, "--save-interval", 1]
    before = weights(base)
    whole, half = trained(*one)[1], trained(*one, "--dmc-teacher", base, "--dmc-teacher-weight", 0.75)[1]
    for name, weight in before.items():
        torch.testing.assert_close(half[name], weight + 0.25 * (whole[name] - weight), **TOLERANCE)


@pytest.mark.skipif(HAVE_GPU and GPUS < 2, reason="needs 2 GPUs")
def test_layouts_learn_alike(base, trained):
    """A retrofit under tensor and data parallelism, with the compression loss as without a teacher."""
    learning = [*STAGE, "--dmc-teacher", base]
    alone = trained(*learning)
    plain, _ = trained(*STAGE)
    assert alone[0].values("lm loss")[0] == pytest.approx(plain.values("lm loss")[0], rel=1e-5)
    assert alone[0].values("lm loss")[-1] != pytest.approx(plain.values("lm loss")[-1], rel=1e-4)
    assert min(alone[0].values("distillation loss")) > 1e-3 and alone[0].values("compression loss")[0] > 0
    for layout in ("--tensor-model-parallel-size 2", "--calculate-per-token-loss"):
        run = trained(*learning, *layout.split(), processes=2)
        assert_same_training(*run, alone)
        assert run[0].values("distillation loss") == pytest.approx(alone[0].values("distillation loss"), rel=1e-4)


def test_what_is_refused(base, tmp_path):
    from types import SimpleNamespace

    fine = dict(
        dmc_teacher="x", dmc_teacher_weight=1.0, pipeline_model_parallel_size=1, hybrid_layer_pattern=None,
        mtp_num_layers=None, num_experts=None, dataloader_inter_document_masking=False, context_parallel_size=1,
        transformer_impl="transformer_engine",
    )  # fmt: skip
    context, packed = dict(context_parallel_size=2), dict(dataloader_inter_document_masking=True)
    local = dict(transformer_impl="local")
    for change in ({}, context, packed, local):
        assert Teacher.from_args(SimpleNamespace(**fine | change)).weight == 1.0
    assert Teacher.from_args(SimpleNamespace(**fine | dict(dmc_teacher=None, num_experts=4))) is None
    for change, message in (
        (dict(pipeline_model_parallel_size=2), "--pipeline-model-parallel-size above 1: the logits"),
        (dict(hybrid_layer_pattern="M*-"), "--hybrid-layer-pattern"),
        (dict(mtp_num_layers=1), "--mtp-num-layers"),
        (dict(num_experts=4), "--num-experts"),
        (context | packed, "--dataloader-inter-document-masking under context parallelism"),
        (context | local, "--transformer-impl local and context parallelism"),
        (packed | local, "--transformer-impl local and context parallelism"),
        (dict(dmc_teacher_weight=0.0), "must be above 0 and at most 1; got 0.0"),
        (dict(dmc_teacher_weight=1.5), "got 1.5"),
    ):
        with pytest.raises(DMCError, match=message):
            Teacher.from_args(SimpleNamespace(**fine | change))
    with pytest.raises(DMCError, match="the same vocabulary"):
        divergence(torch.zeros(2, 5), torch.zeros(2, 6))

    student = tmp_path / "student"
    train(*DESCENT, *STAGE, "--load", base, "--save", student, "--save-interval", STEPS)
    for teacher, more, message in (
        (student, [], "trained with DMC (stage finetune)"),
        (base, ["--rotary-base", 500000], "is another model than this run's: rotary_base 10000, here 500000"),
        (tmp_path / "none", [], "no checkpoint at"),
    ):
        flags = [*DESCENT, "--load", base, "--finetune", "--dmc-teacher", teacher, *more]
        run = python("-m", "megatron_dmc", "train", *MODEL, *flags)
        assert run.code != 0 and message in run.output, run.output[-3000:]
        assert "setting up optimizer" not in run.output and "time to initialize" not in run.output  # early
