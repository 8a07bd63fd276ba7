"""What does compression cost? A model trained from nothing, retrofitted, and compared at the same size of the cache.

    pip install --target peers kvpress==0.5.5 transformers==5.2.0
    python benchmarks/quality.py --peers-path peers [--gpus 2] [--at-once 2] [--minutes 25]

The same line goes on where it was stopped. What is measured by then is in `benchmarks/results/quality.json`.

Parts, in this order:
- `text`: source code and documentation of the installed packages (`quality_text.py`), and a tokenizer trained on it.
- `base`: a decoder with 111 M parameters and as many KV heads as query heads, 2,048 tokens of context.
- `runs`: from that base, each with the same tokens, learning rates and order of data, in three runs one after another
  as DMC has its stages: **dmc** at 2x, 4x and 8x; **distilled**, DMC with the base as its teacher beside the text
  (`--dmc-teacher`; a third more computation), at 4x also with a quarter of the tokens; **control**, the same three
  runs without DMC; **gqa**, up-trained from KV heads that are means of groups of the base's (Ainslie et al., 2023), as
  many as give the same cache. Each is exported to Hugging Face and read by transformers (`quality_measure.py`):
  held-out loss by position, recall, achieved ratio and bytes of the cache. Learning rates are not tuned for any.
- `peers`: methods without training, on the control and on the base, by kvpress, in as many bytes as DMC's caches take
  on the same text: of held-out contexts, and of the recall test's.
- `reports`: what the models at 4x have learned, by `megatron-dmc report`.
- `ablations`: DMC at 4x, some at 8x, with one thing changed each (`CHANGES`); other tokens, learning rates and stages
  against a control that has them, too. They reach ratios of their own, which the results say.

`ratio` in the results is the base's cache in bytes over a method's, with all that it keeps: for DMC also what it holds
of open segments, which counts in contexts as short as these. `cost_at` is what each trained method costs at exactly 2x,
4x and 8x of that, between its own points, where they reach as far. Every run is compared with the control of its seed,
`distilled` as well, which has seen the base's logits beside the text; `distilled-4x-1of4` with one of four times its
tokens. Errors are over windows, not over seeds. Presses keep equally many entries in all heads; budgets by head
(`AdaKVPress`) are left out, as kvpress masks what they evict and keeps it. Texts like the recall test's are 2% of the
training text, of the base and all runs alike; DMC learns from them which tokens are asked for, and methods without
training cannot.

`training_curves` follows what a method costs while it trains, stage by stage, on the batches of its control.

Training is `megatron-dmc train`, models travel by `megatron-dmc convert`. `--size tiny` tries all of it on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_dmc.resume import TRACKER  # noqa: E402

PARTS = ("text", "base", "runs", "peers", "reports", "ablations")
RATIOS = (2, 4, 8)
PRESSES = ("ObservedAttention", "TOVA", "SnapKV", "StreamingLLM", "Knorm", "ExpectedAttention", "KeyDiff")
STAGES = {"zero-out": 2, "retrofit": 15, "finetune": 10}
"""Shares of a run's iterations."""
WARMUP = 50
"""Iterations in which a learning rate rises."""
LOG_INTERVAL = 20
CURVE = 200
"""Iterations in a row of `training_curves`."""
MEASURE = ROOT / "benchmarks" / "quality_measure.py"


@dataclass(frozen=True)
class Size:
    """A model and how long it trains; `batch` sequences in an iteration, `micro` at once on a GPU."""

    model: str
    vocabulary: int
    sequence: int
    batch: int
    micro: int
    base: int
    run: int
    windows: int
    contexts: int
    characters: int | None
    backend: str


SIZES = {
    "full": Size(
        "--num-layers 8 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16",
        vocabulary=8192, sequence=2048, batch=32, micro=16, base=2700, run=810, windows=256, contexts=60,
        characters=None, backend="--bf16 --transformer-impl transformer_engine --attention-backend fused",
    ),
    "tiny": Size(
        "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 8",
        vocabulary=512, sequence=256, batch=8, micro=8, base=60, run=27, windows=8, contexts=4,
        characters=2_000_000, backend="--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion "
        "--dmc-init-val 0.1 --dmc-temp 0.5",  # so that a model merges at all that has hardly been trained
    ),
}  # fmt: skip
COMMON = f"""
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0
    --hidden-dropout 0 --init-method-std 0.02 --weight-decay 0.1 --clip-grad 1 --adam-beta1 0.9 --adam-beta2 0.95
    --tokenizer-type HuggingFaceTokenizer --make-vocab-size-divisible-by 128 --split 100,0,0 --num-workers 2
    --no-create-attention-mask-in-dataloader --no-gradient-accumulation-fusion --ckpt-format torch_dist
    --eval-interval 1000000 --eval-iters 0 --log-interval {LOG_INTERVAL} --save-interval 500
    --save-retain-interval 1000000
    """


@dataclass(frozen=True)
class Change:
    """What an ablation changes: flags, a factor of the learning rate or of the tokens, the stages' shares."""

    flags: tuple[str, ...] = ()
    lr: float = 1
    tokens: float = 1
    stages: dict[str, int] = field(default_factory=lambda: STAGES)


def decisions(scale: float, temperature: float = 0.3) -> tuple[str, ...]:
    """Flags with which decisions learn 1/scale times as fast as published; the temperature is in units of the scale."""
    values = {"init-val": 5 * scale, "temp": temperature * scale, "noise-scale": scale}
    return tuple(part for name, value in values.items() for part in (f"--dmc-{name}", f"{value:g}"))


PUBLISHED_DECISIONS = ("--dmc-no-zero-decisions", *decisions(1, 0.1))
CHANGES = {
    "as-published": Change(
        (*PUBLISHED_DECISIONS, "--dmc-no-moving-offset", "--dmc-hard-steps", "0", "--dmc-no-hard-finetune")
    ),
    "published-decisions": Change(PUBLISHED_DECISIONS),
    "seeded-decisions": Change(("--dmc-no-zero-decisions", *decisions(1))),
    "decisions-at-rate-1": Change(decisions(1)),
    "decisions-at-rate-4": Change(decisions(1 / 4)),
    "published-loss": Change(("--dmc-no-moving-offset",)),
    "soft-retrofit": Change(("--dmc-hard-steps", "0")),
    "soft-finetune": Change(("--dmc-no-hard-finetune",)),
    "a-quarter-of-the-tokens": Change(tokens=0.25),
    "longer-finetune": Change(stages={"zero-out": 2, "retrofit": 10, "finetune": 15}),
    "window-24": Change(("--dmc-window-size", "24")),
    "window-64": Change(("--dmc-window-size", "64")),
    "no-window": Change(("--dmc-window-size", "0")),
    "half-the-lr": Change(lr=0.5),
    "temperature-0.05": Change(("--dmc-temp", "0.05")),
    "temperature-0.5": Change(("--dmc-temp", "0.5")),
    "window-4": Change(("--dmc-window-size", "4")),
    "shorter-finetune": Change(stages={"zero-out": 2, "retrofit": 20, "finetune": 5}),
    "longest-finetune": Change(stages={"zero-out": 2, "retrofit": 6, "finetune": 19}),
    "twice-the-lr": Change(lr=2),
    "twice-the-tokens": Change(tokens=2),
}


@dataclass(frozen=True)
class Method:
    """One of `runs`: what is trained, from what, and with which flags."""

    kind: str
    ratio: int
    seed: int = 1
    divisor: int = 1
    """Of the tokens that a run has."""
    changed: str = ""
    """One of `CHANGES`."""

    @property
    def name(self) -> str:
        ratio = f"-{self.ratio}x" if self.ratio > 1 else ""
        part = f"-1of{self.divisor}" if self.divisor > 1 else ""
        seed = f"-seed{self.seed}" if self.seed > 1 else ""
        return f"{self.kind}{ratio}{part}{seed}" + f"-{self.changed}" * bool(self.changed)

    @property
    def change(self) -> Change:
        return CHANGES.get(self.changed, Change())


METHODS = (
    Method("control", 1), Method("dmc", 4), Method("dmc", 2), Method("dmc", 8), Method("distilled", 4),
    Method("control", 1, seed=2), Method("dmc", 4, seed=2), Method("gqa", 4), Method("gqa", 2), Method("distilled", 8),
    Method("gqa", 8), Method("distilled", 2), Method("distilled", 4, divisor=4),
)  # fmt: skip
"""In the order in which they begin, unless --only has another."""
REPORTED = tuple(method for method in METHODS if method.name in ("dmc-4x", "distilled-4x"))
CONTROLLED = tuple(name for name, change in CHANGES.items() if replace(change, flags=()) != Change())
"""Changes of learning rates, tokens or stages: what has one is compared with a control that has it, too."""
AT_8X = ("published-decisions", "longer-finetune", "window-24", "window-64", "no-window")
"""Changes that are tried at 8x, too."""
ABLATIONS = tuple(
    Method(kind, ratio, changed=name)
    for name in CHANGES
    for kind, ratio in (("control", 1), ("dmc", 4), ("dmc", 8))
    if (kind, ratio) == ("dmc", 4) or name in (CONTROLLED if kind == "control" else AT_8X)
)
NAMES = tuple(method.name for method in METHODS + ABLATIONS)


class Stopped(Exception):
    """The minutes are over."""


class Work:
    """The folder in which everything happens, and the time that is left."""

    def __init__(self, options: argparse.Namespace):
        self.folder, self.options, self.size = options.work, options, SIZES[options.size]
        if options.iterations is not None:
            self.size = replace(self.size, run=options.iterations)
        if options.base_iterations is not None:
            self.size = replace(self.size, base=options.base_iterations)
        self.end, self.begun = time.monotonic() + 60 * options.minutes, str(time.time())
        self.folder.mkdir(parents=True, exist_ok=True)
        self.failures: list[str] = []
        self.publishing = Lock()
        self.children: set[subprocess.Popen] = set()
        self._keep_settings()
        # Every run is a launch of its own, whatever launched this.
        launch = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(launch)}
        self.visible = kept.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(options.gpus)))).split(",")
        self.slots = range(options.gpus * options.at_once)
        self.environment = kept | dict(
            PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            PYTHONWARNINGS="ignore", CUDA_DEVICE_MAX_CONNECTIONS="1", TOKENIZERS_PARALLELISM="true",
        )  # fmt: skip

    def _keep_settings(self) -> None:
        """What a folder was begun with, it goes on with: its results stand for these."""
        from benchmarks.common import circumstances

        names = ("size", "base_lr", "lr", "teacher_weight")
        path, given = self.folder / "settings.json", {name: getattr(self.options, name) for name in names}
        given |= dict(iterations=self.size.run, base_iterations=self.size.base)
        given["commit"] = circumstances(self.options.commit)["commit"]
        if not path.exists():
            path.write_text(json.dumps(given) + "\n")
        elif (begun := json.loads(path.read_text())) != given:
            sys.exit(f"{self.folder} was begun with {begun}; got {given}: give the same, or another --work")

    def call(self, *command, log: str, slot: int | None = None, **environment: str) -> None:
        """Run a command, its output in `logs/`; given one of `slots`, on its GPU.

        Raises:
            RuntimeError: with the end of the output, if it fails.
        """
        path = self.folder / "logs" / f"{log}.log"
        path.parent.mkdir(exist_ok=True)
        if slot is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.visible[slot % self.options.gpus]
        print(f"[{self.left():5.1f} min left] {log}", flush=True)
        with open(path, "a") as file:
            file.write(f"$ {' '.join(map(str, command))}\n")
            file.flush()
            with subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=self.environment | environment, stdout=file,
                stderr=subprocess.STDOUT,
            ) as child:  # fmt: skip
                self.children.add(child)
                code = child.wait()
                self.children.discard(child)
        if code:
            raise RuntimeError(f"{log}: exit code {code}\n{path.read_text()[-3000:]}")

    def dmc(self, *arguments, log: str, slot: int | None = None) -> None:
        self.call(sys.executable, "-m", "megatron_dmc", *arguments, log=log, slot=slot)

    def wanted(self, methods: tuple[Method, ...]) -> list[Method]:
        """Those of the methods that `--only` names, in its order, or all."""
        by_name = {method.name: method for method in methods}
        return [by_name[name] for name in dict.fromkeys(self.options.only or by_name) if name in by_name]

    def calls(self) -> list[dict]:
        """What this folder was made by: of each call its parts, what it was asked for, and the minutes it has taken."""
        path = self.folder / "calls.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        asked = {name: getattr(self.options, name) for name in ("parts", "only", "gpus", "at_once", "reserve")}
        kept[self.begun] = asked | dict(minutes=round(self.options.minutes - self.left(), 1))
        path.write_text(json.dumps(kept) + "\n")
        return list(kept.values())

    def left(self) -> float:
        """Minutes."""
        return (self.end - time.monotonic()) / 60

    def reached(self, run: str) -> int:
        """The iteration of the last checkpoint of a run."""
        tracker = self.folder / run / TRACKER
        return int(tracker.read_text()) if tracker.exists() else 0

    def train(self, run: str, iterations: int, flags: list, begin: Path | None, seed: int, slot: int | None):
        """Train until `iterations`, or until the minutes are over, going on from the run's own checkpoint.

        Without a slot, on all GPUs.

        Raises:
            Stopped: where it is not at its end.
        """
        if self.reached(run) >= iterations:
            return
        minutes = self.left() - self.options.reserve
        if minutes < 2:  # most of one is start-up
            raise Stopped
        folder = self.folder / run
        load = ["--load", begin, "--finetune"] if begin is not None else []
        if (folder / TRACKER).exists():
            load = ["--load", folder]
        size, gpus = self.size, self.options.gpus if slot is None else 1
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", gpus] if gpus > 1 else []
        self.call(
            sys.executable, *launch, "-m", "megatron_dmc", "train", *size.model.split(), *COMMON.split(),
            *size.backend.split(), "--seq-length", size.sequence, "--max-position-embeddings", size.sequence,
            "--data-path", f"{self.folder}/train", "--data-cache-path", self.folder / f"cache-{slot}",
            "--tokenizer-model", self.folder / "tokenizer", "--micro-batch-size", min(size.micro, size.batch // gpus),
            "--global-batch-size", size.batch, "--train-iters", iterations, "--seed", seed, "--save", folder, *load,
            "--exit-duration-in-mins", int(minutes), *flags, log=run.replace("/", "."), slot=slot,
        )  # fmt: skip
        if self.reached(run) < iterations:
            raise Stopped


def text(work: Work) -> None:
    """The data set `train`, the file `held-out.json` of windows of tokens, and `tokenizer`."""
    from benchmarks import quality_text

    about = quality_text.write(work.folder / "text", work.size.characters)
    work.dmc(
        "prepare-data", "--input", work.folder / "text/sample.jsonl", "--output", work.folder / "sample",
        "--train-tokenizer", work.size.vocabulary, log="text",
    )  # fmt: skip
    shutil.rmtree(work.folder / "tokenizer", ignore_errors=True)
    shutil.move(work.folder / "sample-tokenizer", work.folder / "tokenizer")
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", work.folder / "tokenizer"]
    for name in ("held-out", "train"):
        source = work.folder / "text" / f"{name}.jsonl"
        work.dmc("prepare-data", "--input", source, "--output", work.folder / name, *tokenizer, log="text")
        about[name]["tokens"] = json.loads((work.folder / f"{name}.json").read_text())["tokens"]
        with open(work.folder / f"{name}.bin", "rb") as file:
            about[name]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    (work.folder / "text.json").write_text(json.dumps(about, indent=1) + "\n")


def base(work: Work) -> None:
    rate = ["--lr", work.options.base_lr, "--min-lr", work.options.base_lr / 10, "--lr-decay-style", "cosine"]
    work.train("base", work.size.base, [*rate, "--lr-warmup-iters", WARMUP], None, 1, None)


def stages(work: Work, method: Method) -> Iterator[tuple[str, int, list]]:
    """Name, iterations and flags of the three runs of a method."""
    change = method.change
    lr, shares = work.options.lr * change.lr, sum(change.stages.values())
    for name, share in change.stages.items():
        iterations = max(2, int(work.size.run * change.tokens) * share // shares // method.divisor)
        last = name == "finetune"
        flags = ["--lr", lr, "--min-lr", lr / 20 if last else lr, "--lr-warmup-iters", min(WARMUP, iterations // 2)]
        flags += ["--lr-decay-style", "cosine"]
        if method.kind in ("dmc", "distilled"):
            flags += ["--dmc-stage", name, "--dmc-cr", method.ratio, *change.flags]
        if method.kind == "distilled":
            flags += ["--dmc-teacher", work.folder / "base", "--dmc-teacher-weight", work.options.teacher_weight]
        if method.kind == "gqa":
            heads = int(work.size.model.split("--num-attention-heads ")[1].split()[0])
            flags += ["--group-query-attention", "--num-query-groups", heads // method.ratio]
        yield name, iterations, flags


def run(work: Work, method: Method, slot: int) -> None:
    """Train a method, export it and measure it."""
    if not (work.folder / "models" / method.name / "config.json").exists():
        begin = work.folder / "base"
        if method.kind == "gqa":
            begin = work.folder / "pooled" / f"{method.ratio}x"
            if not (begin / TRACKER).exists():
                pooled = work.folder / "pooled" / f"{method.ratio}x-hf"
                pool(work.folder / "models" / "base", pooled, method.ratio)
                work.dmc("convert", pooled, begin, "--overwrite", log=f"{method.name}.pool")
        for number, (stage, iterations, flags) in enumerate(stages(work, method)):
            name = f"runs/{method.name}/{stage}"
            work.train(name, iterations, flags, begin, 10 * method.seed + number, slot)
            begin = work.folder / name
        export(work, begin, method.name, slot)
    for stage in STAGES:  # with their optimizers' states they would fill a disk
        if stage != "finetune" or method not in REPORTED:
            shutil.rmtree(work.folder / "runs" / method.name / stage, ignore_errors=True)
    measured(work, [dict(name=method.name, model=method.name, press=None, budgets=None)], method.name, slot)


def export(work: Work, checkpoint: Path, name: str, slot: int | None = None) -> None:
    work.dmc("convert", checkpoint, work.folder / "models" / name, "--overwrite", log=f"{name}.export", slot=slot)


def pool(source: Path, target: Path, ratio: int) -> None:
    """A copy of a Hugging Face model, the keys' and values' projections averaged over groups of `ratio` heads."""
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text())
    heads = config["num_key_value_heads"]
    shutil.copytree(source, target, dirs_exist_ok=True)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                grouped = tensor.float().unflatten(0, (heads // ratio, ratio, -1)).mean(1)
                tensors[name] = grouped.flatten(0, 1).to(tensor.dtype).contiguous()
        save_file(tensors, path, {"format": "pt"})
    config["num_key_value_heads"] = heads // ratio
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def runs(work: Work) -> None:
    """As many methods at once as there are slots; of `--only` ablations, too, so that no slot waits for a part."""
    if not (work.folder / "models/base/config.json").exists():
        export(work, work.folder / "base", "base")
    base_alone = [dict(name="base", model="base", press=None, budgets=None)]
    tasks = [lambda slot: measured(work, base_alone, "base", slot)]
    methods = work.wanted(METHODS + ABLATIONS if work.options.only else METHODS)
    parallel(work, tasks + [lambda slot, method=method: run(work, method, slot) for method in methods])


def ablations(work: Work) -> None:
    parallel(work, [lambda slot, method=method: run(work, method, slot) for method in work.wanted(ABLATIONS)])


def parallel(work: Work, tasks: list) -> None:
    """Run tasks, each with a slot of its own. One that fails is noted, and does not stop the others.

    Raises:
        Stopped: where one was.
    """
    free: SimpleQueue[int] = SimpleQueue()
    for slot in work.slots:
        free.put(slot)

    def one(task) -> None:
        slot = free.get()
        try:
            task(slot)
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(work.slots)) as threads:
        futures = [threads.submit(one, task) for task in tasks]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, Stopped):
            work.failures.append(f"{type(error).__name__}: {error}")
            print(work.failures[-1], flush=True)
    if any(isinstance(error, Stopped) for error in errors):
        raise Stopped


def measured(work: Work, jobs: list[dict], name: str, slot: int, **environment: str) -> None:
    """Have `quality_measure.py` work off the jobs that have no result yet."""

    def left() -> list[dict]:
        return [job for job in jobs if not (work.folder / "results" / f"{job['name']}.json").exists()]

    if not left():
        return
    if work.left() < 1.5:
        raise Stopped
    commit = ["--commit", work.options.commit] if work.options.commit else []
    path = work.folder / "jobs" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(left()))
    try:
        work.call(
            sys.executable, MEASURE, "--work", work.folder, "--jobs", path, "--windows", work.size.windows,
            "--contexts", work.size.contexts, "--minutes", work.left() - 1, *commit, log=f"{name}.measure", slot=slot,
            **environment,
        )  # fmt: skip
    finally:
        publish(work)
    if left():
        raise Stopped


def peers(work: Work) -> None:
    """The presses of kvpress in as many bytes as DMC's caches take, by context; and none, as they are run."""
    budgets = {}
    for ratio in RATIOS:
        path = work.folder / "results" / f"dmc-{ratio}x.json"
        if path.exists():
            result = json.loads(path.read_text())
            budgets[ratio] = dict(text=result["cache_bytes_by_context"], recall=result["recall_cache_bytes"])
    jobs = []
    models = [name for name in ("control", "base") if (work.folder / "models" / name / "config.json").exists()]
    for model in models:
        jobs.append(dict(name=f"none-{model}", model=model, press="none", budgets=None))
        for ratio, budget in budgets.items():
            for press in PRESSES:
                jobs.append(dict(name=f"{press}-{model}-{ratio}x", model=model, press=press, budgets=budget))
    extra = {}
    if work.options.peers_path is not None:
        path = [str(work.options.peers_path), work.environment["PYTHONPATH"]]
        extra["PYTHONPATH"] = os.pathsep.join(path)
    shares = [share for i in work.slots if (share := jobs[i :: len(work.slots)])]
    parallel(work, [lambda slot, n=n, share=share: measured(work, share, f"peers-{n}", slot, **extra)
                    for n, share in enumerate(shares)])  # fmt: skip
    if len(budgets) < len(RATIOS) or len(models) < 2:
        raise Stopped


def reports(work: Work) -> None:
    """Into `reports/`, for the models at 4x."""

    def one(name: str, slot: int) -> None:
        done = work.folder / "reports" / name
        if (done / "report.json").exists():
            return
        # Exported once it is at its end; a run that was stopped has a checkpoint as well.
        if not (work.folder / "models" / name / "config.json").exists() or work.left() < 1:
            raise Stopped
        work.dmc(
            "report", work.folder / "runs" / name / "finetune", "--data-path", work.folder / "held-out",
            "--max-tokens", 25 * work.size.sequence, "--output", done, log=f"{name}.report", slot=slot,
        )  # fmt: skip

    parallel(work, [lambda slot, name=method.name: one(name, slot) for method in work.wanted(REPORTED)])


def collect(work: Work) -> dict:
    """The results of all parts, and how the runs went."""
    from importlib.metadata import distributions

    from benchmarks.common import circumstances

    size = work.size
    found = dict(
        circumstances(work.options.commit),
        model=size.model,
        parameters=None,
        vocabulary=size.vocabulary,
        base_tokens=size.base * size.batch * size.sequence,
        run_tokens=sum(n for _, n, _ in stages(work, METHODS[0])) * size.batch * size.sequence,
        windows=size.windows,
        recall_contexts=size.contexts,
        base_lr=work.options.base_lr,
        lr=work.options.lr,
        teacher_weight=work.options.teacher_weight,
        peers={
            found.name: found.version
            for found in distributions(path=[str(work.options.peers_path)])
            if found.name in ("kvpress", "transformers", "torch")
        }
        if work.options.peers_path
        else {},
        text=json.loads((work.folder / "text.json").read_text()),
        results={path.stem: json.loads(path.read_text()) for path in sorted(work.folder.glob("results/*.json"))},
    )
    if (reference := found["results"].get("base")) is not None:
        found["parameters"] = reference["parameters"]
        for result in found["results"].values():
            result["ratio"] = total_bytes(reference) / total_bytes(result)
        found["cost_at"] = {
            kind: {ratio: cost for ratio in RATIOS if (cost := cost_at(found, kind, ratio)) is not None}
            for kind in ("dmc", "distilled", "gqa")
        }
    found["training_curves"] = training_curves(work)
    if work.failures:
        found["failures"] = work.failures
    found["calls"] = work.calls()
    return found


def training_curves(work: Work) -> dict[str, list]:
    """By how much a method's loss is above its control's while they train, as shares of it.

    Both read the same batches in the same order, so this has little noise, and it tells when a cost arises.

    Returns:
        Of each method rows of a stage, the last of up to `CURVE` iterations, the cost in them, and DMC's mean ratio.
    """
    curves = {}
    for method in METHODS + ABLATIONS:
        if method.kind == "control" or method.divisor > 1:  # its tokens are fewer than a control's
            continue
        changed = method.changed if method.changed in CONTROLLED else ""
        control = replace(method, kind="control", ratio=1, changed=changed)
        rows = []
        for stage in STAGES:
            ours, theirs = (logged(work.folder / "logs" / f"runs.{one.name}.{stage}.log") for one in (method, control))
            both = sorted(ours.keys() & theirs.keys() - {1})  # the first alone, others as means since the last
            for start in range(0, len(both), CURVE // LOG_INTERVAL):
                part = both[start : start + CURVE // LOG_INTERVAL]
                cost = sum(ours[i][0] for i in part) / sum(theirs[i][0] for i in part) - 1
                ratios = [ours[i][1] for i in part if ours[i][1] is not None]
                rows.append([stage, part[-1], cost, sum(ratios) / len(ratios) if ratios else None])
        if rows:
            curves[method.name] = rows
    return curves


def logged(path: Path) -> dict[int, tuple[float, float | None]]:
    """Loss and compression ratio by iteration, of a log of Megatron's."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if match := re.search(r" iteration +(\d+)/.* lm loss: (\S+)", line):
            ratio = re.search(r"\| compression ratio: (\S+)", line)
            found[int(match[1])] = float(match[2]), float(ratio[1]) if ratio else None
    return found


def publish(work: Work) -> dict | None:
    """Write what is measured by now to `--out`."""
    from benchmarks.common import save

    if not any(work.folder.glob("results/*.json")):
        return None
    with work.publishing:
        found = collect(work)
        save(found, work.options.out)
    return found


def total_bytes(result: dict) -> float:
    """Of the caches of all contexts."""
    return sum(result["cache_bytes_by_context"].values())


def control_of(found: dict, name: str) -> dict | None:
    result = found["results"][name]
    if result["press"]:
        return found["results"].get(f"none-{result['model']}")
    other = next((end for end in ("seed2", *CONTROLLED) if name.endswith(f"-{end}")), None)
    return found["results"].get(f"control-{other}" if other else "control")


def over(found: dict, name: str, loss: str) -> float | None:
    """By how much a method's loss is above its control's (`control_of`), as a share of it.

    A method of kvpress is compared with the model that it compresses, as it is run: in another version of transformers.
    """
    result, control = found["results"][name], control_of(found, name)
    if control is None or loss not in result or loss not in control:
        return None
    return result[loss] / control[loss] - 1


def error_of(found: dict, name: str, loss: str) -> float | None:
    """Standard error of `over`, a ratio of means over windows that both have read (by the delta method)."""
    if over(found, name, loss) is None:
        return None
    ours, theirs = (np.array(one[f"{loss}_by_window"]) for one in (found["results"][name], control_of(found, name)))
    return float((ours / theirs.mean() - ours.mean() / theirs.mean() ** 2 * theirs).std(ddof=1) / len(ours) ** 0.5)


def cost_at(found: dict, kind: str, ratio: float) -> float | None:
    """`over` of continuations at a ratio between two measured points of a kind, linear in the ratio's logarithm."""
    points = []
    for name in (f"{kind}-{asked}x" for asked in RATIOS):
        if name in found["results"] and (cost := over(found, name, "continuation_loss")) is not None:
            points.append((found["results"][name]["ratio"], cost))
    if not points:
        return None
    ratios, costs = zip(*sorted(points), strict=True)
    if not ratios[0] * (1 - 1e-9) <= ratio <= ratios[-1] * (1 + 1e-9):
        return None
    return float(np.interp(np.log(ratio), np.log(ratios), costs))


def table(found: dict) -> str:
    """What every method costs."""
    from benchmarks.common import table as markdown

    rows = []
    for name, result in found["results"].items():
        row = dict(
            method=name, compression=result.get("ratio"), recall=f"{100 * result['recall']:.1f}%",
            MiB=result["cache_bytes"] / 2**20, **{"tokens per entry": result["tokens_per_entry"]},
        )  # fmt: skip
        for loss, title in (("loss", "windows"), ("continuation_loss", "continuations")):
            if loss in result:
                row[title] = f"{result[loss]:.4f}"
            if (cost := over(found, name, loss)) is not None:
                row[title] += f" ({100 * cost:+.2f} ± {100 * error_of(found, name, loss):.2f}%)"
        rows.append(row)
    return markdown(rows, ["method", "compression", "tokens per entry", "MiB", "windows", "continuations", "recall"])


def end(work: Work) -> None:
    """End this process and what it has started: a training that went on would write where the next one does."""
    for child in list(work.children):
        child.terminate()
    os._exit(143)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="only these (default: all, in order)")
    parser.add_argument("--work", type=Path, help="folder of all files (default: runs/quality-SIZE)")
    parser.add_argument("--minutes", type=float, default=25, help="stop after so many; go on with the same line")
    parser.add_argument("--reserve", type=float, default=0, help="minutes of these that training leaves to the rest")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs: the base trains on all, each run on one")
    parser.add_argument(
        "--at-once", type=int, default=2, help="runs on a GPU: while one starts or is exported, others train (2)"
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--iterations", type=int, help="of each run, its three stages together (full: 810, tiny: 27)")
    parser.add_argument("--base-iterations", type=int, help="of the base (full: 2700, tiny: 60)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="METHOD",
        choices=NAMES,
        help="of runs and ablations, begun in the order given as one part; peers then only as a part named. "
        + ", ".join(NAMES),
    )
    parser.add_argument("--base-lr", type=float, default=1.5e-3)
    parser.add_argument("--lr", type=float, default=7e-4, help="of the runs from the base")
    parser.add_argument("--teacher-weight", type=float, default=0.5, help="of the runs `distilled` (0.5)")
    parser.add_argument(
        "--peers-path",
        type=Path,
        help="where `pip install --target PATH kvpress==0.5.5 transformers==5.2.0` put them",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="(default: benchmarks/results/quality.json; tiny, and with other iterations or --only: in the folder)",
    )
    parser.add_argument("--commit", help="to note where the checkout has no history")
    options = parser.parse_args()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and len(visible.split(",")) < options.gpus:
        parser.error(f"--gpus {options.gpus}: CUDA_VISIBLE_DEVICES shows {visible!r}")
    size = SIZES[options.size]
    if size.batch % (options.gpus * min(size.micro, max(1, size.batch // options.gpus))):
        parser.error(f"--gpus {options.gpus}: the base's batch of {size.batch} sequences does not divide among them")
    shares = sum(STAGES.values())
    if options.iterations is not None and options.iterations < shares:
        parser.error(f"--iterations {options.iterations}: a run's stages share {shares} parts; give as many at least")
    if options.base_iterations is not None and options.base_iterations <= WARMUP:
        parser.error(f"--base-iterations {options.base_iterations}: its rate rises for {WARMUP}; give more")
    parts = options.parts or tuple(part for part in PARTS if part != "peers" or not options.only)
    if "peers" in parts and options.peers_path is None and find_spec("kvpress") is None:
        parser.error("the part peers needs kvpress: install it as --help says for --peers-path, or name other parts")
    options.work = (options.work or Path(f"runs/quality-{options.size}")).resolve()
    usual = options.size == "full" and not (options.iterations or options.base_iterations or options.only)
    options.out = options.out or (ROOT / "benchmarks" / "results" if usual else options.work) / "quality.json"
    work = Work(options)
    signal.signal(signal.SIGTERM, lambda *_: end(work))
    stopped = False
    for part in parts:
        mark = work.folder / f"{part}.done"
        if mark.exists():
            continue
        try:
            globals()[part](work)
            if not work.failures and (not options.only or part in ("text", "base")):
                mark.touch()
        except Stopped:
            stopped = True
            if part in ("text", "base"):  # nothing else can be without
                break
    work.calls()  # text and base have no results that would tell of them
    print(f"[{work.left():5.1f} min left]{' stopped; the same line goes on' * stopped}", flush=True)
    if (found := publish(work)) is not None:
        print(table(found), found.get("cost_at"), sep="\n")
    return 1 if work.failures else 75 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
