"""How many tokens merge: the target's schedule, and what holds a model to it.

`m̄` is the share of tokens that merged, over all layers, KV heads, tokens and sequences, and `p_n = 1 - 1/CR_n` the
share asked for. Counts are reduced over all ranks once per step, and what follows from them holds for the next one:
pipeline stages exchange nothing inside a step, and no gradient depends on the layout.

**The offset holds the ratio.** After a step the offset `c` of all decisions moves by `GAIN · (m̄ - p_n)` times the
noise's scale, as the biases of experts do in balancing without an auxiliary loss (Wang et al., 2024, arXiv 2408.15664).
What the language-model loss has against merging as such must then not move the decisions, or they sink, and the offset
after them. Along a common shift of all logits `a` its gradient is `Σ ∂L/∂a`; a compression loss of weight `λ` adds
`-λ Σ ∂m̄/∂a`. With the `λ` at which both cancel, a Lagrange multiplier, the loss says which tokens merge and the offset
how many. Each step on soft decisions measures both sums and brings `λ` up to date.

**As published** (`--dmc-no-moving-offset`) the offset stays, and the loss `max(0, p_n - m̄)` is added to the other: `λ`
is 1 while `m̄ < p_n`, and 0 after.

Hard decisions, those of inference, have no gradient. The stage `finetune` trains on them, and so does every other step
of `retrofit`: on soft ones alone, a model learns to read what they leave of entries that count as merged. While there
are steps on hard decisions, it is these that move the offset.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_dmc.config import DMCConfig, DMCError
from megatron_dmc.ops.documents import Documents
from megatron_dmc.ops.noise import LogisticNoise

GAIN = 3.0
"""By how much the offset moves for a share of merged tokens that is off by 1, in units of `dmc_noise_scale`. It settles
where the density of logits at the threshold is below 2 / GAIN, and does not overshoot below 1 / GAIN; decisions spread
over several units have a few hundredths, and the noise of soft ones alone spreads them to .25."""

REACH = 20.0
"""How far the offset moves from `dmc_init_val` at most, in the same units, where documents are too short for the
ratio."""

_COUNTS = ("merged", "tokens", "cost", "slope")
"""What a step sums up in each layer: tokens that merged, and all; along a common shift of the logits, the gradient of
the loss in units of `Compression._unit`, and that of the merged tokens' number."""

_NOISE = "dmc-noise-"
"""How the names of layers' states begin among Megatron's."""


def _forget_noise() -> None:
    """Every step begins its own; checkpoints have none."""
    states = get_cuda_rng_tracker().states_
    for name in [name for name in states if name.startswith(_NOISE)]:
        del states[name]


@dataclass(frozen=True)
class StepReport:
    """What one training step compressed.

    Attributes:
        loss: `max(0, p_n - m̄)`.
        ratio: tokens per cache entry, `1/(1 - m̄)`.
        target: `CR_n`.
        layer_ratios: `[layers]`, the ratio of each layer; NaN of one that makes no decisions.
    All but `target` are float64 tensors on the device, so that making a report waits for nothing.
    """

    loss: Tensor
    ratio: Tensor
    target: float
    layer_ratios: Tensor


@dataclass(frozen=True)
class _Reduced:
    """A step's counts over all ranks; `for_host` are merge rate, cost and slope of all layers, and `copied` tells when
    the device has copied them."""

    counts: Tensor
    merge_rate: Tensor
    for_host: Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, counts: Tensor) -> _Reduced:
        merged, tokens, cost, slope = counts.sum(1)
        merge_rate = merged / tokens
        # Into pinned memory. Behind the optimizer's step it would wait for that, and the next step's launches with it.
        for_host = torch.stack([merge_rate, cost, slope]).to("cpu", non_blocking=True)
        copied = None
        if counts.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        return cls(counts, merge_rate, for_host, copied)

    def wait(self) -> list[float]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.for_host.tolist()


class Compression:
    """One model's compression in training: the schedule, the count of decisions, the gradient of the loss.

    Every DMC layer of a model, in all its pipeline chunks, holds the same object. A training step is
    `begin_step`, then forward and backward passes, then `end_step`, on every rank; `reduce_counts` before the
    optimizer's step spares the host a wait for that. A loop of one's own saves and restores `offset`, `multiplier` and
    `merge_rate` with the model.

    Args:
        config: the settings.
        layers: decoder layers of the whole model.
        kv_heads: KV heads of one layer, over all tensor-parallel ranks.
        per_token: gradients are summed over tokens and divided by their number at the end of a step, as Megatron's
            `calculate_per_token_loss` does; otherwise each micro-batch is averaged.
        deciding: how many of the layers make decisions, all of them unless given.
        passes: how many forward passes a rank makes from one to its backward pass (`passes_in_flight`). Where documents
            begin is kept for so many.
    """

    def __init__(
        self,
        config: DMCConfig,
        layers: int,
        kv_heads: int,
        per_token: bool = False,
        deciding: int | None = None,
        passes: int = 1,
    ) -> None:
        self.config = config
        self.layers = layers
        self.kv_heads = kv_heads
        self.per_token = per_token
        self.deciding = layers if deciding is None else deciding
        self.passes = passes
        self.iteration: int | None = None
        self.target = 1.0
        self.last_channel = 1.0
        self.merge_rate: Tensor | float = 0.0  # m̄ of the last step; a tensor once a step has run
        self.offset: float = config.dmc_init_val
        """The offset `c` of decisions and importance."""
        self.hard = not config.soft
        """Whether this step trains on hard decisions."""
        self.multiplier = 0.0
        """The compression loss's weight where the offset holds the ratio: what merging costs."""
        self.kernel: str | None = None
        """What attention ran on last in training, one of `config.KERNELS`."""
        self.rotary_tables: tuple | None = None
        """The angles that Megatron passed last, positions, documents, and the tables made from them, for all layers."""
        self.packed_by_mask = False
        """Whether attention masks keep packed documents apart; in Megatron's own training loop its
        --reset-attention-mask. If not, masks are not read."""
        self._documents: dict[tuple, Documents] = {}  # the last ones found at the end
        self._counts: Tensor | None = None  # [len(_COUNTS), layers]
        self._reduced: _Reduced | None = None
        self._loss_scale: Tensor | float = 1.0
        self.seed = 1234
        """Of the noise; in Megatron's own training loop its --seed."""
        _forget_noise()

    def begin_step(self, iteration: int, total: int) -> None:
        """Set the schedule for step `iteration` (from 0) of `total`."""
        self.forget_step()
        self.iteration = iteration
        progress = min(1.0, iteration / total) if total else 1.0
        if self.config.dmc_stage == "zero-out":
            self.last_channel = max(0.0, 1 - progress / 0.8)
        else:
            self.target = 1 + (self.config.dmc_cr - 1) * (progress if self.config.dmc_stage == "retrofit" else 1.0)
            share = self.config.hard_share  # spread evenly, the soft ones first
            self.hard = int((iteration + 1) * share) > int(iteration * share)

    def noise(self, layer: int, device: torch.device, stream: int, first_head: int) -> LogisticNoise:
        """Noise for the next micro-batch of this step in layer `layer` (from 0).

        It follows from the seed, the step, the layer and how many micro-batches the layer has had in this step: the
        same in any layout (but for the data-parallel `stream`), and after a resumption in whatever layout. The count is
        kept as a random state among Megatron's, which a recomputed forward pass finds as it was.
        """
        tracker, name = get_cuda_rng_tracker(), f"{_NOISE}{layer}"
        if name not in tracker.states_:
            text = f"{self.seed} {self.iteration} {layer}"
            seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
            tracker.add(name, seed)
            tracker.seeds_.discard(seed)  # a recomputed pass may come here again
        with tracker.fork(name):
            return LogisticNoise.draw(device, stream, first_head, self.config.dmc_noise_scale)

    def documents(self, source: Tensor, find: Callable[[], Documents], sizes: tuple[int, ...]) -> Documents:
        """What `find` finds in `source`, once for all layers, and for recomputed passes.

        Args:
            source: borders or a mask. One is taken for another if it lies in the same memory and has not been written
                to since; a tensor of inference mode, which keeps no count of writes, is read for every layer.
            find: reads it, which waits for the device.
            sizes: what else the documents follow from, such as the number of tokens.
        """
        if source.is_inference():
            return find()
        # The weak reference leaves the memory to be freed, but not its identity to be taken by another.
        memory = StorageWeakRef(source.untyped_storage()), source.data_ptr(), source._version
        key = (*memory, source.dtype, source.shape, source.stride(), sizes)
        if key in self._documents:
            return self._documents[key]
        with torch.inference_mode(False):  # a later training pass may find them here
            self._documents[key] = found = find()
        if len(self._documents) > self.passes:
            del self._documents[next(iter(self._documents))]  # not the least used: a backward pass is the last use
        return found

    @property
    def merge_target(self) -> float:
        """`p_n`, the share of tokens asked to merge."""
        return 1 - 1 / self.target

    def set_loss_scale(self, scale: Tensor) -> None:
        """Megatron's hook for attention variants: the factor that brings our gradient to the scale of the loss."""
        self._loss_scale = scale.reshape(())

    def attach(self, output: Tensor, alpha: Tensor, layer: int, shares: int = 1) -> Tensor:
        """`output` unchanged; in the backward pass the decisions `alpha` `[s/shares, b, g]` of layer `layer` (from 0)
        are counted and receive the compression gradient. (Counting there, not in the forward pass, counts once however
        often a forward pass is recomputed.) `shares` tells how many ranks share out a micro-batch's tokens."""
        return _Attach.apply(output, alpha, self, layer, shares)

    def weigh(self, key: Tensor, layer: int, shares: int = 1) -> Tensor:
        """`key` `[s/shares, b, g, d]` unchanged; in the backward pass the gradient of its decisions is summed up, where
        the multiplier follows from it. Other arguments as for `attach`."""
        return _Weigh.apply(key, self, layer, shares) if self._weighs else key

    @property
    def _weighs(self) -> bool:
        """Whether this step measures what merging costs."""
        return self.config.dmc_moving_offset and not self.hard

    def reduce_counts(self) -> None:
        """Have the step's counts summed up over all ranks, and what the host needs of them copied to it, after the last
        backward pass of the step, on every rank. Waits for nothing. What was reduced before in the step is dropped:
        then its passes were made again."""
        if not self.config.merges:
            return
        counts = (
            self._counts if self._counts is not None else self._zeros("cuda" if torch.cuda.is_available() else "cpu")
        )
        self._counts = None
        if torch.distributed.is_initialized():
            # Decisions are whole numbers in float64: their sum is exact, hence the same for every layout.
            torch.distributed.all_reduce(counts)
        self._reduced = _Reduced.of(counts)

    def end_step(self) -> StepReport | None:
        """Set the bit, or the offset and the multiplier, for the next step; `None` if no decision was made. Reduces the
        counts where that has not been done. Where an offset moves, waits for the device to have come that far.

        Raises:
            DMCError: after a backward pass that came after `reduce_counts`.
        """
        _forget_noise()
        if not self.config.merges:
            return None
        if self._reduced is not None and self._counts is not None:
            raise DMCError("a backward pass came after reduce_counts: call it after the step's last one")
        if self._reduced is None:
            self.reduce_counts()
        merged, tokens, _, _ = self._reduced.counts
        self.merge_rate = self._reduced.merge_rate
        if self.config.dmc_moving_offset or not self.config.soft:
            self._hold(*self._reduced.wait())
        self._reduced = None
        return StepReport(
            loss=(self.merge_target - self.merge_rate).clamp(min=0),
            ratio=1 / (1 - self.merge_rate),
            target=self.target,
            layer_ratios=1 / (1 - merged / tokens),
        )

    def _hold(self, merge_rate: float, cost: float, slope: float) -> None:
        """Move the offset by what the merge rate is off, and the multiplier to where it would have left the gradient
        along the offset at 0."""
        if slope > 0 and math.isfinite(cost):  # else decisions were hard, or Megatron skips this step
            self.multiplier += cost / slope
        of_inference = self.hard or not self.config.hard_share
        if of_inference and not math.isnan(merge_rate):  # else no layer was in use
            # A checkpoint's offset may lie beyond: from there it comes back by steps like any other.
            begin, unit = self.config.dmc_init_val, self.config.dmc_noise_scale
            low, high = min(begin - REACH * unit, self.offset), max(begin + REACH * unit, self.offset)
            self.offset = min(max(self.offset + GAIN * unit * (merge_rate - self.merge_target), low), high)

    def forget_step(self) -> None:
        """Begin the step anew, in this process or another, as if it had not begun."""
        _forget_noise()
        self._counts = self._reduced = None

    def _zeros(self, device) -> Tensor:
        return torch.zeros(len(_COUNTS), self.layers, dtype=torch.float64, device=device)

    def _add(self, layer: int, device: torch.device, **values: Tensor | float) -> None:
        """To the counts of a layer, by their names in `_COUNTS`."""
        if self._counts is None:
            self._counts = self._zeros(device)
        for name, x in values.items():
            self._counts[_COUNTS.index(name), layer] += x

    def _unit(self, tokens: int) -> Tensor | float:
        """The gradient, at the scale of the loss, of the share of merged tokens for each decision: `1 / count`."""
        return self._loss_scale / (self.deciding * self.kv_heads * (1 if self.per_token else tokens))

    def _gradient(self, tokens: int, device: torch.device) -> Tensor | None:
        """The loss's gradient for each decision, straight through the threshold; `None` of hard decisions."""
        if self.hard:
            return None
        weight: Tensor | float = self.multiplier
        if not self.config.dmc_moving_offset:
            weight = torch.as_tensor(self.merge_rate, device=device) < self.merge_target
        gradient = -(weight * self._unit(tokens))
        return gradient if isinstance(gradient, Tensor) else torch.full((), gradient, device=device)


def passes_in_flight(config: TransformerConfig) -> int:
    """How many forward passes a rank makes at most in Megatron's pipelines from one to its backward pass, with it."""
    stages, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size or 1
    if chunks == 1:
        return stages
    # Interleaved, the first of a group passes through all chunks before it comes back through all.
    return 2 * stages + 2 * (chunks - 1) * max(stages, config.microbatch_group_size_per_vp_stage or 0)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, alpha: Tensor, compression: Compression, layer: int, shares: int) -> Tensor:
        ctx.compression, ctx.layer, ctx.shape, ctx.dtype = compression, layer, alpha.shape, alpha.dtype
        ctx.shares = shares
        slope = None
        if compression._weighs:
            slope = (alpha * (1 - alpha)).sum(dtype=torch.float64) / compression.config.dmc_temp
        ctx.save_for_backward((alpha > 0.5).sum(), slope)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        merged, slope = ctx.saved_tensors
        ctx.compression._add(ctx.layer, merged.device, merged=merged, tokens=ctx.shape.numel())
        if slope is not None:
            ctx.compression._add(ctx.layer, merged.device, slope=slope)
        s, b, _ = ctx.shape
        gradient = ctx.compression._gradient(s * b * ctx.shares, merged.device)
        gradient = None if gradient is None else gradient.to(ctx.dtype).expand(ctx.shape)
        return grad_output, gradient, None, None, None


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, key: Tensor, compression: Compression, layer: int, shares: int) -> Tensor:
        ctx.compression, ctx.layer, ctx.shares = compression, layer, shares
        return key.view_as(key)

    @staticmethod
    def backward(ctx, grad: Tensor):
        s, b = grad.shape[:2]
        cost = grad[..., -1].sum(dtype=torch.float64) / ctx.compression._unit(s * b * ctx.shares)
        ctx.compression._add(ctx.layer, grad.device, cost=cost)
        return grad, None, None, None
