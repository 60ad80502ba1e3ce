"""Everything opsin raises for a user to read.

OpsinError
├── ConfigError       the recipe or the command line is wrong                   exit status 2
├── DataError         the images or their lists cannot be used                  exit status 2
├── RunError          the run directory cannot be used as asked                 exit status 2
│                     (LockLost: another process has taken it over)
├── CheckpointError   a checkpoint or a weights file cannot be loaded           exit status 2
├── Stopped           a signal or the time limit ended the run, all is saved    exit status 3
└── TrainingError     training itself failed (Diverged: not finite any more;    exit status 4
                      TransientError: something it needs failed, which may pass)

Each fault is one line: where it is, the value, the rule, the way out.
"""

import re
import sys


class OpsinError(Exception):
    """A fault that a user can act on. `faults` has one line per fault."""

    exit_status = 4

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class ConfigError(OpsinError):
    """A recipe, a key or a command-line argument is wrong."""

    exit_status = 2


class DataError(OpsinError):
    """Images, labels or lists cannot be used."""

    exit_status = 2


class RunError(OpsinError):
    """A run directory cannot be written, or holds something else than asked for."""

    exit_status = 2


class LockLost(RunError):
    """Another process has taken over the run directory: this one must not write there any more."""


class CheckpointError(OpsinError):
    """A checkpoint or weights file is damaged, too new, or does not fit."""

    exit_status = 2


class Stopped(OpsinError):
    """A signal or the time limit ended the run; a checkpoint of this step is on disk."""

    exit_status = 3


class StoppedWaiting(Stopped):
    """A stop was requested while images were awaited. `reason` is that of the request."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}: stopped while waiting for images; the same command begins again, from the newest checkpoint "
            "where there is one"
        )
        self.reason = reason


class TrainingError(OpsinError):
    """Training cannot go on, for a reason that the message states."""


class Diverged(TrainingError):
    """Losses are not finite any more, or rollbacks do not help: the last states are not worth a checkpoint."""


class TransientError(TrainingError):
    """Something that training needs failed: a disk, a process. Only here may another attempt succeed."""


class WorkerEnded(TransientError):
    """A process that reads images ended by itself."""


_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "_ALLOC_FAILED",
    "_ALLOCATION_FAILED",
    "std::bad_alloc",
    "can't start new thread",
    "failed to map segment",
    "annot allocate memory",
)
"""Signs in the text of an error: of torch on the CPU; of the driver; of cuBLAS, cuDNN and the like, which allocate
memory without torch; of the C++ library; of threads without a stack; of libraries that cannot be loaded."""
_NO_PRIMITIVE = re.compile(r"could not create a primitive(?! descriptor)")
"""oneDNN's words for a lack of memory; without a descriptor an operation is not supported."""


_NO_ENGINE = "unable to find an engine to execute this computation"
"""The words for a convolution after each engine of cuDNN has failed, for whatever reason: a lack of memory is one."""
_FULL = 0.05
"""Free share of a GPU below which such an engine lacks memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` reports that no memory is left, on the GPU or the host."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    text = str(error)
    is_sign = any(sign in text for sign in _NO_MEMORY) or _NO_PRIMITIVE.search(text) is not None
    is_sign = is_sign or (_NO_ENGINE in text and _is_gpu_full())
    return is_sign and isinstance(error, RuntimeError | ImportError | OSError)


def _is_gpu_full() -> bool:
    torch = sys.modules.get("torch")  # whose error this is; these classes are needed where torch is not
    if torch is None or not torch.cuda.is_initialized():
        return False
    free, total = torch.cuda.mem_get_info()
    return bool(free < _FULL * total)
