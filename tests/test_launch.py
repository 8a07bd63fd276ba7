"""Running recipes: `megatron-dmc run` on one machine, and examples/slurm.sbatch with Slurm's commands played."""

import os
import signal
import subprocess
import sys

import pytest
import yaml
from runs import MODEL, ROOT, UNDECIDED, Run, dmc, environment

from megatron_dmc.commands.run import STOPPED, children


def flags(words):
    """Words of a command line as a recipe has them."""
    found = {}
    for word in words:
        if word.startswith("--"):
            found[name := word[2:]] = True
        else:
            found[name] = word
    return found


@pytest.fixture
def recipe(tmp_path):
    """The tests' small model; its checkpoints go to `out`."""
    path = tmp_path / "small.yaml"
    stages = {"zero-out": {"train-iters": 3}, "retrofit": {"train-iters": {4: 60}}, "finetune": {"train-iters": 2}}
    parts = dict(
        compression=4,
        checkpoints=dict(original=str(tmp_path / "nowhere"), output=str(tmp_path / "out")),
        model=flags(MODEL),
        data={},
        training={**flags(UNDECIDED), "save-interval": 1000, "exit-signal-handler": True},
        layouts={1: {}, 8: {}},
        stages=stages,
    )
    path.write_text(yaml.safe_dump(parts))
    return path


def test_stages_interrupted_and_resumed(recipe, base, tmp_path):
    """SIGTERM to all processes amid the second stage; the same line goes on from there, to the end of the third."""
    command = ["run", recipe, "--gpus", 1, "--checkpoint", base]
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_dmc", *map(str, command)], env=environment(), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as first:  # fmt: skip
        output = ""
        for line in first.stdout:
            output += line
            if " iteration        2/      60 " in line:
                (torchrun,) = children(first.pid)
                for process in (torchrun, *children(torchrun), first.pid):
                    os.kill(process, signal.SIGTERM)
    assert first.returncode == STOPPED, output[-6000:]
    assert "zero-out: begins at iteration 0 of 3" in output and "retrofit: begins at iteration 0 of 60" in output
    assert "retrofit: ended at iteration" in output and "finetune: begins" not in output

    stage, reached = dmc(*command, "--next").output.split()
    assert stage == "retrofit" and 2 <= int(reached) < 60
    second = dmc(*command)
    assert second.code == 0, second.output[-6000:]
    assert "zero-out: finished (3 of 3 iterations), skipped" in second.output
    assert f"retrofit: goes on at iteration {reached} of 60" in second.output
    retrofit, finetune = second.output.split("finetune: begins")
    retrofit = Run(0, retrofit)
    assert sorted(retrofit.steps) == list(range(int(reached) + 1, 61))
    assert retrofit.steps[60]["target compression ratio"] == pytest.approx(1 + 3 * 59 / 60)
    assert Run(0, finetune).values("target compression ratio") == [4, 4]
    assert dmc(*command, "--next").output == ""
    assert sorted(os.listdir(tmp_path / "out")) == ["finetune-4x", "retrofit-4x", "zero-out"]

    for file in (tmp_path / "out" / "finetune-4x").glob("iter_*/*.distcp"):
        os.truncate(file, 10)
    cut_off = dmc(*command, "--next")
    assert cut_off.code != 0 and "is whole: " in cut_off.output and " has 10 of " in cut_off.output


def test_a_signal_before_there_is_anything_to_save(recipe, base, tmp_path):
    """Ranks that have no handler yet, or are not there yet: torchrun is ended."""
    command = ["run", recipe, "--gpus", 1, "--checkpoint", base]
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_dmc", *map(str, command)], env=environment(), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as run:  # fmt: skip
        for line in run.stdout:
            if "zero-out: begins" in line:
                run.send_signal(signal.SIGUSR1)
    assert run.returncode == STOPPED and not (tmp_path / "out").exists()


def test_what_run_refuses(recipe, tmp_path):
    def run(*arguments):
        done = dmc("run", recipe, *arguments)
        assert "Traceback" not in done.output, done.output
        return done

    assert "no checkpoint of the original model in" in run("--gpus", 1).output
    retrofit = run("--gpus", 1, "--stage", "retrofit").output
    assert "retrofit begins from zero-out, which is at iteration 0 of 3" in retrofit and "finish it first" in retrofit
    assert "2 nodes need --rdzv-endpoint" in run("--gpus", 16, "--set=global-batch-size=32").output
    several = run("--gpus", 16, "--set=global-batch-size=32", "--rdzv-endpoint", "a:1")
    assert several.code != 0 and "name it with --stage" in several.output
    dry = run("--gpus", 1, "--dry-run")
    assert dry.code == 0 and dry.output.count("torchrun --standalone") == 3
    (tmp_path / "out" / "zero-out").mkdir(parents=True)
    (tmp_path / "out" / "zero-out" / "latest_checkpointed_iteration.txt").write_text("release")
    assert "holds 'release'" in run("--gpus", 1).output


# srun in the tests: --next says what the file `step` has; a stage leaves there what `after-STAGE` has, if there is one.
SRUN = """#!/bin/bash
echo "srun $*" >> "$PLAYED/asked"
case "$*" in
*--next) cat "$PLAYED/step" ;;
*)
    stage=${*: -1}
    trap 'echo "got USR1" >> "$PLAYED/asked"; cp "$PLAYED/after-signal" "$PLAYED/step"; exit 75' USR1
    if [[ -e $PLAYED/signals-itself ]]; then
        kill -USR1 $PPID
        for _ in {1..100}; do sleep 0.1; done
    fi
    [[ -e $PLAYED/after-$stage ]] && cp "$PLAYED/after-$stage" "$PLAYED/step"
    exit "$(cat "$PLAYED/status-$stage" 2>/dev/null || echo 0)"
    ;;
esac
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'node1\\nnode2\\n'; else echo "scontrol $*" >> "$PLAYED/asked"; fi
"""
SQUEUE = """#!/bin/bash
cat "$PLAYED/state" 2>/dev/null || echo RUNNING
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs the job script where files say what happens; returns exit code, output and what Slurm was asked."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def job(*arguments, files, **variables):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
        job = dict(SLURM_JOB_ID="1234567", SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_NUM_NODES="2")
        done = subprocess.run(
            ["bash", ROOT / "examples" / "slurm.sbatch", *arguments], text=True, timeout=60, cwd=tmp_path,
            env=environment(PATH=path, PLAYED=str(tmp_path), SLURM_GPUS_ON_NODE="8", **job, **variables),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
        return done.returncode, done.stdout, asked

    return job


def test_slurm_job_that_finishes(slurm):
    """Two stages are left: each runs on all nodes, and nothing is queued again."""
    files = {"step": "retrofit 500\n", "after-retrofit": "finetune 0\n", "after-finetune": ""}
    code, output, asked = slurm("r.yaml", "--compression", "8", files=files)
    assert code == 0 and "all stages are finished" in output, output
    stages = [line for line in asked if "--next" not in line]
    assert [line.split()[-1] for line in stages] == ["retrofit", "finetune"] and len(asked) == 5
    assert "megatron-dmc run r.yaml --compression 8 --gpus 16 --gpus-per-node 8 " in stages[0]
    assert "--rdzv-endpoint node1:24567" in stages[0] and "--max-restarts 1" in stages[0]
    assert all("--nodes 1 --ntasks 1 --nodelist node1" in line for line in asked if "--next" in line)
    assert "container" not in " ".join(asked)
    words = stages[0].split()
    words = words[words.index("megatron-dmc") + 1 :]
    words[words.index("r.yaml")] = ROOT / "examples" / "recipes" / "llama-2-7b.yaml"
    dry = dmc(*words, "--dry-run")
    assert dry.code == 0 and "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 1 " in dry.output, dry.output


def test_slurm_job_near_its_end(slurm):
    """The signal goes on to the tasks, which save and end; the job is queued again."""
    files = {"step": "retrofit 500\n", "after-signal": "retrofit 620\n", "signals-itself": ""}
    code, output, asked = slurm("r.yaml", files=files)
    assert code == 0 and "began at retrofit 500: queued again" in output, output
    assert asked[-3:-1] == ["got USR1", asked[-2]] and asked[-1] == "scontrol requeue 1234567"


def test_slurm_job_that_leaves_by_the_clock(slurm):
    files = {"step": "retrofit 500\n", "after-retrofit": "retrofit 620\n", "status-retrofit": "75"}
    end = str(int(subprocess.check_output(["date", "+%s"])) + 3600)
    code, _, asked = slurm("r.yaml", files=files, SLURM_JOB_END_TIME=end, IMAGE="dmc.sqsh", MOUNTS="/data:/data")
    assert code == 0 and asked[-1] == "scontrol requeue 1234567"
    assert " --set exit-duration-in-mins=47 --stage retrofit" in asked[1] or "mins=48 --stage" in asked[1]
    assert all("--container-image dmc.sqsh --container-mounts /data:/data" in line for line in asked[:-1])


@pytest.mark.parametrize(
    ("files", "code", "message", "again"),
    [
        ({"status-retrofit": "1"}, 1, "where it began: not queued again", False),
        ({"status-retrofit": "0"}, 1, "where it began: not queued again", False),
        ({"status-retrofit": "1", "after-retrofit": "retrofit 620\n"}, 0, "with status 1 at retrofit 620", True),
        ({"after-retrofit": "finetune 0\n", "status-finetune": "9"}, 0, "with status 9 at finetune 0", True),
        ({"status-retrofit": "1", "after-retrofit": "retrofit 620\n", "state": "COMPLETING"}, 1, "cancelled", False),
    ],
)
def test_slurm_job_that_fails(slurm, files, code, message, again):
    status, output, asked = slurm("r.yaml", files={"step": "retrofit 500\n"} | files)
    assert status == code and message in output, output
    assert ("scontrol requeue 1234567" in asked) == again


def test_slurm_job_whose_srun_fails_at_once(slurm, tmp_path):
    """Its status counts, however late the script comes to ask: here, where it looks whether the task is there."""
    (tmp_path / "late").write_text('kill() { sleep 1; builtin kill "$@"; }\n')
    files = {"step": "retrofit 500\n", "status-retrofit": "9"}
    code, output, _ = slurm("r.yaml", files=files, BASH_ENV=str(tmp_path / "late"))
    assert code == 9 and "ended with status 9 at retrofit 500, where it began" in output, output


def test_slurm_job_outside_of_slurm(slurm):
    code, output, asked = slurm(files={})
    assert code == 2 and "usage: sbatch" in output and not asked
