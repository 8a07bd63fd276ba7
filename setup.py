"""Builds the CUDA extension under csrc/ where nvcc is found; everything else is declared in pyproject.toml.

TORCH_CUDA_ARCH_LIST chooses the architectures, Ampere or later (unless given: Hopper, and PTX for what comes after),
MAX_JOBS the parallelism, MEGATRON_DMC_PAGE_ENTRIES the page size of the cache (8, 16, 32 or 64; 16 unless given).
MEGATRON_DMC_CUDA=0 leaves the extension out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

KERNELS = [
    "prepare", "merge_past", "merge_diagonal", "prepare_backward", "paged_attention", "paged_chunks", "attend_hopper",
]  # fmt: skip


def installed_torch() -> str | None:
    """Where the environment that we install into keeps torch; pip's build isolation hides it from this process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import importlib.util as u; spec = u.find_spec('torch'); print(spec.origin if spec else '')"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout.strip()
    return str(Path(found).parent.parent) if found else None


def cuda_home() -> str | None:
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parent.parent)
    candidates.append("/usr/local/cuda")
    for home in filter(None, candidates):
        if (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime.h").exists():
            return str(home)
    return None


def architectures() -> str:
    """TORCH_CUDA_ARCH_LIST without what is older than Ampere, on which the kernels' instructions do not exist."""
    asked = [name for name in re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if name] or ["9.0+PTX"]
    kept = [name for name in asked if not (found := re.match(r"(\d+)\.", name)) or int(found[1]) >= 8]
    if kept != asked:
        print(f"megatron-dmc: building for {kept} of TORCH_CUDA_ARCH_LIST {asked}", file=sys.stderr)
    if not kept:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST names nothing from 8.0 (Ampere) on: {asked}; unset it for Hopper")
    return ";".join(kept)


def page_entries() -> str:
    asked = os.environ.get("MEGATRON_DMC_PAGE_ENTRIES") or "16"
    if asked not in ("8", "16", "32", "64"):
        raise SystemExit(f"MEGATRON_DMC_PAGE_ENTRIES must be 8, 16, 32 or 64; got {asked!r}")
    return asked


def cuda_extension() -> dict:
    if os.environ.get("MEGATRON_DMC_CUDA") == "0":
        print("megatron-dmc: MEGATRON_DMC_CUDA=0, installing without the CUDA extension", file=sys.stderr)
        return {}
    home, torch_folder = cuda_home(), installed_torch()
    if home is None:
        print("megatron-dmc: no nvcc found, installing without the CUDA extension", file=sys.stderr)
        return {}
    # setuptools asks for requirements before it builds. Only then may torch be missing here.
    needs = ["ninja"] + ([] if torch_folder else ["torch>=2.11"])
    if torch_folder and torch_folder not in sys.path:
        sys.path.append(torch_folder)
    os.environ["CUDA_HOME"] = home
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    try:
        from torch.utils.cpp_extension import BuildExtension, CUDAExtension, _get_cuda_arch_flags
    except ImportError:
        return {"setup_requires": needs}
    print(f"megatron-dmc: building the CUDA extension with {home}/bin/nvcc", file=sys.stderr)
    # Hopper's own instructions exist for sm_90a only; what is for sm_90 runs nowhere else.
    targets = [flag.replace("compute_90,code=sm_90", "compute_90a,code=sm_90a") for flag in _get_cuda_arch_flags()]
    extension = CUDAExtension(
        "megatron_dmc._cuda",
        ["csrc/bindings.cpp", *(f"csrc/{name}.cu" for name in KERNELS)],
        depends=[str(path) for path in Path("csrc").glob("*.*h")],
        # torch's stable ABI of 2.11: one build serves every later version.
        define_macros=[
            ("USE_CUDA", None),
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),
            ("MEGATRON_DMC_PAGE_ENTRIES", page_entries()),
        ],
        extra_compile_args={"cxx": ["-O2", "-std=c++20"], "nvcc": ["-O3", "-std=c++20", "--threads=2", *targets]},
        py_limited_api=True,
    )
    build = BuildExtension.with_options(no_python_abi_suffix=True)
    return {"setup_requires": needs, "ext_modules": [extension], "cmdclass": {"build_ext": build}}


setup(**cuda_extension())
