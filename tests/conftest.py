"""Shared fixtures. Random inputs are fresh in every run; a failure prints the seed, and DMC_TEST_SEED repeats it."""

import os
import secrets
import sys

import pytest
import torch

HAVE_GPU = torch.cuda.is_available()
GPUS = torch.cuda.device_count()


LONG = (
    "server training packed_training context_layouts layouts retrofits commands convert evaluate launch engine "
    "parallel_generation context_parallel emulated_kernels distillation export report"
).split()
"""Files whose tests take minutes: two workers begin with them, and share out the others at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    for item in items:
        if "gpu" in item.keywords and not HAVE_GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def fresh_seed():
    seed = int(os.environ.get("DMC_TEST_SEED") or secrets.randbits(31))
    print(f"DMC_TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope="session")
def emulated_kernels(tmp_path_factory):
    """csrc/ compiled for the CPU, once for all workers, and loaded once in each."""
    from emulation import build
    from filelock import FileLock

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulation"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        return build(folder)


@pytest.fixture(scope="session")
def megatron():
    """One process of Megatron: on the GPU, or emulated on the CPU."""
    from megatron_dmc.checkpoint import start_megatron
    from megatron_dmc.cpu import emulate_cuda

    emulate_cuda()
    start_megatron()


@pytest.fixture(autouse=True)
def outside_of_inference():
    """Megatron's engine leaves a process-wide flag set, which models outside of it mind."""
    yield
    if (utils := sys.modules.get("megatron.core.inference.utils")) is not None:
        utils.InferenceMode.unset_active()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model to start every run from: layouts draw their random weights differently."""
    from runs import train

    folder = tmp_path_factory.mktemp("base")
    train("--train-iters", 1, "--save", folder, "--save-interval", 1)
    return folder


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """What layouts are compared with: a run of one process from `base`, and its weights."""
    from runs import STAGE, train_from

    return train_from(base, tmp_path_factory.mktemp("alone"), *STAGE)
