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


class TrainingError(OpsinError):
    """Training cannot go on, for a reason that the message states."""


class Diverged(TrainingError):
    """Losses are not finite any more, or rollbacks do not help: the last states are not worth a checkpoint."""


class TransientError(TrainingError):
    """Something that training needs failed: a disk, a process. Only here may another attempt succeed."""


class WorkerEnded(TransientError):
    """A process that reads images ended by itself."""
