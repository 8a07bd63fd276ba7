"""What ranks exchange that share out tokens: who has what, and that gradients go back where they came from."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from emulation import cuda_headers
from megatron.core import parallel_state
from test_fused import NAMES, ROUNDING, compare_results, documents_one_by_one, error, run, some_documents

from megatron_dmc.context_parallel import (
    all_tokens,
    balanced,
    chunks_of_halves,
    gather,
    in_order,
    own_tokens,
    places_before,
)
from megatron_dmc.ops import fused, reference
from megatron_dmc.ops.chunks import dmc_attention_of_chunks, zero_out_attention_of_chunks
from megatron_dmc.ops.documents import Documents
from megatron_dmc.ops.noise import LogisticNoise


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
    assert chunks_of_halves(3) == [5, 4, 3, 0, 1, 2]
    for chunk in range(6):
        assert sorted(chunks_of_halves(3)[places_before(chunk, 3)]) == list(range(chunk))


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
    assert torch.equal(gather(tokens(whole[0]), dist.group.WORLD), whole[0])
    assert not parallel_state.is_initialized()
    dist.destroy_process_group()


def _mixed(query, key, value):
    group = query.shape[2] // key.shape[2]
    return query.cumsum(0) * (key.flip(0) + value.cumsum(0)).repeat_interleave(group, 2)


@pytest.mark.parametrize("cp", [2, 3])
def test_attention_of_chunks(cp, tmp_path):
    """In float64: every rank has its tokens' part of what one process computes of all, gradients included."""
    seed = torch.seed() % 2**32
    print("seed", seed)
    multiprocessing.spawn(_attend, (cp, f"file://{tmp_path}/store", seed), nprocs=cp)


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.skipif(cuda_headers() is None or shutil.which("g++") is None, reason="needs g++ and the CUDA headers")
def test_fused_attention_of_chunks(cp, tmp_path, emulated_kernels):
    (library,) = [path for path in torch.ops.loaded_libraries if path.endswith("emulated.so")]
    seed = torch.seed() % 2**32
    print("seed", seed)
    emulated = (library, emulated_kernels.name)
    multiprocessing.spawn(_attend, (cp, f"file://{tmp_path}/store", seed, "dense", emulated), nprocs=cp)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_fused_attention_of_chunks_on_gpus(kernel, tmp_path):
    seed = torch.seed() % 2**32
    print("seed", seed)
    multiprocessing.spawn(_attend, (2, f"file://{tmp_path}/store", seed, kernel), nprocs=2)


def by_flash(*args, **options):
    """`zero_out_attention_of_chunks` as on a GPU, with a stand-in for the kernel: no mask of all tokens is made."""
    kernels = SimpleNamespace(_flash_attention_forward=documents_one_by_one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "flash_takes", lambda _: True)
        patch.setattr(fused, "_aten", kernels)
        patch.delattr(Documents, "apart")
        return zero_out_attention_of_chunks(*args, **options)


def _attend(rank, cp, store, seed, kernel="reference", emulated=None):
    if emulated is not None:
        torch.ops.load_library(emulated[0])
        fused._kernels = getattr(torch.ops, emulated[1])
        fused.check_fused = lambda *_: None  # it asks for a GPU
    on_gpus = kernel in ("cudnn", "flash")
    if on_gpus:
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=store, rank=rank, world_size=cp)
    torch.manual_seed(seed)
    dtype, d, chunk = (torch.float64, 6, 5) if kernel == "reference" else (torch.bfloat16, 64, 33)
    if on_gpus:
        chunk = 517
    s, b, h, g = 2 * cp * chunk, 2, 4, 2

    def tokens(x):
        return torch.cat([x.chunk(2 * cp)[i] for i in balanced(cp)[2 * rank : 2 * rank + 2]])

    angles = torch.rand(s, d // 2) * 6
    longest = min(chunk, 33)
    for window, temperature, by_sequence in ((1, 0.5, False), (3, 0.5, True), (longest, 0.1, False), (4, None, True)):
        rows = [torch.randn(s, b, heads, d) for heads in (h, g, g)]
        rows[0][..., -1] -= 1  # importance and decisions all over their ranges
        rows[1][..., -1] += 1
        rows = [x.to(dtype) for x in rows]
        rotary = (angles.cos(), angles.sin())
        if by_sequence:
            rotary = tuple(torch.stack([t, t.flip(0)], 1) for t in rotary)
        noise = None if temperature is None else LogisticNoise(torch.tensor([seed]), 3, first_head=1, scale=0.3)
        options = dict(window=window, offset=1.0, temperature=temperature)

        ours = partial(dmc_attention_of_chunks, group=dist.group.WORLD, kernel=kernel, noise=noise)
        grads = torch.randn(s, b, h, d), 0.1 * torch.randn(s, b, g)
        sample = noise and noise.sample(s, b, g)
        if by_sequence:
            options["documents"] = some_documents(s, b, rows[0].device)
        exact = run(reference.dmc_attention, rows, rotary, grads, torch.float64, noise=sample, **options)
        mine = run(ours, [tokens(x) for x in rows], rotary, [tokens(x) for x in grads], **options)
        if kernel == "reference":
            for name, x, y in zip(NAMES, mine, exact, strict=True):
                torch.testing.assert_close(x, tokens(y), msg=lambda m, about=(name, options): f"{about}: {m}")
        else:
            plain = run(reference.dmc_attention, rows, rotary, grads, noise=sample, **options)
            parts = [[tokens(x) for x in results] for results in (plain, exact)]
            compare_results(mine, *parts, [tokens(x) for x in grads], **options)
        if kernel != "dense":
            options = dict(last_channel=0.3, documents=options.get("documents"))
            whole = [x.clone().requires_grad_() for x in rows]
            expected = reference.zero_out_attention(*whole, rotary, **options)
            expected.backward(grads[0].to(dtype))
            for attend in (zero_out_attention_of_chunks, *([by_flash] if by_sequence and not on_gpus else [])):
                mine = [tokens(x).requires_grad_() for x in rows]
                found = attend(*mine, rotary, group=dist.group.WORLD, **options)
                found.backward(tokens(grads[0]).to(dtype))
                pairs = [(found, expected), *((x.grad, y.grad) for x, y in zip(mine, whole, strict=True))]
                bound = 1e-12 if kernel == "reference" else 4 * ROUNDING[dtype]
                # Documents of one token give queries and keys no gradient: it is all noise where a rank has no others.
                assert all(error(x, tokens(y).double(), floor=0.01) < bound for x, y in pairs)
    with pytest.raises(ValueError, match=f"at most the {chunk} tokens of a chunk; got {chunk + 1}"):
        dmc_attention_of_chunks(*(tokens(x) for x in rows), None, group=dist.group.WORLD, window=chunk + 1)
    documents = some_documents(s // cp, b, rows[0].device)  # of a rank's tokens
    with pytest.raises(ValueError, match="documents must be of all tokens and sequences"):
        dmc_attention_of_chunks(*(tokens(x) for x in rows), None, group=dist.group.WORLD, documents=documents, window=2)
    if kernel != "reference":
        fused.max_window = lambda *_: 2
        with pytest.raises(ValueError, match="window must be at most 2 for the fused kernels; got 3"):
            ours(*(tokens(x) for x in rows), None, window=3)
    dist.destroy_process_group()
