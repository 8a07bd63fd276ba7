"""Generation by tensor-parallel ranks and by pipeline stages: the text of one process, also where one rank runs dry."""

import pytest
import torch
from conftest import HAVE_GPU
from runs import launcher, python
from split_generate import LAYOUTS, PROMPTS, STEPS, WINDOWS, build, scenarios
from test_engine import prompts_of

from megatron_dmc.engine import PageAccount

pytestmark = [
    pytest.mark.usefixtures("megatron"),
    pytest.mark.skipif(HAVE_GPU, reason="float64, for which there is only the reference, which no CUDA graph captures"),
]
SPLIT = dict(TP=2, PP=0)
"""What the ranks share out of `[layers, slots, heads]`."""


def test_two_ranks_generate_as_one(tmp_path, fresh_seed, monkeypatch):
    from megatron.core import dist_checkpointing

    monkeypatch.setattr(PageAccount, "peak", PageAccount.peak)  # what the scenarios change comes back
    given = dict(prompts=prompts_of(*PROMPTS), tokens=torch.randint(0, 64, (5, 16)))
    torch.save(given, tmp_path / "given.pt")
    alone = {}
    for window in WINDOWS:
        model, folder = build(window), tmp_path / str(window)
        folder.mkdir()
        dist_checkpointing.save(model.sharded_state_dict(), str(folder))
        alone[window] = scenarios(model, **given)
    run = python(*launcher(2), "tests/split_generate.py", tmp_path)
    assert run.code == 0, run.output[-12000:]

    dry_when, gave_way = set(), 0
    for layout in LAYOUTS:
        ranks = [torch.load(tmp_path / f"{layout} {rank}.pt") for rank in range(2)]
        for window in WINDOWS:
            for name in ranks[0][window]:
                where, found = f"{layout}, window {window}, {name}", [rank[window][name] for rank in ranks]
                compare(found, alone[window][name.partition(",")[0]], SPLIT[layout], where)
                if "text" in found[0]:
                    gave_way += found[0]["notes"]
                    continue
                failed = {(when, kind) for when, kind, ok, _ in found[0]["notes"] if not ok}
                assert bool(failed) == ("dry" in name), where
                dry_when |= failed
    assert gave_way, "the engine had room for all: nothing was tested"
    assert dry_when >= {("begun", "decoding"), ("committed", "chunks")}, "no rank ran dry: nothing was tested"


def compare(found, expected, split, where):
    assert found[0]["notes"] == found[1]["notes"], f"{where}: the ranks do not agree"
    for rank, x in enumerate(found):
        assert (x["lost"], x["left"]) == (0, 0), f"{where}, rank {rank}: pages or entries left"
    if "text" in expected:
        for rank, x in enumerate(found):
            for name in ("text", "tokens"):
                assert x[name] == expected[name], f"{where}, rank {rank}: {name}"
            # Of the ranks it is the one with most, each of half the heads.
            assert 1 - 1e-9 <= x["entries"] / expected["entries"] < 2, f"{where}, rank {rank}: entries"
        assert "crowded" in where or not found[0]["notes"], f"{where}: who gave way"
        return
    for rank, x in enumerate(found):
        error = (x["logits"] - expected["logits"]).abs().max()
        assert error < 1e-6, f"{where}, rank {rank}: logits are off by {error}"
        assert x["tokens"].equal(expected["tokens"]), f"{where}, rank {rank}: tokens"
    entries = torch.cat([x["entries"] for x in found], split)
    assert entries.equal(expected["entries"]), where
    assert entries.sum() < 8 * expected["tokens"].sum(), "nothing was merged"
    assert sum(not ok for _, _, ok, _ in found[0]["notes"]) == 3 * STEPS * ("dry" in where), where
