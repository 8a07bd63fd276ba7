"""Megatron on a machine without a GPU: `python -m megatron_dmc.cpu SCRIPT ARGS…` runs any Megatron script on the CPU.

Megatron asks for CUDA devices, streams and NCCL by name. `emulate_cuda` answers in their place: tensors meant for
`cuda` land on the CPU, streams and events do nothing, process groups use gloo. Under torchrun every process is a rank
as usual. For trying things out, for tests and for small models; nothing of this is loaded where there is a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import runpy
import sys
import threading
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU_ARGUMENTS = dict(
    transformer_impl="local",
    use_cpu_initialization=True,
    masked_softmax_fusion=False,
    no_persist_layer_norm=True,
    gradient_accumulation_fusion=False,
    bias_swiglu_fusion=False,
    bias_gelu_fusion=False,
    bias_dropout_fusion=False,
    cross_entropy_loss_fusion=False,
    apply_rope_fusion=False,
    distributed_backend="gloo",
)
"""Arguments of Megatron that have only one possible value without a GPU."""


class _Redirect(TorchFunctionMode):
    """Sends what is meant for a CUDA device to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu") if isinstance(kwargs["device"], int) else _on_cpu(kwargs["device"])
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.type:  # 'torch.cuda.FloatTensor' is the name of a type
            if len(args) == 1 and not kwargs:
                return func(*args).replace("torch.", "torch.cuda.")
            args = tuple(a.replace("torch.cuda.", "torch.") if isinstance(a, str) else a for a in args)
        return func(*map(_on_cpu, args), **kwargs)


def _on_cpu(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu") if x.type == "cuda" else x
    return "cpu" if isinstance(x, str) and (x == "cuda" or x.startswith("cuda:")) else x


class _Nothing:
    """A stream or an event: the CPU has finished whatever it was given."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def _done(self, *args, **kwargs):
        return self

    wait_stream = wait_event = synchronize = record = record_event = wait = _done

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class _Generators:
    def __getitem__(self, index):
        return torch.default_generator


def emulate_cuda() -> None:
    """From here on, run what asks for CUDA on the CPU; without effect where CUDA is available, or the second time."""
    if torch.cuda.is_available():
        return
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's compiled helpers gain nothing here
    if (dynamo := sys.modules.get("torch._dynamo.config")) is not None:  # it has read the environment already
        dynamo.disable = True
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print("megatron-dmc: no CUDA device, running on the CPU over gloo", file=sys.stderr, flush=True)
    _emulate_devices()
    _emulate_process_groups()
    _emulate_megatron()


def _emulate_devices() -> None:
    # Each name gets a function of its own: torch.compile keeps a table by function.
    def returns(value: Any):
        return lambda *args, **kwargs: value

    properties = SimpleNamespace(
        major=9, minor=0, total_memory=8 << 30, name="CPU", multi_processor_count=os.cpu_count()
    )
    replacements = dict(
        is_available=returns(True),
        is_initialized=returns(True),
        device_count=returns(1),
        current_device=returns(torch.device("cpu")),
        set_device=returns(None),
        synchronize=returns(None),
        empty_cache=returns(None),
        reset_peak_memory_stats=returns(None),
        mem_get_info=returns((2 << 30, 8 << 30)),
        memory_allocated=returns(0),
        max_memory_allocated=returns(0),
        memory_reserved=returns(0),
        max_memory_reserved=returns(0),
        memory_stats=returns({}),
        Stream=_Nothing,
        Event=_Nothing,
        current_stream=_Nothing,
        default_stream=_Nothing,
        stream=lambda *args: contextlib.nullcontext(),
        device=lambda *args: contextlib.nullcontext(),
        manual_seed=lambda seed: torch.default_generator.manual_seed(int(seed)),
        manual_seed_all=returns(None),
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        default_generators=_Generators(),
        get_device_properties=returns(properties),
        get_device_capability=returns((9, 0)),
        get_device_name=returns("CPU"),
        is_current_stream_capturing=returns(False),
        _lazy_init=returns(None),
        _lazy_call=lambda function, *args, **kwargs: function(),
    )
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
        for module in (torch.cuda.random, torch.cuda.graphs):
            if hasattr(module, name):
                setattr(module, name, replacement)
    _Redirect().__enter__()
    in_thread = threading.Thread.run

    @functools.wraps(in_thread)
    def run_redirected(self):
        with _Redirect():  # holds for the thread that enters it alone
            in_thread(self)

    threading.Thread.run = run_redirected
    # The GPU's generator is the CPU's here, which changes where only the GPU's should.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )

    loader = torch.utils.data.DataLoader
    construct = loader.__init__

    @functools.wraps(construct)
    def on_cpu(self, *args, **kwargs):
        # An iterator takes a seed from the CPU's generator. That is the GPU's as well here, whose state a resumed run
        # has restored by then, so the loader gets its own.
        kwargs.setdefault("generator", torch.Generator())
        construct(self, *args, **{**kwargs, "pin_memory": False})

    loader.__init__ = on_cpu


def _emulate_process_groups() -> None:
    distributed = torch.distributed
    for name, dropped in (("init_process_group", "device_id"), ("new_group", "pg_options")):
        original = getattr(distributed, name)

        @functools.wraps(original)
        def over_gloo(*args, original=original, dropped=dropped, **kwargs):
            given = inspect.signature(original).bind(*args, **kwargs).arguments
            given.pop(dropped, None)
            return original(**{**given, "backend": "gloo"})

        setattr(distributed, name, over_gloo)


def _emulate_megatron() -> None:
    from megatron.core.inference import communication_utils
    from megatron.training import arguments

    from megatron_dmc.megatron_hooks import keep_compiled_helpers

    keep_compiled_helpers()
    communication_utils._is_cuda = lambda tensor: None  # what pipeline stages pass on lies on the CPU
    parse = arguments.parse_args

    @functools.wraps(parse)
    def parse_args(*args, **kwargs):
        namespace = parse(*args, **kwargs)
        vars(namespace).update(CPU_ARGUMENTS)
        return namespace

    arguments.parse_args = parse_args


def default_environment() -> None:
    """What torchrun would set for a single process, where nothing has set it."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    for name, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1").items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        # Any that is free when the store opens; one that was looked for before may be taken by then.
        os.environ.setdefault("MASTER_PORT", "0")


def main() -> None:
    """`python -m megatron_dmc.cpu SCRIPT ARGS…`"""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__.strip(), "\n\n  python -m megatron_dmc.cpu pretrain_gpt.py --num-layers 4 …")
        print("  torchrun --nproc-per-node 2 -m megatron_dmc.cpu pretrain_gpt.py …")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    if not os.path.isfile(script):
        sys.exit(f"megatron-dmc: no such script: {script}")
    emulate_cuda()
    default_environment()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
