"""Distillation: a retrofit learns from the original model, whose cache is not compressed.

The loss of a token becomes `(1 - w) · CE + w · KL(teacher ‖ student)`, over the whole vocabulary and without another
temperature (Hinton et al., 2015; NVIDIA's later retrofits, Łańcucki et al., 2025, arXiv 2506.05345, learn from the
divergence alone). The compression loss is added as always. The teacher is a second model on every rank, in the
student's dtype and split as it is by tensor and context parallelism; it has neither gradients nor optimizer states.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.arguments import other_model
from megatron_dmc.config import DMCConfig, DMCError

SCORES = 2**25
"""How many logits are in memory at once in float32 (and about four times as much that follows from them)."""


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--dmc-teacher` and `--dmc-teacher-weight`."""
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--dmc-teacher", metavar="CHECKPOINT", help="the original model: learn what it predicts, beside the text"
    )
    group.add_argument(
        "--dmc-teacher-weight", type=float, default=1.0, metavar="W",
        help="loss = (1 - W) * cross entropy + W * divergence from the teacher (default: 1.0)",
    )  # fmt: skip
    return parser


def divergence(student: Tensor, teacher: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """`KL(teacher ‖ student)` of each token.

    Args:
        student: logits `[..., v]`, in bf16, float32 or float64; of a tensor-parallel rank, its part of the vocabulary.
        teacher: logits of the same shape, without a gradient. Their memory is used: they are overwritten.
        group: the tensor-parallel ranks.

    Returns:
        `[...]` in nats, in float32 (float64 for such logits).
    """
    return _Divergence.apply(student, teacher, group)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, group) -> Tensor:
        if student.shape != teacher.shape:
            raise DMCError(
                f"the teacher's logits have shape {tuple(teacher.shape)}, the model's {tuple(student.shape)}: a "
                "teacher must have the same vocabulary"
            )
        wide = torch.promote_types(student.dtype, torch.float32)
        rows = max(1, SCORES // student.shape[-1])
        blocks = list(zip(*(x.reshape(-1, x.shape[-1]).split(rows) for x in (student, teacher)), strict=True))

        def reduce(found: Tensor, operation) -> Tensor:
            if group is not None and group.size() > 1:
                torch.distributed.all_reduce(found, operation, group=group)
            return found

        total = torch.distributed.ReduceOp.SUM
        # Three passes, so that there are three reductions, however many blocks.
        tops = [torch.stack([s.amax(-1).to(wide), t.amax(-1).to(wide)]) for s, t in blocks]
        tops = reduce(torch.cat(tops, 1), torch.distributed.ReduceOp.MAX)
        sums = [
            torch.stack([(x.to(wide) - top[:, None]).exp().sum(-1) for x, top in zip(pair, both, strict=True)])
            for pair, both in zip(blocks, tops.split(rows, 1), strict=True)
        ]
        normalizers = tops + reduce(torch.cat(sums, 1), total).log()
        found = []
        for (s, t), (of_student, of_teacher) in zip(blocks, normalizers.split(rows, 1), strict=True):
            log_student = s.to(wide) - of_student[:, None]
            log_teacher = t.to(wide) - of_teacher[:, None]
            teacher_share = log_teacher.exp()
            found.append((teacher_share * (log_teacher - log_student)).sum(-1))
            t.copy_(log_student.exp() - teacher_share)  # the gradient for the student's logits
        ctx.save_for_backward(teacher)
        return reduce(torch.cat(found), total).view(student.shape[:-1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad[..., None].to(gradient.dtype), None, None


class Teacher:
    """The original model, loaded when it is first asked.

    Args:
        path: its checkpoint, of any layout (`megatron_dmc.checkpoint.find_checkpoint`).
        weight: `w`, above 0 and at most 1.

    Raises:
        DMCError: for another weight.
    """

    def __init__(self, path: str | Path, weight: float) -> None:
        if not 0 < weight <= 1:
            raise DMCError(f"--dmc-teacher-weight must be above 0 and at most 1; got {weight}")
        self.path, self.weight = Path(path), weight
        self._model: torch.nn.Module | None = None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Teacher | None:
        """The teacher that a run's arguments name, or `None`.

        Raises:
            DMCError: for a run that cannot have one.
        """
        if args.dmc_teacher is None:
            return None
        packed, context = args.dataloader_inter_document_masking, args.context_parallel_size > 1
        for refused, what in (
            (args.pipeline_model_parallel_size > 1, "--pipeline-model-parallel-size above 1: the logits of teacher and "
             "student meet on one rank. Use tensor and data parallelism"),
            (args.hybrid_layer_pattern is not None, "--hybrid-layer-pattern"),
            (args.mtp_num_layers, "--mtp-num-layers"),
            (args.num_experts, "--num-experts"),
            (packed and context, "--dataloader-inter-document-masking under context parallelism, where Megatron's own "
             "attention expects every document shared out by itself. Leave one of the two out"),
            ((packed or context) and args.transformer_impl == "local", "--transformer-impl local and context "
             "parallelism or --dataloader-inter-document-masking, of which Megatron's local attention knows neither"),
        ):  # fmt: skip
            if refused:
                raise DMCError(f"--dmc-teacher does not go with {what}")
        return cls(args.dmc_teacher, args.dmc_teacher_weight)

    def check(self, args: argparse.Namespace) -> None:
        """Look at the checkpoint, before anything is built.

        Raises:
            DMCError: where there is none, or for one that is not of this run's model without DMC.
        """
        from megatron.core import dist_checkpointing

        from megatron_dmc.checkpoint import find_checkpoint

        path = find_checkpoint(self.path)
        saved = dist_checkpointing.load_common_state_dict(str(path)).get("args")
        if (stage := getattr(saved, "dmc_stage", None)) is not None:
            raise DMCError(
                f"--dmc-teacher {path} has been trained with DMC (stage {stage}): give the original model's checkpoint"
            )
        if differ := other_model(saved, args):
            raise DMCError(f"--dmc-teacher {path} is another model than this run's: {'; '.join(differ)}")

    @torch.no_grad()
    def logits(self, *inputs: Any, **named: Any) -> Tensor:
        """What the model makes of a batch: `[b, s, v]`, of a tensor-parallel rank its part of the vocabulary."""
        if self._model is None:
            self._model = self._load()
        return self._model(*inputs, **named)

    def losses(
        self, student: Tensor, teacher: Tensor, cross_entropy: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each token `[b, s]`, and its two parts: cross entropy and divergence.

        Args:
            student, teacher: logits `[b, s, v]`; the teacher's are overwritten.
            cross_entropy: gives `[b, s]` for logits, and may overwrite them, as Megatron's does.
        """
        from megatron.core import parallel_state

        apart = divergence(student, teacher, parallel_state.get_tensor_model_parallel_group())
        if self.weight == 1:  # for the log alone
            return apart, cross_entropy(student.detach()), apart
        of_text = cross_entropy(student)
        return (1 - self.weight) * of_text + self.weight * apart, of_text, apart

    def _load(self) -> torch.nn.Module:
        from megatron.training import get_args
        from megatron.training.utils import print_rank_0

        from megatron_dmc.checkpoint import build_model, find_checkpoint, read_weights

        path = find_checkpoint(self.path)
        model = build_model(get_args(), DMCConfig(), perform_initialization=False)
        read_weights(model, path)
        print_rank_0(f"> the teacher is {path}")
        return model.eval().requires_grad_(False)
