"""The schedule and the gradient of the compression loss; `test_training.py` has them in Megatron's loop."""

import math

import pytest
import torch

from megatron_dmc.compression import GAIN, REACH, Compression, passes_in_flight
from megatron_dmc.config import AS_PUBLISHED, DMCConfig, DMCError
from megatron_dmc.ops.documents import Documents


def stage(name, **changes):
    return DMCConfig(dmc_stage=name, **AS_PUBLISHED | changes)


def test_schedule_of_the_stages():
    retrofit = Compression(stage("retrofit", dmc_cr=4.0), 2, 2)
    for n, ratio in ((0, 1.0), (50, 2.5), (100, 4.0), (130, 4.0)):
        retrofit.begin_step(n, 100)
        assert math.isclose(retrofit.target, ratio) and math.isclose(retrofit.merge_target, 1 - 1 / ratio)
    finetune = Compression(stage("finetune", dmc_cr=8.0), 2, 2)
    finetune.begin_step(0, 100)
    assert finetune.target == 8.0
    zero_out = Compression(stage("zero-out"), 2, 2)
    for n, factor in ((0, 1.0), (40, 0.5), (80, 0.0), (99, 0.0)):
        zero_out.begin_step(n, 100)
        assert math.isclose(zero_out.last_channel, factor, abs_tol=1e-12)
    assert zero_out.end_step() is None


def loss_by_definition(alphas, target):
    """`max(0, p - m̄)` with hard decisions, straight-through, over a list of decision tensors."""
    decisions = torch.cat([((a > 0.5).to(a.dtype) - a.detach() + a).flatten() for a in alphas])
    return (target - decisions.mean()).clamp(min=0)


def step(compression, alphas, micro_batches=1, per_token_tokens=None, loss_scale=1.0):
    """One training step over decisions `alphas[layer]` `[s, b, g]`; the gradients of each, as the optimizer sees them.

    Does what Megatron does around it: the scale of a micro-batch, and the division by all tokens at the end.
    """
    scale = torch.tensor([loss_scale if compression.per_token else loss_scale / micro_batches])
    compression.set_loss_scale(scale)
    leaves = [a.clone().requires_grad_() for a in alphas]
    for chunk in zip(*(leaf.chunk(micro_batches, dim=1) for leaf in leaves), strict=True):
        outputs = [compression.attach(torch.zeros(3, requires_grad=True) * 1.0, a, i) for i, a in enumerate(chunk)]
        sum(o.sum() for o in outputs).backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / loss_scale for leaf in leaves]
    return [g / per_token_tokens for g in grads] if compression.per_token else grads


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_gradient_is_that_of_the_loss(fresh_seed, micro_batches, per_token, loss_scale):
    s, b, g, layers = 7, 4, 2, 3
    compression = Compression(stage("finetune", dmc_cr=4.0), layers, g, per_token)
    alphas = [torch.rand(s, b, g, dtype=torch.float64) * 0.9 for _ in range(layers)]  # fewer than 3/4 above 1/2
    compression.begin_step(0, 1)
    got = step(compression, alphas, micro_batches, per_token_tokens=s * b, loss_scale=loss_scale)
    leaves = [a.clone().requires_grad_() for a in alphas]
    loss = loss_by_definition(leaves, 0.75)
    want = torch.autograd.grad(loss, leaves)
    for a, w in zip(got, want, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-6, atol=0)
    report = compression.end_step()
    torch.testing.assert_close(report.loss, loss.detach())
    merged = torch.stack(alphas) > 0.5
    torch.testing.assert_close(report.ratio, 1 / (1 - merged.double().mean()))
    torch.testing.assert_close(report.layer_ratios, 1 / (1 - merged.double().mean((1, 2, 3))))


def test_the_loss_is_one_sided_and_follows_the_step_before():
    compression = Compression(stage("finetune", dmc_cr=2.0), 1, 1)
    enough, too_little = torch.full((8, 1, 1), 0.9), torch.full((8, 1, 1), 0.1)
    compression.begin_step(0, 4)
    assert step(compression, [enough])[0].unique().tolist() == [-1 / 8]  # nothing is known yet: ask for compression
    assert compression.end_step().loss == 0
    assert step(compression, [too_little])[0].unique().tolist() == [0]  # the step before compressed enough
    assert compression.end_step().loss == pytest.approx(0.5)
    assert step(compression, [too_little])[0].unique().tolist() == [-1 / 8]


@pytest.mark.parametrize("settings", [dict(dmc_hard_finetune=True), dict(dmc_moving_offset=True)])
@pytest.mark.parametrize("begin", [2.0, 8.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_offset_holds_the_ratio(fresh_seed, settings, begin, scale):
    torch.manual_seed(fresh_seed)
    settings = settings | dict(dmc_init_val=begin * scale, dmc_noise_scale=scale)
    compression = Compression(stage("finetune", dmc_cr=4.0, **settings), 1, 2)
    keys = scale * (5 + 4 * torch.randn(2048, 2, 2))
    for i in range(300):
        compression.begin_step(i, 300)
        decisions, before = (keys > compression.offset).float(), compression.offset
        step(compression, [decisions])
        report = compression.end_step()
        assert compression.offset - before == pytest.approx(scale * GAIN * (decisions.mean().item() - 0.75), abs=1e-6)
    assert report.ratio == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_offset_has_an_end_where_the_ratio_has_none(scale):
    settings = dict(dmc_hard_finetune=True, dmc_init_val=5 * scale, dmc_noise_scale=scale)
    compression = Compression(stage("finetune", dmc_cr=4.0, **settings), 1, 1)
    for i in range(40):
        compression.begin_step(i, 40)
        step(compression, [torch.zeros(8, 1, 1)])
        compression.end_step()
    assert compression.offset == scale * (5.0 - REACH)
    compression.begin_step(40, 41)
    compression.end_step()  # of no layer
    assert compression.offset == scale * (5.0 - REACH)


def test_an_offset_from_beyond_its_reach_does_not_jump():
    compression = Compression(stage("finetune", dmc_cr=4.0, dmc_hard_finetune=True), 1, 1)
    compression.offset = 5.0 + 2 * REACH  # of a checkpoint
    for merged, expected in ((1.0, 5.0 + 2 * REACH), (0.0, 5.0 + 2 * REACH - GAIN * 0.75)):
        compression.begin_step(0, 2)
        step(compression, [torch.full((8, 1, 1), merged)])
        compression.end_step()
        assert compression.offset == expected


@pytest.mark.parametrize("settings", [dict(name="retrofit", dmc_hard_finetune=True), dict(name="finetune")])
def test_the_offset_stays_where_decisions_are_soft(settings):
    compression = Compression(stage(**settings), 1, 1)
    compression.begin_step(3, 4)
    step(compression, [torch.full((8, 1, 1), 0.1)])
    compression.end_step()
    assert compression.offset == 5.0


@pytest.mark.parametrize("repeated", [False, True])
def test_counts_can_be_reduced_before_the_end(repeated):
    compression = Compression(stage("finetune", dmc_cr=4.0, dmc_hard_finetune=True), 2, 1)
    merged, appended = torch.ones(8, 1, 1), torch.zeros(8, 1, 1)
    compression.begin_step(0, 1)
    if repeated:  # Megatron suspects a fault, and makes the passes again
        step(compression, [merged, merged])
        compression.reduce_counts()
    step(compression, [appended, merged])
    compression.reduce_counts()
    report = compression.end_step()
    assert report.layer_ratios.tolist() == [1, math.inf] and compression.merge_rate == 0.5
    assert compression.offset == 5.0 + GAIN * (0.5 - 0.75)
    compression.begin_step(1, 2)
    step(compression, [merged, merged])
    assert compression.end_step().ratio == math.inf  # and nothing of the step before
    compression.begin_step(1, 2)
    compression.reduce_counts()
    step(compression, [merged, merged])
    with pytest.raises(DMCError, match="after reduce_counts"):
        compression.end_step()


def test_hard_decisions_count_and_have_no_gradient():
    compression = Compression(stage("finetune", dmc_cr=4.0, dmc_hard_finetune=True), 1, 1)
    compression.begin_step(0, 1)
    alpha = torch.full((8, 1, 1), 0.1, requires_grad=True)
    compression.attach(torch.zeros(1, requires_grad=True) * 1.0, alpha, 0).sum().backward()
    assert alpha.grad is None and compression.end_step().ratio == 1


def test_the_multiplier_outlives_steps_that_say_nothing():
    """Megatron skips a step whose gradients overflow; saturated decisions have no slope."""
    compression = Compression(stage("finetune", dmc_moving_offset=True), 1, 1)
    steps = (6.0, 4.0, 1.5), (math.inf, 4.0, 1.5), (math.nan, 4.0, 1.5), (1.0, 0.0, 1.5), (-1.0, 2.0, 1.0)
    for cost, slope, expected in steps:
        compression.begin_step(0, 1)
        compression._add(0, torch.device("cpu"), merged=6, tokens=8, cost=cost, slope=slope)
        compression.end_step()
        assert compression.multiplier == expected


def test_the_offset_moves_by_the_decisions_of_inference_where_there_are_any():
    compression = Compression(stage("retrofit", dmc_moving_offset=True, dmc_hard_steps=0.5), 1, 1)
    offsets = []
    for i in range(4):
        compression.begin_step(i, 4)
        step(compression, [torch.full((8, 1, 1), 0.9)])
        compression.end_step()
        offsets.append(compression.offset)
    assert offsets[0] == 5.0 < offsets[1] == offsets[2] < offsets[3]


def test_share_of_hard_steps():
    for share, expected in ((0, []), (0.5, [1, 3, 5, 7]), (0.25, [3, 7]), (0.75, [1, 2, 3, 5, 6, 7])):
        compression = Compression(stage("retrofit", dmc_hard_steps=share), 1, 1)
        hard = []
        for i in range(8):
            compression.begin_step(i, 8)
            hard += [i] if compression.hard else []
        assert hard == expected
    for name, hard in (("finetune", True), ("finetune", False)):
        compression = Compression(stage(name, dmc_hard_steps=0.5, dmc_hard_finetune=hard), 1, 1)
        compression.begin_step(0, 2)
        assert compression.hard == hard


def test_no_compression_is_asked_for_at_the_start_of_retrofit():
    compression = Compression(stage("retrofit"), 1, 1)
    compression.begin_step(0, 100)
    assert step(compression, [torch.full((8, 1, 1), 0.1)])[0].unique().tolist() == [0]


def test_attach_leaves_the_output_and_its_gradient():
    compression = Compression(stage("finetune"), 1, 1)
    compression.begin_step(0, 1)
    output = torch.randn(5, 2, requires_grad=True)
    attached = compression.attach(output, torch.rand(5, 2, 1, requires_grad=True), 0)
    assert torch.equal(attached, output)
    weights = torch.randn(5, 2)
    assert torch.equal(torch.autograd.grad((attached * weights).sum(), output)[0], weights)


class Reading:
    """A `Compression` that is asked where documents begin, and how often it had to read it."""

    def __init__(self, passes):
        self.compression, self.times = Compression(stage("finetune"), 1, 1, passes=passes), 0

    def __call__(self, borders, tokens=10):
        def find():
            self.times += 1
            return Documents.from_borders(borders, tokens)

        return self.compression.documents(borders, find, (tokens,))


def test_borders_are_read_again_when_they_have_changed():
    read = Reading(passes=1)
    borders = torch.tensor([0, 3, 10])
    assert read(borders) is read(borders) is read(borders.detach()) and read.times == 1
    borders[1] = 4
    assert read(borders).starts == [[0, 4]] and read.times == 2
    assert read(borders, 12).starts == [[0, 4, 10]] and read(borders[1:] - 4).starts == [[0, 6]] and read.times == 4
    for start in range(1, 10):  # each where the one before was
        assert read(torch.tensor([0, start, 10])).starts == [[0, start]]


def test_borders_of_all_passes_under_way_are_kept():
    read, batches = Reading(passes=3), [torch.tensor([0, start, 10]) for start in range(1, 9)]
    waiting = []
    for borders in batches:  # one forward pass more, then the oldest backward pass with its recomputation
        waiting.append((borders, read(borders)))
        if len(waiting) == 3:
            borders, found = waiting.pop(0)
            assert read(borders) is found
    assert read.times == len(batches) and len(read.compression._documents) == 3


def test_borders_of_inference_mode():
    """They keep no count of writes. What is found there in others must serve a backward pass later."""
    read, others = Reading(passes=1), torch.tensor([0, 2, 10])
    with torch.inference_mode():
        borders = torch.tensor([0, 3, 10])
        assert read(borders).starts == [[0, 3]]
        borders[1] = 4
        assert read(borders).starts == [[0, 4]]
        found = read(others)
    assert read(others) is found
    torch.randn(10, 1, requires_grad=True).masked_fill(found.first, 0.0).sum().backward()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("stages", "chunks", "group"), [(1, 1, None), (2, 1, None), (8, 1, None), (2, 3, 2), (4, 5, 4), (4, 2, 6)]
)
def test_passes_of_pipelines(stages, chunks, group, overlap):
    """By Megatron's own schedule, of its first stage, which has most under way."""
    from types import SimpleNamespace

    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    groups = SimpleNamespace(size=lambda: stages, rank=lambda: 0)
    virtual = None if chunks == 1 else chunks
    link = SimpleNamespace(pp_group=groups, virtual_pipeline_model_parallel_size=virtual)
    batches = 10 * (group or stages)
    total, _, ahead, _ = get_pp_rank_microbatches(
        batches, chunks, group, overlap_moe_expert_parallel_comm=overlap, p2p_communicator=link
    )
    forward = get_schedule_table(batches, chunks, group or stages)
    backward = [(batch, chunks - 1 - chunk) for batch, chunk in forward]
    most = max(min(backward.index(one) + ahead + 1, total) - forward.index(one) for one in forward)
    config = SimpleNamespace(
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=virtual,
        microbatch_group_size_per_vp_stage=group,
    )
    assert most <= passes_in_flight(config) <= most + 2
