"""Compile csrc/ for the CPU and register its operators under a name of their own.

The sources are compiled as they are, but for what only nvcc reads (launches, dynamic shared memory) and for where
tensors live. `emulation.h` says what is emulated.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"


def cuda_headers() -> Path | None:
    """The toolkit's headers, for the 16-bit types and the runtime's declarations."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parent.parent if nvcc else None, "/usr/local/cuda"]
    for home in filter(None, homes):
        if (Path(home) / "include/cuda_bf16.h").exists():
            return Path(home) / "include"
    return None


def translate(text: str) -> str:
    """From what nvcc compiles to C++."""
    text = re.sub(
        r"(\w+(?:<[^<>]*>)?)\s*<<<(.*?)>>>\((\w+)\);", r"emulation::launch(\2, [&] { \1(\3); });", text, flags=re.S
    )
    return re.sub(r"extern __shared__ [^;]*? memory\[\];", "char* const memory = emulation::shared_memory();", text)


def for_cpu(bindings: str, name: str) -> str:
    """The bindings, registered for CPU tensors as `name`."""
    for old, new in (
        ("STABLE_TORCH_LIBRARY(megatron_dmc,", f"STABLE_TORCH_LIBRARY({name},"),
        ("STABLE_TORCH_LIBRARY_IMPL(megatron_dmc, CUDA,", f"STABLE_TORCH_LIBRARY_IMPL({name}, CPU,"),
        ("STABLE_TORCH_LIBRARY_IMPL(megatron_dmc,", f"STABLE_TORCH_LIBRARY_IMPL({name},"),
        ("TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream));", ""),
        ("query.is_cuda()", "query.is_cpu()"),
        ("x.is_cuda()", "x.is_cpu()"),
    ):
        assert old in bindings, old
        bindings = bindings.replace(old, new)
    return re.sub(r"\n *const torch::stable::accelerator::DeviceGuard guard\(.*?\);", "", bindings)


RUNTIME = """
extern "C" {
const char* cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr asked, int) {
  const char* const capability = std::getenv("DMC_EMULATED_CAPABILITY");
  switch (asked) {
    case cudaDevAttrComputeCapabilityMajor: *value = (capability ? capability : "9.0")[0] - '0'; break;
    case cudaDevAttrComputeCapabilityMinor: *value = (capability ? capability : "9.0")[2] - '0'; break;
    case cudaDevAttrMultiProcessorCount: *value = 3; break;
    default: *value = (capability && capability[0] == '8' ? 163 : 227) * 1024;  // shared memory of a block
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
}
"""


def build(folder: Path, page_entries: int = 16, *flags: str):
    """Compile in `folder`, unless that is done, and load the operators, for pages of so many entries.

    Returns their namespace.

    `-DMEGATRON_DMC_EMULATES_AMPERE` among the compiler's flags leaves out what decoding does from Hopper on.

    Raises:
        RuntimeError: with the compiler's output, if it does not compile.
    """
    name = f"megatron_dmc_emulated_{page_entries}_{len(flags)}"
    library = folder / "emulated.so"
    if not library.exists():
        _compile(library, name, page_entries, flags)
    torch.ops.load_library(str(library))
    for operator in ("paged_attention_", "paged_chunks_"):
        torch.library.register_fake(f"{name}::{operator}", lambda *_: None)
    return getattr(torch.ops, name)


def _compile(library: Path, name: str, page_entries: int, flags: tuple[str, ...]) -> None:
    folder, headers = library.parent, cuda_headers()
    for path in SOURCES.iterdir():
        if path.suffix in (".cu", ".cuh", ".h"):
            (folder / path.with_suffix(".cpp" if path.suffix == ".cu" else path.suffix).name).write_text(
                translate(path.read_text())
            )
    for header in ("emulation.h", "instructions.cuh", "hopper.cuh"):
        shutil.copy(HERE / header, folder / header)
    (folder / "bindings.cpp").write_text(for_cpu((SOURCES / "bindings.cpp").read_text(), name))
    (folder / "runtime.cpp").write_text(RUNTIME)
    torch_headers = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", *flags]
    flags += [f"-DMEGATRON_DMC_PAGE_ENTRIES={page_entries}"]
    flags += [f"-I{folder}", f"-isystem{headers}", f"-isystem{torch_headers}", "-include", str(folder / "emulation.h")]
    units = sorted(folder.glob("*.cpp"))

    def run(command: list) -> None:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-8000:])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda unit: run(["g++", *flags, "-c", unit, "-o", unit.with_suffix(".o")]), units))
    torch_libraries = Path(torch.__file__).parent / "lib"
    partial = library.with_suffix(".partial")
    # Bsymbolic: the runtime of runtime.cpp, not the one that torch has loaded.
    run(
        [
            "g++",
            "-shared",
            "-Wl,-Bsymbolic",
            *(u.with_suffix(".o") for u in units),
            f"-L{torch_libraries}",
            "-ltorch_cpu",
            "-o",
            partial,
        ]
    )
    partial.rename(library)
