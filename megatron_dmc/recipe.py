"""Recipes: a retrofit in one YAML file, and the commands that carry it out (`megatron-dmc plan`, `megatron-dmc run`).

A recipe has these parts; flags are Megatron's and `--dmc-…`, without their dashes:

    compression: 4                     # the target ratio, unless --compression gives another
    checkpoints: {original: FOLDER, output: FOLDER}
    model: {FLAG: VALUE, …}            # model, data and training are passed on alike; the names are for the reader
    data: {…}
    training: {…}
    layouts: {GPUS: {FLAG: VALUE, …}}  # from that number of GPUs on
    stages: {zero-out: {…}, retrofit: {…}, finetune: {…}}

`true` stands for a flag without a value, `false` for no flag, a list for several values. A value of a stage may be a
mapping from the compression ratio.
"""

from __future__ import annotations

import argparse
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_dmc import resume
from megatron_dmc.config import STAGES, DMCError

PARTS = ("compression", "checkpoints", "model", "data", "training", "layouts", "stages")
OWN_FLAGS = {
    "load": "--checkpoint",
    "save": "--output",
    "pretrained-checkpoint": "--checkpoint",
    "finetune": "--stage",
    "dmc-stage": "--stage",
    "dmc-cr": "--compression",
}
"""Flags that follow from the recipe's other parts, and the option that changes each."""

ENDPOINT = "$RDZV_ENDPOINT"
"""Where nodes meet, in a printed command, unless it was given: a variable that the shell puts in."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says; `name` is the file's."""

    name: str
    compression: float
    original: str
    output: str
    settings: dict[str, Any]
    layouts: dict[int, dict[str, Any]]
    stages: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """From a YAML file.

        Raises:
            DMCError: where the file cannot be read or a part is missing, unknown or of the wrong kind.
        """
        path = Path(path)
        try:
            parts = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DMCError(f"cannot read the recipe {path}: {error}") from error
        if not isinstance(parts, dict) or set(parts) != set(PARTS):
            found = ", ".join(map(str, parts)) if isinstance(parts, dict) else f"a {type(parts).__name__}"
            raise DMCError(f"{path} must have the parts {', '.join(PARTS)}; it has {found}")
        for part in PARTS[1:]:
            if not isinstance(parts[part], dict):
                raise DMCError(f"{path}: {part} must hold `key: value` lines; got {parts[part]!r}")
        for part, keys in (("checkpoints", ("original", "output")), ("stages", STAGES)):
            if set(parts[part]) != set(keys):
                raise DMCError(f"{path}: {part} must be {', '.join(keys)}; got {', '.join(map(str, parts[part]))}")
        layouts = parts["layouts"]
        if not layouts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in layouts):
            raise DMCError(f"{path}: the keys of layouts must be numbers of GPUs; got {', '.join(map(str, layouts))}")
        for part, groups in (("layouts", layouts), ("stages", parts["stages"])):
            for key, flags in groups.items():
                if not isinstance(flags, dict):
                    raise DMCError(f"{path}: {part}: {key} must hold `flag: value` lines; got {flags!r}")
        settings: dict[str, Any] = {}
        for part in ("model", "data", "training"):
            if twice := sorted(settings.keys() & parts[part].keys()):
                raise DMCError(f"{path}: {', '.join(twice)} stands in more than one of model, data and training")
            settings |= parts[part]
        for flags in (settings, *layouts.values(), *parts["stages"].values()):
            _check_flags(flags, str(path))
        return cls(
            path.stem,
            parts["compression"],
            str(parts["checkpoints"]["original"]),
            str(parts["checkpoints"]["output"]),
            settings,
            dict(sorted(layouts.items())),
            parts["stages"],
        )


def _check_flags(flags: dict[str, Any], where: str) -> None:
    for flag, value in flags.items():
        if value is None:
            raise DMCError(f"{where} gives {flag} no value: true stands for a flag without one, false for no flag")
        if flag in OWN_FLAGS:
            raise DMCError(f"{where} sets {flag}, which follows from the recipe: change it with {OWN_FLAGS[flag]}")


@dataclass(frozen=True)
class Command:
    """One stage's run.

    The same command begins a stage and goes on with it: `--load` and `--save` are the stage's own folder, and while
    that has no checkpoint Megatron starts from `--pretrained-checkpoint`, the stage before, as with `--finetune`.
    That is what makes torchrun's restarts, and a job's, safe.

    Attributes:
        settings: the stage's flags without dashes, and their values.
        begins_from, folder: the checkpoint of the stage before, or the original model's, and the stage's own.
        launcher: torchrun's arguments.
        before: the stage before.
    """

    stage: str
    iterations: int
    begins_from: str
    folder: str
    settings: dict[str, Any]
    launcher: list[str]
    before: Command | None

    def training(self) -> list[str]:
        """The arguments of `megatron-dmc train`."""
        words = []
        for flag, value in self.settings.items():
            if value is not False:
                values = [] if value is True else value if isinstance(value, list) else [value]
                words += [f"--{flag}", *map(str, values)]
        folders = ["--pretrained-checkpoint", self.begins_from, "--load", self.folder, "--save", self.folder]
        return [*words, "--dmc-stage", self.stage, *folders]

    def words(self) -> list[str]:
        """The whole command."""
        return ["torchrun", *self.launcher, "-m", "megatron_dmc", "train", *self.training()]

    def shell(self, width: int = 120) -> str:
        """The command for a shell, on lines that end in a backslash."""
        lines = [""]
        for word in self.words():
            word = f'"{word}"' if word == ENDPOINT else shlex.quote(word)
            if lines[-1] and word.startswith("--") and len(lines[-1]) + len(word) > width - 30:
                lines.append("   ")
            lines[-1] += f" {word}" if lines[-1] else word
        return " \\\n".join(lines)

    def reached(self) -> int | None:
        """The iteration of the stage's last checkpoint; `None` where it has none."""
        return latest_iteration(self.folder)

    def finished(self) -> bool:
        """Whether the stage's last checkpoint is that of its last iteration."""
        return (self.reached() or 0) >= self.iterations


def latest_iteration(folder: str | Path) -> int | None:
    """The iteration of the last whole checkpoint in a folder, where a run goes on; `None` where it has no tracker.

    Raises:
        DMCError: for a tracker that names no iteration, such as a converted model's (`release`), or where no
            checkpoint is whole.
    """
    folder = Path(folder)
    try:
        text = resume.tracked(folder)
    except FileNotFoundError:
        return None
    if text and not resume.is_iteration(text):  # without text: writing it was cut short
        raise DMCError(
            f"{folder / resume.TRACKER} holds {text!r}, where a stage's own checkpoint has its iteration: "
            "name another folder with --output"
        )
    return resume.checkpoint_to_resume(folder)[0]


@dataclass(frozen=True)
class Launch:
    """A recipe on a number of GPUs: the commands of its stages, and where they run."""

    recipe: Recipe
    gpus: int
    gpus_per_node: int
    nodes: int
    compression: float
    commands: list[Command]


def whole(settings: dict[str, Any], flag: str, default: int | None = None) -> int:
    """A flag's value, which must be a whole number of at least 1."""
    value = settings.get(flag, default)
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or str(number) != str(value):
        raise DMCError(f"{flag} must be a whole number of at least 1; got {value!r}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The arguments that `plan` and `run` have in common."""
    parser.add_argument("recipe", metavar="RECIPE", help="the recipe, a YAML file (examples/recipes/)")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="of one node (default: 8)")
    parser.add_argument("--compression", type=float, metavar="RATIO", help="target ratio (default: the recipe's)")
    parser.add_argument("--stage", choices=STAGES, help="this stage alone (default: all three)")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="the original model (default: the recipe's)")
    parser.add_argument("--output", metavar="FOLDER", help="where the stages' checkpoints go (default: the recipe's)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="[STAGE.]FLAG=VALUE", dest="changes",
        help="change a flag, in all stages or one: --set micro-batch-size=2 --set retrofit.lr=1e-5 --set bf16=false",
    )  # fmt: skip
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N", help="torchrun's (default: 0)")
    parser.add_argument(
        "--rdzv-endpoint", metavar="HOST:PORT", help="where several nodes meet: the first node and a free port"
    )
    return parser


def resolve(options: argparse.Namespace) -> Launch:
    """The commands that parsed options (`add_arguments`) ask for.

    Raises:
        DMCError: for a recipe, numbers of GPUs or changes that do not go together.
    """
    recipe = Recipe.read(options.recipe)
    nodes, per_node = _nodes(options.gpus, options.gpus_per_node)
    ratio = options.compression if options.compression is not None else recipe.compression
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 1 <= ratio < math.inf:
        raise DMCError(f"the compression ratio must be a number of at least 1; got {ratio!r}")
    fitting = [n for n in recipe.layouts if n <= options.gpus]
    if not fitting:
        raise DMCError(
            f"{recipe.name} has layouts from {min(recipe.layouts)} GPUs on; got {options.gpus}: "
            "use more GPUs, or add a layout to the recipe"
        )
    common = recipe.settings | recipe.layouts[fitting[-1]]
    changes = sorted(map(_change, options.changes), key=lambda change: change[0] is not None)  # a stage's own win
    launcher = ["--nproc-per-node", str(per_node), "--max-restarts", str(options.max_restarts)]
    if nodes == 1:
        launcher = ["--standalone", *launcher]
    else:
        endpoint = options.rdzv_endpoint or ENDPOINT
        launcher = ["--nnodes", str(nodes), *launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    output = Path(options.output or recipe.output)
    commands: list[Command] = []
    for stage in STAGES:
        merges = {} if stage == "zero-out" else {"dmc-cr": f"{ratio:g}"}
        changed = {flag: value for where, flag, value in changes if where in (None, stage)}
        own = {
            flag: _at(value, ratio, f"{recipe.name}: {stage}: {flag}", f"--set {stage}.{flag}=…")
            for flag, value in recipe.stages[stage].items()
            if flag not in changed
        }
        settings = common | own | changed | merges
        folder = str(output / (f"{stage}-{ratio:g}x" if merges else stage))  # zero-out serves every ratio
        rendezvous = [] if nodes == 1 else ["--rdzv-id", f"{recipe.name}-{stage}"]
        before = commands[-1] if commands else None
        commands.append(
            Command(
                stage=stage,
                iterations=whole(settings, "train-iters"),
                begins_from=before.folder if before else options.checkpoint or recipe.original,
                folder=folder,
                settings=settings,
                launcher=[*launcher, *rendezvous],
                before=before,
            )
        )
    commands = [command for command in commands if options.stage in (None, command.stage)]
    launch = Launch(recipe, options.gpus, per_node, nodes, ratio, commands)
    _check_division(launch)
    return launch


def _nodes(gpus: int, per_node: int) -> tuple[int, int]:
    if gpus < 1 or per_node < 1:
        raise DMCError(f"--gpus and --gpus-per-node must be at least 1; got {gpus} and {per_node}")
    if gpus <= per_node:
        return 1, gpus
    if gpus % per_node:
        raise DMCError(
            f"{gpus} GPUs do not fill nodes of {per_node}: use {gpus - gpus % per_node} or "
            f"{gpus + per_node - gpus % per_node}, or say what a node has with --gpus-per-node"
        )
    return gpus // per_node, per_node


def _change(text: str) -> tuple[str | None, str, Any]:
    """`[STAGE.]FLAG=VALUE`, the value as YAML has it."""
    name, equals, value = text.partition("=")
    stage, dot, flag = name.rpartition(".")
    flag = flag.removeprefix("--").replace("_", "-")
    if not equals or not flag or (dot and stage not in STAGES):
        raise DMCError(f"--set takes FLAG=VALUE or STAGE.FLAG=VALUE, of the stages {', '.join(STAGES)}; got {text!r}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise DMCError(f"--set {text}: the value is no YAML ({error})") from error
    _check_flags({flag: parsed}, f"--set {text}")
    return stage or None, flag, parsed


def _at(value: Any, ratio: float, what: str, instead: str) -> Any:
    """A stage's value, for this ratio where it depends on it."""
    if not isinstance(value, dict):
        return value
    if ratio not in value:
        raise DMCError(
            f"{what} is given for the ratios {', '.join(map(str, value))}; got {ratio:g}: use one of them, or {instead}"
        )
    return value[ratio]


def _check_division(launch: Launch) -> None:
    """Whether the GPUs make whole model replicas, and the global batch whole micro-batches of each."""
    for command in launch.commands:
        sizes = {
            name: whole(command.settings, f"{name}-parallel-size", 1)
            for name in ("tensor-model", "pipeline-model", "context")
        }
        model = math.prod(sizes.values())
        spelled = " × ".join(f"{name}-parallel-size {size}" for name, size in sizes.items() if size > 1)
        if launch.gpus % model:
            raise DMCError(
                f"one replica of the model takes {model} GPUs ({spelled}), which {launch.gpus} GPUs do not divide "
                f"into: use a multiple of {model}, or change the layout with --set"
            )
        pipeline, experts = sizes["pipeline-model"], whole(command.settings, "expert-model-parallel-size", 1)
        expert_tensor = whole(command.settings, "expert-tensor-parallel-size", sizes["tensor-model"])
        shared = pipeline * experts * expert_tensor
        if launch.gpus % shared:
            raise DMCError(
                f"one replica of the experts takes {shared} GPUs (pipeline-model-parallel-size {pipeline} × "
                f"expert-model-parallel-size {experts} × expert-tensor-parallel-size {expert_tensor}, unless given the "
                f"tensor-model-parallel-size), which {launch.gpus} GPUs do not divide into: use a multiple of "
                f"{shared}, or change the layout with --set"
            )
        replicas = launch.gpus // model
        batch, micro = (whole(command.settings, f"{name}-batch-size") for name in ("global", "micro"))
        if batch % (micro * replicas):
            allowed = [n for n in range(1, batch // micro + 1) if batch % (micro * n) == 0]
            near = [*[n for n in allowed if n < replicas][-1:], *[n for n in allowed if n > replicas][:1]]
            fewer_or_more = " or ".join(str(n * model) for n in near)
            raise DMCError(
                f"a global batch of {batch} in micro-batches of {micro} does not divide among {replicas} data-parallel "
                f"replicas ({launch.gpus} GPUs, {model} each): "
                + (f"use {fewer_or_more} GPUs, or change" if near else "change")
                + " global-batch-size or micro-batch-size with --set"
            )
