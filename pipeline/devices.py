"""What this machine computes with: its device, its cores, its memory. Knows nothing of training."""

from __future__ import annotations

import contextlib
import ctypes

import torch

from pipeline.config import Settings, VaesweepError
from pipeline.grid import Runtime

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def find_runtime(settings: Settings) -> Runtime:
    """The device that `device: auto|cpu|cuda` means here, and the torch that runs on it. Raises VaesweepError."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise VaesweepError("params.yaml: device: is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'")
    device = "cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu"
    if settings.precision == "bf16" and not _multiplies_bf16(device):
        raise VaesweepError(f"params.yaml: precision: is 'bf16', but this {device.upper()} has no bf16 products; use 'float32'")
    return Runtime(device=device, torch=torch.__version__, precision=settings.precision)


def _multiplies_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def workers(device: str) -> int:
    """Stacks that train at once: one a CPU core (`OMP_NUM_THREADS` sets another number), one on a GPU."""
    return torch.get_num_threads() if device == "cpu" else 1


def keep_freed_memory() -> None:
    """Has glibc reuse what it frees: giving it back costs a page fault every 4 KB, a tenth to a third of training."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def out_of_memory(error: RuntimeError) -> bool:
    """torch raises OutOfMemoryError on a GPU only; on the CPU its allocator says so in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
