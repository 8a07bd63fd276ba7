"""`megatron-dmc run`: carry a recipe out on this machine, stage by stage, from wherever it was left."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_dmc.config import DMCError
from megatron_dmc.recipe import Command, add_arguments, resolve
from megatron_dmc.resume import TRACKER

EXAMPLES = """\
examples:
  megatron-dmc run examples/recipes/llama-2-7b.yaml --gpus 8 --dry-run
  megatron-dmc run examples/recipes/llama-2-7b.yaml --gpus 8
  megatron-dmc run examples/recipes/llama-2-7b.yaml --gpus 64 --next
  megatron-dmc run examples/recipes/llama-2-7b.yaml --gpus 64 --stage retrofit --rdzv-endpoint node1:29500  # everywhere

The commands are those that `megatron-dmc plan` prints. A finished stage is skipped, and one that was begun goes on from
its last checkpoint; to go on after an interruption, give the same line. SIGTERM and SIGUSR1 let Megatron save and end
(--exit-signal-handler, which the recipes set). examples/slurm.sbatch runs recipes on many nodes.

exit status: 0 when the stages are finished, 75 when training ended before (a signal, --exit-duration-in-mins,
--exit-interval): the same line goes on from there. Otherwise that of the command that failed."""

STOPPED = os.EX_TEMPFAIL  # 75: not finished, nothing wrong

TORCHRUN = (
    "import signal; signal.signal(signal.SIGTERM, lambda *_: None); from torch.distributed.run import main; main()"
)
"""torchrun, deaf to SIGTERM. (A handler, since ranks would inherit that it is ignored.)"""
ENDS_TORCHRUN = signal.SIGUSR2
"""In SIGTERM's place: nobody else sends it, and `nohup` does not shield from it."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="megatron-dmc run",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    asked.add_argument(
        "--next", action="store_true",
        help="print the stage to run next and the iteration it is at, or nothing if all are finished",
    )  # fmt: skip
    sys.exit(run(parser.parse_args()))


def run(options: argparse.Namespace) -> int:
    """Run what parsed options ask for; returns the exit status.

    Raises:
        DMCError: for a recipe that is wrong, or a stage whose predecessor is not there.
    """
    launch = resolve(options)
    if options.next:
        for command in launch.commands:
            if not command.finished():
                print(command.stage, command.reached() or 0)
                break
        return 0
    many = launch.nodes > 1
    if many and not options.dry_run:
        if options.rdzv_endpoint is None:
            raise DMCError(
                f"{launch.nodes} nodes need --rdzv-endpoint HOST:PORT, the first node and a free port, the same on each"
            )
        if options.stage is None:
            raise DMCError(f"{launch.nodes} nodes must run the same stage: name it with --stage (--next says which)")
    runner = Runner()
    for command in launch.commands:
        at, of = command.reached(), command.iterations
        if command.finished():
            _say(f"{command.stage}: finished ({at} of {of} iterations), skipped")
            continue
        if at is None and not options.dry_run:
            _check_beginning(command)
        _say(f"{command.stage}: {'begins' if at is None else 'goes on'} at iteration {at or 0} of {of}")
        print(command.shell(), flush=True)
        if options.dry_run:
            continue
        status = runner.run(command)
        if status == 0 and not command.finished():
            at = command.reached() or 0
            _say(f"{command.stage}: ended at iteration {at} of {of}; the same line goes on from there")
            status = STOPPED
        if status != 0:
            return status
    return 0


def _say(text: str) -> None:
    print(f"megatron-dmc run: {text}", flush=True)


def _check_beginning(command: Command) -> None:
    """A stage begins from one that is finished, or from the original model."""
    if command.before is not None and not command.before.finished():
        raise DMCError(
            f"{command.stage} begins from {command.before.stage}, which is at iteration "
            f"{command.before.reached() or 0} of {command.before.iterations} in {command.begins_from}: finish it first"
        )
    if not (Path(command.begins_from) / TRACKER).is_file():
        raise DMCError(
            f"no checkpoint of the original model in {command.begins_from} (a folder with {TRACKER}): "
            "say where it is with --checkpoint"
        )


class Runner:
    """Runs commands under torchrun, and hands SIGTERM and SIGUSR1 on to the ranks.

    torchrun itself would answer SIGTERM by killing its ranks after 30 seconds, which is not enough to save a large
    model. So it does not hear of it, also where every process gets the signal, as from Slurm; it ends with its ranks.
    It is ended where a rank does not know what to do.
    """

    def __init__(self) -> None:
        self.launcher: subprocess.Popen | None = None
        self.stopping = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._stop)

    def run(self, command: Command) -> int:
        """Run one command; returns its exit status, or `STOPPED` where a signal had come before."""
        if self.stopping:
            return STOPPED
        heard = f"--signals-to-handle=SIGINT,SIGHUP,SIGQUIT,{ENDS_TORCHRUN.name}"
        words = [sys.executable, "-c", TORCHRUN, heard, *command.words()[1:]]
        # Slurm may signal every process of a job: SIGUSR1 must not end those that do not expect it.
        self.launcher = subprocess.Popen(words, preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN))
        if self.stopping:  # the signal came while it was being started
            self._stop()
        interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to torchrun as well
        try:
            status = self.launcher.wait()
        finally:
            signal.signal(signal.SIGINT, interrupted)
            self.launcher = None
        if status != 0 and self.stopping:
            return STOPPED
        return 128 - status if status < 0 else status

    def _stop(self, *_) -> None:
        self.stopping = True
        if self.launcher is None:
            return
        ranks = children(self.launcher.pid)
        saves = ranks and all(catches(rank, signal.SIGTERM) for rank in ranks)
        for process in ranks if saves else [self.launcher.pid]:
            try:
                os.kill(process, signal.SIGTERM if saves else ENDS_TORCHRUN)
            except ProcessLookupError:  # it has ended
                continue


def children(process: int) -> list[int]:
    """The processes that a process has started and that are still there."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:  # the thread has ended
            continue
    return found


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; `True` for one that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    masks = dict(line.split(":\t", 1) for line in status.splitlines() if line.startswith("Sig"))
    return bool(int(masks["SigCgt"], 16) >> (number - 1) & 1)
