"""The exchange of tokens for heads: who has what, and that gradients go back where they came from."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from megatron.core import parallel_state

from megatron_dmc.context_parallel import all_tokens, balanced, gathered, in_order, own_tokens


def test_megatrons_order_of_chunks(megatron):
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    class Rank:
        def __init__(self, rank):
            self._rank = rank

        def size(self):
            return 3

        def rank(self):
            return self._rank

    whole = torch.arange(24.0)[:, None]
    parts = [get_pos_emb_on_this_cp_rank(whole, 0, Rank(rank)) for rank in range(3)]
    assert balanced(3) == [0, 5, 1, 4, 2, 3]
    assert torch.equal(in_order(torch.cat(parts), 3), whole)


@pytest.mark.parametrize("cp", [2, 3])
def test_exchange(cp, tmp_path):
    multiprocessing.spawn(_exchange, (cp, f"file://{tmp_path}/store"), nprocs=cp)


def _exchange(rank, cp, store):
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=cp)
    generator = torch.Generator().manual_seed(7)
    s, b, g, r, d = 4 * cp, 2, 2 * cp, 3, 5
    whole = [torch.randn(s, b, heads, d, generator=generator) for heads in (g * r, g, g)]
    weight = torch.randn(s, b, g * r, d, generator=generator)
    chunks = balanced(cp)[2 * rank : 2 * rank + 2]

    def tokens(x):
        return torch.cat([x.chunk(2 * cp)[i] for i in chunks])

    def heads(x):
        return x.chunk(cp, 2)[rank]

    mine = [tokens(x).requires_grad_() for x in whole]
    query, key, value = all_tokens(*mine, dist.group.WORLD)
    for found, expected in zip((query, key, value), whole, strict=True):
        assert torch.equal(found, heads(expected)) and found.stride(-1) == 1
    # A function of each KV head by itself, of all tokens: what comes back, and its gradients, are one process's.
    output = own_tokens(_mixed(query, key, value), dist.group.WORLD)
    everything = [x.clone().requires_grad_() for x in whole]
    expected = _mixed(*everything)
    torch.testing.assert_close(output, tokens(expected))
    (output * tokens(weight)).sum().backward()
    (expected * weight).sum().backward()
    for found, of_all in zip(mine, everything, strict=True):
        torch.testing.assert_close(found.grad, tokens(of_all.grad))
    assert torch.equal(gathered(tokens(whole[0]), dist.group.WORLD), whole[0])
    assert not parallel_state.is_initialized()
    dist.destroy_process_group()


def _mixed(query, key, value):
    group = query.shape[2] // key.shape[2]
    return query.cumsum(0) * (key.flip(0) + value.cumsum(0)).repeat_interleave(group, 2)
