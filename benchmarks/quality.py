"""What does compression cost? A model trained from nothing, retrofitted, and compared at the same size of the cache.

    python benchmarks/quality.py [--gpus 2] [--minutes 25] [--out benchmarks/results/quality.json]

The same line goes on where it was stopped; parts that are done are passed over.

Parts, in this order:
- `text`: source code and documentation of the installed packages (`quality_text.py`), and a tokenizer trained on it.
- `base`: a decoder with 111 M parameters and as many KV heads as query heads, 2,048 tokens of context.
- `runs`: from that base, each with the same tokens, learning rates and order of data, in three runs one after another
  as DMC has its stages: **dmc** at 2x, 4x and 8x; **distilled**, DMC with the base as its teacher (`--dmc-teacher`);
  **control**, the same three runs without DMC; **gqa**, up-trained from KV heads that are means of groups of the base's
  (Ainslie et al., 2023), as many as give the same cache.
- `measure`: every model exported to Hugging Face and read by transformers (`quality_measure.py`): held-out loss by
  position, recall, achieved ratio and bytes of the cache.
- `peers`: methods without training on the base and on the control, by kvpress, with the ratios that DMC achieved.

Training is `megatron-dmc train`, models travel by `megatron-dmc convert`. `--size tiny` tries all of it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_dmc.resume import TRACKER  # noqa: E402

PARTS = ("text", "base", "runs", "measure", "peers")
RATIOS = (2, 4, 8)
STAGES = {"zero-out": 2, "retrofit": 20, "finetune": 5}
"""Shares of a run's iterations."""
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
    questions: int
    characters: int | None
    backend: str


SIZES = {
    "full": Size(
        "--num-layers 8 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16",
        vocabulary=8192, sequence=2048, batch=32, micro=16, base=2700, run=810, windows=256, questions=100,
        characters=None, backend="--bf16 --transformer-impl transformer_engine --attention-backend fused",
    ),
    "tiny": Size(
        "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 8",
        vocabulary=512, sequence=256, batch=8, micro=8, base=60, run=27, windows=8, questions=4,
        characters=2_000_000, backend="--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion "
        "--dmc-init-val 0.1 --dmc-temp 0.5",  # so that a model merges at all that has hardly been trained
    ),
}  # fmt: skip
COMMON = """
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0
    --hidden-dropout 0 --init-method-std 0.02 --weight-decay 0.1 --clip-grad 1 --adam-beta1 0.9 --adam-beta2 0.95
    --tokenizer-type HuggingFaceTokenizer --make-vocab-size-divisible-by 128 --split 100,0,0 --num-workers 2
    --no-create-attention-mask-in-dataloader --no-gradient-accumulation-fusion --ckpt-format torch_dist
    --eval-interval 1000000 --eval-iters 0 --log-interval 20 --save-interval 500 --save-retain-interval 1000000
    """


@dataclass(frozen=True)
class Method:
    """One of `runs`: what is trained, from what, and with which flags."""

    kind: str
    ratio: int
    seed: int

    @property
    def name(self) -> str:
        ratio = f"-{self.ratio}x" if self.ratio > 1 else ""
        return f"{self.kind}{ratio}" + (f"-seed{self.seed}" if self.seed > 1 else "")


METHODS = (
    Method("control", 1, 1), *(Method("dmc", ratio, 1) for ratio in (4, 2, 8)),
    *(Method("distilled", ratio, 1) for ratio in (4, 2, 8)), *(Method("gqa", ratio, 1) for ratio in (4, 2, 8)),
    Method("control", 1, 2), Method("dmc", 4, 2), Method("distilled", 4, 2),
)  # fmt: skip
"""In the order in which they run."""


class Stopped(Exception):
    """The minutes are over."""


class Work:
    """The folder in which everything happens, and the time that is left."""

    def __init__(self, options: argparse.Namespace):
        self.folder, self.options, self.size = options.work, options, SIZES[options.size]
        self.end = time.monotonic() + 60 * options.minutes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | dict(
            PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            PYTHONWARNINGS="ignore", CUDA_DEVICE_MAX_CONNECTIONS="1", TOKENIZERS_PARALLELISM="true",
        )  # fmt: skip

    def call(self, *command, log: str, gpu: int | None = None, **environment: str) -> None:
        """Run a command, its output in `logs/`.

        Raises:
            RuntimeError: with the end of the output, if it fails.
        """
        path = self.folder / "logs" / f"{log}.log"
        path.parent.mkdir(exist_ok=True)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        print(f"[{self.left():5.1f} min left] {log}", flush=True)
        with open(path, "a") as file:
            file.write(f"$ {' '.join(map(str, command))}\n")
            file.flush()
            done = subprocess.run(
                list(map(str, command)), cwd=ROOT, env=self.environment | environment, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{log}: exit code {done.returncode}\n{path.read_text()[-3000:]}")

    def dmc(self, *arguments, log: str, gpu: int | None = None) -> None:
        self.call(sys.executable, "-m", "megatron_dmc", *arguments, log=log, gpu=gpu)

    def left(self) -> float:
        """Minutes."""
        return (self.end - time.monotonic()) / 60

    def reached(self, run: str) -> int:
        """The iteration of the last checkpoint of a run."""
        tracker = self.folder / run / TRACKER
        return int(tracker.read_text()) if tracker.exists() else 0

    def train(self, run: str, iterations: int, flags: list, begin: Path | None, seed: int, gpus: int, gpu: int | None):
        """Train until `iterations`, or until the minutes are over, going on from the run's own checkpoint.

        Raises:
            Stopped: where it is not at its end.
        """
        if self.reached(run) >= iterations:
            return
        if self.left() < 1:
            raise Stopped
        folder = self.folder / run
        load = ["--load", begin, "--finetune"] if begin is not None else []
        if (folder / TRACKER).exists():
            load = ["--load", folder]
        size = self.size
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", gpus] if gpus > 1 else []
        self.call(
            sys.executable, *launch, "-m", "megatron_dmc", "train", *size.model.split(), *COMMON.split(),
            *size.backend.split(), "--seq-length", size.sequence, "--max-position-embeddings", size.sequence,
            "--data-path", f"{self.folder}/train", "--data-cache-path", self.folder / "cache",
            "--tokenizer-model", self.folder / "tokenizer", "--micro-batch-size", min(size.micro, size.batch // gpus),
            "--global-batch-size", size.batch, "--train-iters", iterations, "--seed", seed, "--save", folder, *load,
            "--exit-duration-in-mins", max(1, int(self.left())), *flags, log=run.replace("/", "."), gpu=gpu,
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
    shutil.move(work.folder / "sample-tokenizer", work.folder / "tokenizer")
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", work.folder / "tokenizer"]
    for name in ("held-out", "train"):
        source = work.folder / "text" / f"{name}.jsonl"
        work.dmc("prepare-data", "--input", source, "--output", work.folder / name, *tokenizer, log="text")
        about[name]["tokens"] = json.loads((work.folder / f"{name}.json").read_text())["tokens"]
    (work.folder / "text.json").write_text(json.dumps(about, indent=1) + "\n")


def base(work: Work) -> None:
    rate = ["--lr", work.options.base_lr, "--min-lr", work.options.base_lr / 10, "--lr-decay-style", "cosine"]
    work.train("base", work.size.base, [*rate, "--lr-warmup-iters", 50], None, 1, work.options.gpus, None)


def stages(work: Work, method: Method) -> Iterator[tuple[str, int, list]]:
    """Name, iterations and flags of the three runs of a method."""
    lr, before, shares = work.options.lr, 0, sum(STAGES.values())
    for name, share in STAGES.items():
        iterations = work.size.run * share // shares
        last = name == "finetune"
        flags = ["--lr", lr, "--min-lr", lr / 20 if last else lr, "--lr-warmup-iters", min(50, iterations // 2)]
        flags += ["--lr-decay-style", "cosine"]
        if method.kind in ("dmc", "distilled"):
            flags += ["--dmc-stage", name, "--dmc-cr", method.ratio]
        if method.kind == "distilled":
            flags += ["--dmc-teacher", work.folder / "base", "--dmc-teacher-weight", work.options.teacher_weight]
        if method.kind == "gqa":
            heads = int(work.size.model.split("--num-attention-heads ")[1].split()[0])
            flags += ["--group-query-attention", "--num-query-groups", heads // method.ratio]
        yield name, iterations, flags
        before += iterations


def run(work: Work, method: Method, gpu: int | None) -> None:
    """Train a method, and export it."""
    exported = work.folder / "models" / method.name
    if (exported / "config.json").exists():
        return
    begin = work.folder / "base"
    if method.kind == "gqa":
        begin = work.folder / "pooled" / f"{method.ratio}x"
        if not (begin / TRACKER).exists():
            pooled = work.folder / "pooled" / f"{method.ratio}x-hf"
            pool(work.folder / "models" / "base", pooled, method.ratio)
            work.dmc("convert", pooled, begin, "--overwrite", log=f"{method.name}.pool")
    for number, (stage, iterations, flags) in enumerate(stages(work, method)):
        name = f"runs/{method.name}/{stage}"
        work.train(name, iterations, flags, begin, 10 * method.seed + number, 1, gpu)
        begin = work.folder / name
    export(work, begin, method.name)


def export(work: Work, checkpoint: Path, name: str) -> None:
    work.dmc("convert", checkpoint, work.folder / "models" / name, "--overwrite", log=f"{name}.export")


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
    """As many methods at once as there are GPUs."""
    if not (work.folder / "models/base/config.json").exists():
        export(work, work.folder / "base", "base")
    parallel([lambda gpu, method=method: run(work, method, gpu) for method in METHODS], work.options.gpus)


def parallel(tasks: list, gpus: int) -> None:
    """Run tasks, each with the number of a GPU of its own; what the first to fail raises, once all have ended."""
    free: SimpleQueue[int | None] = SimpleQueue()
    for gpu in range(gpus):
        free.put(gpu if gpus > 1 else None)

    def one(task) -> None:
        gpu = free.get()
        try:
            task(gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(gpus) as pool_of_threads:
        futures = [pool_of_threads.submit(one, task) for task in tasks]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error


def measured(work: Work, jobs: list[dict], part: str, **environment: str) -> None:
    """Have `quality_measure.py` work off the jobs that have no result yet."""
    jobs = [job for job in jobs if not (work.folder / "results" / f"{job['name']}.json").exists()]
    shares = [jobs[i :: work.options.gpus] for i in range(work.options.gpus)]

    def one(number: int, share: list[dict], gpu: int | None) -> None:
        path = work.folder / f"{part}-{number}-jobs.json"
        path.write_text(json.dumps(share))
        if work.left() < 0.5:
            raise Stopped
        work.call(
            sys.executable, MEASURE, "--work", work.folder, "--jobs", path, "--windows", work.size.windows,
            "--questions", work.size.questions, "--minutes", work.left(), log=f"{part}-{number}", gpu=gpu,
            **environment,
        )  # fmt: skip

    tasks = [lambda gpu, n=n, share=share: one(n, share, gpu) for n, share in enumerate(shares) if share]
    parallel(tasks, work.options.gpus)
    if any(not (work.folder / "results" / f"{job['name']}.json").exists() for job in jobs):
        raise Stopped


def measure(work: Work) -> None:
    names = ["base", *(method.name for method in METHODS)]
    measured(work, [dict(name=name, model=name, press=None, ratio=1.0) for name in names], "measure")


def peers(work: Work) -> None:
    """The presses of kvpress, keeping as many entries as DMC's models did."""
    jobs = []
    for model in ("control", "base"):
        for ratio in RATIOS:
            achieved = json.loads((work.folder / "results" / f"dmc-{ratio}x.json").read_text())["ratio"]
            for press in ("ObservedAttention", "TOVA", "SnapKV", "StreamingLLM", "Knorm"):
                name = f"{press}-{model}-{ratio}x"
                jobs.append(dict(name=name, model=model, press=press, ratio=achieved))
    extra = {}
    if work.options.peers_path is not None:
        path = [str(work.options.peers_path), work.environment["PYTHONPATH"]]
        extra["PYTHONPATH"] = os.pathsep.join(path)
    measured(work, jobs, "peers", **extra)


def collect(work: Work) -> dict:
    """The results of all parts, and how the runs went."""
    from benchmarks.common import circumstances

    size = work.size
    found = dict(
        circumstances(work.options.commit),
        model=size.model,
        parameters=None,
        vocabulary=size.vocabulary,
        base_tokens=size.base * size.batch * size.sequence,
        run_tokens=sum(n for _, n, _ in stages(work, METHODS[0])) * size.batch * size.sequence,
        lr=work.options.lr,
        teacher_weight=work.options.teacher_weight,
        text=json.loads((work.folder / "text.json").read_text()),
        results={path.stem: json.loads(path.read_text()) for path in sorted(work.folder.glob("results/*.json"))},
    )
    if "base" in found["results"]:
        reference = found["results"]["base"]
        found["parameters"] = reference["parameters"]
        for result in found["results"].values():  # of the bytes, so that GQA's fewer heads count
            result["ratio"] = total_bytes(reference) / total_bytes(result)
    return found


def total_bytes(result: dict) -> float:
    """Of the caches of all contexts."""
    return sum(result["cache_bytes_by_context"].values())


def table(found: dict) -> str:
    """Loss over the control's with the same seed, by method."""
    from benchmarks.common import table as markdown

    rows = []
    for name, result in found["results"].items():
        seed = "-seed2" if name.endswith("-seed2") else ""
        control = found["results"].get(f"control{seed}")
        row = dict(method=name, ratio=result["ratio"], MiB=result["cache_bytes"] / 2**20)
        if control is not None:
            row["continuation loss"] = f"{result['continuation_loss']:.4f}"
            row["over control"] = f"{100 * (result['continuation_loss'] / control['continuation_loss'] - 1):+.2f}%"
            if result.get("loss") is not None:
                row["window loss"] = f"{result['loss']:.4f}"
                row["over control "] = f"{100 * (result['loss'] / control['loss'] - 1):+.2f}%"
        row["recall"] = f"{100 * result['recall']:.1f}%"
        rows.append(row)
    columns = ["method", "ratio", "MiB", "window loss", "over control ", "continuation loss", "over control", "recall"]
    return markdown(rows, columns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="only these (default: all, in order)")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of all files (runs/quality)")
    parser.add_argument("--minutes", type=float, default=25, help="stop after so many; go on with the same line")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs: the base trains on all, each run on one")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--base-lr", type=float, default=1.5e-3)
    parser.add_argument("--lr", type=float, default=7e-4, help="of the runs from the base")
    parser.add_argument("--teacher-weight", type=float, default=0.5, help="of the runs `distilled` (0.5)")
    parser.add_argument("--peers-path", type=Path, help="folder of packages with kvpress and the transformers it needs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    parser.add_argument("--commit", help="to note where the checkout has no history")
    options = parser.parse_args()
    options.work = options.work.resolve()
    work = Work(options)
    status = 0
    try:
        with ExitStack() as stack:
            stack.callback(lambda: print(f"[{work.left():5.1f} min left]", flush=True))
            for part in options.parts or PARTS:
                mark = work.folder / f"{part}.done"
                if not mark.exists():
                    globals()[part](work)
                    mark.touch()
    except Stopped:
        print("the minutes are over; the same line goes on", flush=True)
        status = 75
    if (work.folder / "results").is_dir():
        from benchmarks.common import save

        found = collect(work)
        print(table(found))
        save(found, options.out)
    return status


if __name__ == "__main__":
    sys.exit(main())
