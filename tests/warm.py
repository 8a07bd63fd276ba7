"""A process that has imported what `python -m megatron_dmc` does, and forks for whoever wants to run that.

Short runs are mostly imports, and the tests have hundreds of them, of several ranks each. A run is the same as in a
process of its own: it gets its arguments, environment and output, and ends as an interpreter ends. Not for GPUs, which
do not survive a fork, nor for what is to be tried at the start of a process.

    Warm(environment).run(arguments, ranks, timeout) -> (exit code, output)

This file is both ends: the tests' (`Warm`), and run as a script the process that forks. Between them go lines of JSON.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Warm:
    """The process, begun with the first run, and gone with this one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._process: subprocess.Popen | None = None

    def run(self, arguments: list[str], ranks: int, timeout: float) -> tuple[int, str]:
        """`python -m megatron_dmc ARGUMENTS`, on so many ranks: the exit code, and what was written meanwhile.

        Raises:
            TimeoutError: after so many seconds; the ranks are killed.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__], env=self.environment, cwd=Path(__file__).resolve().parent.parent,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        with tempfile.NamedTemporaryFile("r") as output:
            job = dict(arguments=arguments, ranks=ranks, output=output.name, timeout=timeout)
            print(json.dumps(job), file=self._process.stdin, flush=True)
            if not (answer := self._process.stdout.readline()):
                raise RuntimeError(f"{__file__} ended with exit code {self._process.wait()}")
            code = json.loads(answer)
            if code is None:
                raise TimeoutError(f"{arguments} took longer than {timeout} seconds:\n{output.read()[-6000:]}")
            return code, output.read()


def main() -> list[str] | None:
    """Fork for every job until there are no more; in a child, return its arguments."""
    from megatron_dmc.cpu import default_environment, emulate_cuda

    emulate_cuda()
    default_environment()
    import megatron.training.training  # noqa: F401

    import megatron_dmc.commands.train
    import megatron_dmc.megatron_hooks  # noqa: F401

    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        children, port = {}, free_port()
        for rank in range(job["ranks"]):
            if (child := os.fork()) == 0:
                become_rank(rank, port, job)
                return job["arguments"]
            children[child] = rank
            os.setpgid(child, child)  # whichever of the two is first: a rank can be ended from now on
        print(json.dumps(wait(children, time.monotonic() + job["timeout"])), file=answers, flush=True)
    return None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def become_rank(rank: int, port: int, job: dict) -> None:
    """Environment as torchrun sets it up, and output to the job's file."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if job["ranks"] > 1:
        os.environ |= dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_WORLD_SIZE=str(job["ranks"]),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    os.setpgid(0, 0)
    with open(job["output"], "a") as output, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def wait(children: dict[int, int], end: float) -> int | None:
    """The ranks' exit code, the first that is not 0, whose ranks are then ended; `None` if they were not in time."""
    code = 0
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            del children[child]
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                end_all(children, signal.SIGTERM)
                end = min(end, time.monotonic() + 30)
        elif time.monotonic() > end:
            end_all(children, signal.SIGKILL)
            for child in children:
                os.waitpid(child, 0)
            return code or None
        else:
            time.sleep(0.02)
    return code


def end_all(children: dict[int, int], by: int) -> None:
    for child in children:
        os.killpg(child, by)


if __name__ == "__main__":
    if (arguments := main()) is not None:
        sys.stdout.reconfigure(line_buffering=True)
        sys.argv = ["megatron_dmc", *arguments]
        sys.path[0] = os.getcwd()
        runpy.run_module("megatron_dmc", run_name="__main__", alter_sys=True)
