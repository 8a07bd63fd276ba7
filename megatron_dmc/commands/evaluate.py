"""`megatron-dmc evaluate`: perplexity, recall, and any task of lm-evaluation-harness, compressed and not."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from megatron_dmc.config import DMCError
from megatron_dmc.cpu import emulate_cuda

EXAMPLES = """\
examples:
  megatron-dmc evaluate checkpoints/dmc-4x --text held-out/
  megatron-dmc evaluate checkpoints/dmc-4x --needle --lengths 1024 4096 --depths 5
  megatron-dmc evaluate checkpoints/dmc-4x --keys 4 16 --samples 50
  megatron-dmc evaluate checkpoints/dmc-4x --tasks hellaswag gsm8k --limit 200

CHECKPOINT is the folder that --save named in training (its latest iteration), or one iter_… folder in it, with DMC or
without. All decisions are hard ones. Of a DMC model each result is shown with compression and, but for tasks, with
every token appended. Tasks that generate answers do so from the compressed cache: for a model without DMC, convert it
and let `lm_eval --model hf` run them. Tasks need the package lm_eval (pip install "megatron-dmc[evaluate]")."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="megatron-dmc evaluate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now, if it has moved since training")
    parser.add_argument("--output", type=Path, help="write the results here as JSON, too")
    text = parser.add_argument_group("perplexity")
    text.add_argument("--text", nargs="+", type=Path, help="held-out text: files, JSON lines, folders")
    text.add_argument("--data-path", metavar="PREFIX", help="instead, an indexed dataset")
    text.add_argument("--seq-length", type=int, help="tokens per window (default: as in training)")
    text.add_argument("--max-tokens", type=int, default=1_000_000, help="stop after about so many (default: 1,000,000)")
    recall = parser.add_argument_group("recall, on texts that are made up")
    recall.add_argument("--needle", action="store_true", help="one statement, at several depths of the text")
    recall.add_argument("--keys", nargs="+", type=int, help="so many statements, one of which is asked for")
    recall.add_argument("--lengths", nargs="+", type=int, help="tokens of a text (default: as in training)")
    recall.add_argument("--depths", type=int, default=5, help="how many, from the beginning to the end (default: 5)")
    recall.add_argument("--samples", type=int, default=20, help="texts for each length and depth (default: 20)")
    recall.add_argument("--seed", type=int, default=0)
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness")
    tasks.add_argument("--tasks", nargs="+", help="their names")
    tasks.add_argument("--include-path", help="folder with tasks of your own")
    tasks.add_argument("--num-fewshot", type=int)
    tasks.add_argument("--limit", type=int, help="documents of each task, at most")
    tasks.add_argument("--batch-size", type=int, default=64, help="answers generated at once (default: 64)")
    tasks.add_argument("--cache-gib", type=float, help="memory for their cache (default: 90%% of what is free)")
    args = parser.parse_args()
    _check(args)
    emulate_cuda()
    from megatron_dmc.checkpoint import load
    from megatron_dmc.evaluation import check_positions

    loaded = load(args.checkpoint, tokenizer_model=args.tokenizer_model, need_dmc=False)
    for flag, lengths in (("--seq-length", [args.seq_length]), ("--lengths", args.lengths)):
        for length in filter(None, lengths or ()):
            check_positions(loaded, flag, length)
    manager = _tasks_of(loaded, args) if args.tasks else None
    results: dict[str, Any] = {"checkpoint": args.checkpoint, "target_ratio": loaded.dmc.dmc_cr}
    if not loaded.dmc.merges:
        del results["target_ratio"]
    if args.text is not None or args.data_path is not None:
        results["perplexity"] = _perplexity(loaded, args)
    if args.needle or args.keys:
        results["recall"] = _recall(loaded, args)
    if args.tasks:
        results["tasks"] = _tasks(loaded, args, manager)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        print(f"\nwrote {args.output}")


def _check(args: argparse.Namespace) -> None:
    if not (args.text or args.data_path or args.needle or args.keys or args.tasks):
        raise DMCError("nothing to evaluate: give --text, --data-path, --needle, --keys or --tasks")
    if args.text is not None and args.data_path is not None:
        raise DMCError("give held-out text either as --text or as --data-path")
    for name in ("seq_length", "max_tokens", "depths", "samples", "batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise DMCError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DMCError("evaluate runs in one process: start it without torchrun")
    if args.tasks:
        try:
            import lm_eval  # noqa: F401
        except ModuleNotFoundError as error:
            raise DMCError(f'--tasks needs the package {error.name}: pip install "megatron-dmc[evaluate]"') from error


def _both_ways(loaded, rows: list[tuple[list[int], list[int]]]) -> dict[str, list]:
    """The scores of rows, with compression where the model compresses, and without."""
    from megatron_dmc.evaluation import appending_all, score

    ways = {}
    if loaded.dmc.merges:
        ways["compressed"] = score(loaded, rows, progress=True)
    with appending_all(loaded):
        ways["uncompressed"] = score(loaded, rows, progress=True)
    return ways


def _ratio(scores: list, rows: list[tuple[list[int], list[int]]]) -> float:
    """Tokens per entry over all rows."""
    tokens = [len(text) + len(continuation) - 1 for text, continuation in rows]
    return sum(tokens) / sum(n / found.ratio for n, found in zip(tokens, scores, strict=True))


def _perplexity(loaded, args: argparse.Namespace) -> dict[str, Any]:
    from megatron_dmc.evaluation import perplexity, read_windows

    length = args.seq_length or loaded.args.seq_length
    windows = read_windows(loaded, length, text=args.text, data=args.data_path, limit=args.max_tokens).tolist()
    rows = [(window[:1], window[1:]) for window in windows]
    results: dict[str, Any] = dict(tokens=len(windows) * length, seq_length=length)
    for way, scores in _both_ways(loaded, rows).items():
        loss = -sum(found.log_prob for found in scores) / results["tokens"]
        results[way] = dict(loss=loss, perplexity=perplexity(loss), ratio=_ratio(scores, rows))
        print(f"{way}: loss {loss:.4f}, perplexity {perplexity(loss):.4g}, ratio {results[way]['ratio']:.2f}")
    return results


def _recall(loaded, args: argparse.Namespace) -> list[dict[str, Any]]:
    from megatron_dmc.retrieval import multi_key, needle

    def tokenize(text: str) -> list[int]:
        return list(loaded.tokenizer.tokenize(text))

    cases = []
    for length in args.lengths or [loaded.args.seq_length]:
        for depth in [i / max(1, args.depths - 1) for i in range(args.depths)] if args.needle else ():
            texts = [needle(tokenize, length, depth, args.seed + i) for i in range(args.samples)]
            cases.append((dict(test="needle", tokens=length, depth=round(depth, 3)), texts))
        for keys in args.keys or ():
            texts = [multi_key(tokenize, length, keys, args.seed + i) for i in range(args.samples)]
            cases.append((dict(test="keys", tokens=length, keys=keys), texts))
    results = []
    for about, texts in cases:
        rows = [(question.text, question.answer) for question in texts]
        for way, scores in _both_ways(loaded, rows).items():
            found = dict(
                about, way=way, accuracy=sum(s.greedy for s in scores) / len(scores), ratio=_ratio(scores, rows)
            )
            results.append(found)
            print(", ".join(f"{name} {v:.3g}" if isinstance(v, float) else f"{name} {v}" for name, v in found.items()))
    return results


def _tasks_of(loaded, args: argparse.Namespace) -> Any:
    """The harness's tasks; refuses what they cannot do before anything is scored."""
    from lm_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager(include_path=args.include_path)
    if unknown := [name for name in args.tasks if not manager.match_tasks([name])]:
        raise DMCError(f"the harness has no task {', '.join(unknown)}: `lm_eval ls tasks` lists them")
    if not loaded.dmc.merges and (generating := _generating(get_task_dict(args.tasks, manager))):
        raise DMCError(
            f"answers are generated from the compressed cache ({', '.join(generating)}), and this checkpoint was not "
            "trained with DMC: `megatron-dmc convert` it and run `lm_eval --model hf`, or leave such tasks out"
        )
    return manager


def _tasks(loaded, args: argparse.Namespace, manager: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from megatron_dmc.harness import HarnessModel

    model = HarnessModel(loaded, batch_size=args.batch_size, cache_gib=args.cache_gib, compress=loaded.dmc.merges)
    found = simple_evaluate(
        model=model, tasks=args.tasks, num_fewshot=args.num_fewshot, limit=args.limit, task_manager=manager
    )
    print(make_table(found))
    return found["results"]


def _generating(tasks: dict[Any, Any]) -> list[str]:
    """Names of the tasks, in groups or not, whose answers are generated."""
    found = []
    for name, task in tasks.items():
        if isinstance(task, dict):
            found += _generating(task)
        elif getattr(task, "OUTPUT_TYPE", None) == "generate_until":
            found.append(str(name))
    return sorted(set(found))


if __name__ == "__main__":
    main()
