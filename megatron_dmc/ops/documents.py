"""Packed documents: several in one sequence, none of which merges into or attends to its neighbour.

A document's first token has nothing to merge into, as a sequence's first token has not, and queries see no keys of
other documents. Where documents begin is known to the host, which reads it once per micro-batch, and to the device.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

NEVER = -30000.0
"""In a key's last channel: does not merge, whatever the noise, and without a gradient. float16 can hold it."""


class Documents:
    """Where documents begin in `b` sequences of `s` tokens.

    Args:
        starts: of each sequence, the tokens with which a document begins, ascending from 0.
        tokens: `s`.
        device: of the tensors.
        before: of each sequence, how many tokens of its first document came before it, if any did.

    Raises:
        ValueError: for starts that do not begin with 0, do not ascend or lie beyond the tokens.

    Attributes:
        first: bool `[s, b]`, whether a token is the first of its document.
        borders: int32 `[documents + 1]`, where documents begin in the sequences one after the other, and their end.
        longest: tokens of the longest document.
    """

    def __init__(
        self,
        starts: Sequence[Sequence[int]],
        tokens: int,
        device: torch.device | str,
        before: Sequence[int] | None = None,
    ) -> None:
        for of_one in starts:
            if not of_one or of_one[0] != 0 or of_one[-1] >= tokens or any(a >= b for a, b in pairwise(of_one)):
                raise ValueError(
                    f"documents must begin with token 0 and then ever later, before the end at {tokens}; they begin at "
                    f"{_shortened(of_one)}"
                )
        self.starts, self.tokens = starts, tokens
        self.before = [0] * len(starts) if before is None else before
        self._within: tuple[tuple, Documents] | None = None
        borders = [i * tokens + start for i, of_one in enumerate(starts) for start in of_one] + [len(starts) * tokens]
        self.longest = max(b - a for a, b in pairwise(borders))
        self.borders = torch.tensor(borders, dtype=torch.int32).to(device, non_blocking=True)
        self.first = torch.zeros(len(starts) * tokens, dtype=torch.bool, device=device)
        self.first[self.borders[:-1].long()] = True
        self.first = self.first.view(len(starts), tokens).T

    @classmethod
    def from_borders(cls, borders: Tensor, tokens: int) -> Documents:
        """From the cumulative lengths `[documents + 1]` of one sequence's documents, as Megatron's `PackedSeqParams`
        has them. Documents without tokens are none, and tokens behind the last border are one more. Waits for the
        device.

        Raises:
            ValueError: for borders that do not begin with 0, descend or lie beyond the tokens.
        """
        found = borders.flatten().tolist()
        if not found or found[0] != 0 or found[-1] > tokens or any(a > b for a, b in pairwise(found)):
            raise ValueError(
                f"cu_seqlens must ascend from 0 and end within the {tokens} tokens; they are {_shortened(found)}"
            )
        return cls([sorted({start for start in found if start < tokens})], tokens, borders.device)

    @classmethod
    def from_first(cls, first: Tensor) -> Documents:
        """From bool `[s, b]`, whether a token is the first of its document. Waits for the device."""
        starts: list[list[int]] = [[] for _ in range(first.shape[1])]
        for sequence, token in first.T.nonzero().tolist():
            starts[sequence].append(token)
        return cls(starts, len(first), first.device)

    @cached_property
    def positions(self) -> Tensor:
        """int64 `[s, b]`: how many tokens of its document are before a token."""
        count = torch.arange(self.tokens, device=self.first.device)[:, None]
        return count - torch.where(self.first, count, 0).cummax(0).values

    @cached_property
    def with_before(self) -> tuple[Tensor, int]:
        """`borders` and `longest` where each sequence begins with the tokens that came `before` it."""
        borders, more = [0], 0
        for i, (of_one, before) in enumerate(zip(self.starts, self.before, strict=True)):
            more += before
            borders += [i * self.tokens + end + more for end in (*of_one[1:], self.tokens)]
        longest = max(b - a for a, b in pairwise(borders))
        return torch.tensor(borders, dtype=torch.int32).to(self.first.device, non_blocking=True), longest

    def apart(self, rows: slice = slice(None), seen: int | None = None) -> Tensor:
        """bool `[b, rows, seen]`: whether queries of the tokens `rows` and the first `seen` keys are of different
        documents."""
        document = self.first.cumsum(0).T
        return document[:, rows, None] != document[:, None, :seen]

    def within(self, chunks: Sequence[int], size: int) -> Documents:
        """Of some of the sequences' chunks of `size` tokens, each a sequence of its own, and in each document's part;
        `before` says what its first document has before the chunk.

        The chunks' sequences come one chunk after the other. Kept for the next layer that asks for the same.
        """
        key = (tuple(chunks), size)
        if self._within is not None and self._within[0] == key:
            return self._within[1]
        starts, before = [], []
        for begin in (i * size for i in chunks):
            for of_one in self.starts:
                next_one = bisect_right(of_one, begin)
                inside = of_one[next_one : bisect_left(of_one, begin + size)]
                starts.append([0, *(start - begin for start in inside)])
                before.append(begin - of_one[next_one - 1])
        found = Documents(starts, size, self.first.device, before)
        self._within = key, found
        return found

    def across(self, sequence: int, begin: int, end: int) -> tuple[int, int]:
        """The document that lies across a border: of the tokens from `begin` to before `end`, how many are of one that
        began before them, and where it began."""
        of_one = self.starts[sequence]
        next_one = bisect_left(of_one, begin)
        if next_one < len(of_one) and of_one[next_one] == begin:
            return 0, begin
        after = of_one[next_one] if next_one < len(of_one) else self.tokens
        return min(after, end) - begin, of_one[next_one - 1]


def separate(key: Tensor, first: Tensor) -> Tensor:
    """Keys `[s, b, g, d]` with last channels such that no token that is `first` `[s, b]` of a document merges."""
    return torch.cat([key[..., :-1], key[..., -1:].masked_fill(first[..., None, None], NEVER)], -1)


def _shortened(values: Sequence[int]) -> str:
    return f"[{', '.join(map(str, values[:20]))}{', …' if len(values) > 20 else ''}]"
