"""Logistic noise that a key and a counter determine, wherever it is drawn.

The same key gives a token and head the same noise in a recomputed forward pass, in a resumed run, on any
tensor-parallel rank that holds the head, in the fused kernels and here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogisticNoise:
    """Logistic noise: of scale 1 the difference of two standard Gumbel variables.

    Attributes:
        key: int64 `[1]`.
        stream: separates draws that share a key, for instance the data-parallel ranks.
        first_head: index of the first KV head among those of all tensor-parallel ranks.
        scale: a factor.
    """

    key: Tensor
    stream: int = 0
    first_head: int = 0
    scale: float = 1.0

    @classmethod
    def draw(cls, device: torch.device, stream: int = 0, first_head: int = 0, scale: float = 1.0) -> LogisticNoise:
        """With a key from the default generator of `device`."""
        return cls(torch.randint(2**63 - 1, (1,), device=device), stream, first_head, scale)

    def sample(self, tokens: int, sequences: int, kv_heads: int) -> Tensor:
        """The noise itself, float32 `[tokens, sequences, kv_heads]`, from 23 random bits each."""
        count = [torch.arange(n, device=self.key.device) for n in (tokens, sequences, kv_heads)]
        token, sequence, head = torch.meshgrid(*count, indexing="ij")
        words = _philox(self.key, (token, sequence, head + self.first_head, torch.full_like(token, self.stream)))
        uniform = ((words >> 9).float() + 0.5) * 2.0**-23  # in (0, 1), and 1 - uniform is exact
        return self.scale * (torch.log(uniform) - torch.log(1 - uniform))


_WORD = 0xFFFFFFFF


def _philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The first word of Philox4x32-10 (Salmon et al., SC 2011), in int64 arithmetic."""
    low_key, high_key = key & _WORD, (key >> 32) & _WORD
    x, y, z, w = counter
    for _ in range(10):
        first, second = 0xD2511F53 * x, 0xCD9E8D57 * z  # bits of the unsigned products, whatever sign int64 reads
        x, y, z, w = (
            (second >> 32) & _WORD ^ y ^ low_key,
            second & _WORD,
            (first >> 32) & _WORD ^ w ^ high_key,
            first & _WORD,
        )
        low_key, high_key = (low_key + 0x9E3779B9) & _WORD, (high_key + 0xBB67AE85) & _WORD
    return x
