"""The device, the number format, and torch's switches for both.

The first lines of a run state each choice with its reason.
"""

import ctypes
import gc
import mmap
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch

from opsin.errors import ConfigError

_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of oneDNN's limit on instructions that have none for bf16."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting, and the reason for it."""

    value: str
    reason: str


def choose_device(asked: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means on this machine.

    Raises:
        ConfigError: CUDA was asked for and does not exist.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(asked)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {asked!r} was asked for, but torch {torch.__version__} sees no GPU; use device=cpu")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device: {asked!r} does not exist; this machine has cuda:0 to cuda:{count - 1}")
    return device


def describe_device(device: torch.device) -> str:
    """The name of the chip."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_capabilities().get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process held so far: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gpu_room(device: torch.device) -> int | None:
    """The bytes that tensors may hold on a GPU, with those that they hold already; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def limit_gpu(device: torch.device, fraction: float) -> None:
    """Let tensors on a GPU take a fraction of the memory that is free there; on the CPU nothing changes."""
    room = gpu_room(device)
    if room is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, fraction * room / total), device)


_cushion: list[mmap.mmap] = []


def hold_cushion() -> None:
    """Keep address space, less than glibc takes at a time, for the code of other kernels once memory has ended."""
    with suppress(OSError):
        _cushion[:] = [mmap.mmap(-1, 3 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)]


def release_memory(device: torch.device) -> None:
    """Release memory that is reserved and unused, for tensors of other sizes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (libc := _glibc()) is not None:
        libc.malloc_trim(0)
        _cushion.clear()


def forget_peak(device: torch.device) -> None:
    """Measure the peak memory of the GPU from this call on; that of the CPU cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def cpu_capabilities() -> dict[str, object]:
    """Capabilities of the processor, by torch's names; empty if torch does not know them."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return dict(ask()) if ask is not None else {}


def choose_precision(asked: str, device: torch.device) -> Choice:
    """The number format for `auto`, or the requested one if the device has it.

    Raises:
        ConfigError: the device cannot compute in it.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        has_bf16 = capability >= (8, 0)
        if asked == "auto":
            return Choice("bf16", "this GPU computes bf16") if has_bf16 else Choice("fp16", "this GPU has no bf16")
        if asked in ("bf16", "tf32") and not has_bf16:
            raise ConfigError(
                f"precision: {asked!r} needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}; "
                "use precision=fp16"
            )
        return Choice(asked, "asked for")
    if asked == "auto":
        if limit := _limit_below_bf16():
            return Choice("fp32", f"{limit} leaves this CPU no bf16 units")
        has = cpu_capabilities()
        if has.get("avx512_bf16") or has.get("amx_bf16"):
            return Choice("bf16", "this CPU computes bf16")
        if has.get("bf16") or has.get("sve_bf16"):  # of ARM
            return Choice("fp32", "the bf16 of this kind of CPU is untried; precision=bf16 uses it")
        return Choice("fp32", "this CPU has no bf16 units")
    if asked == "tf32":
        raise ConfigError("precision: 'tf32' exists on CUDA only; use precision=fp32 or precision=auto")
    return Choice(asked, "asked for")


def _limit_below_bf16() -> str:
    """The limit of the user on oneDNN that leaves it no bf16; empty without one.

    A product in bf16 is then emulated: 7.9 GFLOP/s instead of 69 in fp32 with AVX2, 18 instead of 170 with AVX512_CORE
    (512 x 512 values, one thread of an Intel Xeon with AMX).
    """
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if os.environ.get(name, "").upper() in _WITHOUT_BF16:
            return f"{name}={os.environ[name]}"
    return ""


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[None]]:
    """Return a function that returns a new context for one forward pass."""
    if precision in ("fp32", "tf32"):
        return nullcontext
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype)


def configure(device: torch.device, precision: str, *, deterministic: bool) -> list[str]:
    """Set torch's switches for this process; return a line for each that people should know."""
    said = []
    if deterministic:
        # cuBLAS reads this when the first product is computed; without it torch refuses to be deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # With warn_only, the fused attention of CUDA would stay as it is, and a repeated step give other bits.
    torch.use_deterministic_algorithms(deterministic)
    # torch would also write NaN into every new tensor, in case a program reads what it never wrote: 5 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not in torch's stubs
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    # Its attention makes a plan for each new shape, and masks of patches change theirs with every batch.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cuda":
        if device.index is not None:  # `cuda` is the current one
            torch.cuda.set_device(device)  # else page-locked memory takes a context, 500 MB, on the first GPU
        torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    elif _keep_freed_memory():
        said.append("freed memory is kept for the next step (glibc)")
    has_onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    through_onednn = has_onednn and precision == "fp32" and onednn_keeps_fp32()
    # Set either way: no run may depend on those before it in the same process.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if through_onednn else "none"  # type: ignore[attr-defined]  # not in torch's stubs
    if through_onednn:
        said.append("fp32 matrix products through oneDNN, checked to be full fp32 on this chip")
    return said


def _keep_freed_memory() -> bool:
    """Let glibc keep freed memory; False if this system has no glibc.

    By default it returns large blocks to the kernel and takes new zeroed pages at every step, which costs up to a sixth
    of the time of a convolutional network.
    """
    libc = _glibc()
    if libc is None:
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the numbers of malloc.h
    mallopt = libc.mallopt
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 1 << 30) and mallopt(top_pad, 1 << 28))


def _glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc, which lets a program say how much freed memory is kept."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def onednn_keeps_fp32() -> bool:
    """True if oneDNN computes fp32 products in fp32 even when it is allowed to use bf16.

    On chips without AMX it does, and is about twice as fast as torch's default; with AMX it rounds to bf16. A product
    shows it: the error of bf16 is 1e-3, that of a reordered fp32 sum 1e-6.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # not in torch's stubs
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    # An addmm, as Linear computes it: plain products do not take the switched path.
    product = torch.nn.functional.linear(a, b.T.contiguous())
    switch.fp32_precision = before
    return bool((product.double() - exact).abs().max() / exact.abs().max() < 1e-5)
