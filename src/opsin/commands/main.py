"""The command line. torch is imported by the commands that need it, after the arguments are read."""

import argparse
import io
import os
import resource
import sys
from collections.abc import Sequence

from opsin.__version__ import __version__
from opsin.commands import backup, check, checkpoints, data, plan, recipes, runs, sweep, train, tune
from opsin.commands import eval as evaluate
from opsin.errors import ConfigError, OpsinError, TrainingError, TransientError, is_out_of_memory

_LEAST_BYTES = 3 * 2**29
"""Memory below which torch is not loaded: in 1.25 GiB its libraries abort the process in an update (measured)."""
_WITHOUT_TORCH = ("runs", "restore", "backup")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status (0 done, 2 wrong input, 3 stopped, 4 training failed)."""
    _mend_streams()
    arguments = _arguments(argv)
    # A broken pipe is success for listings and failure for training.
    unread = 4 if arguments.command in ("train", "resume") else 0
    try:
        _check_limits(arguments.command)
        status: int = arguments.run(arguments) or 0
        unread = status
        sys.stdout.flush()
    except OpsinError as error:
        if isinstance(error, TrainingError) and not isinstance(error, TransientError):
            from opsin.processes.trail import Trail

            Trail.from_environment().verdict(str(error))
        status = _fail(error.exit_status, *error.faults)
    except KeyboardInterrupt as error:
        # An interrupt that went through exec, as in some imports, makes Python die of SIGINT at exit: exec forgets it.
        exec("")
        goes_on = "the same command begins again, from the newest checkpoint where there is one"
        status = _fail(3, f"{str(error) or 'SIGINT'}: stopped before the end; {goes_on}")
    except BrokenPipeError:
        status = unread
    except Exception as error:
        status = _fail(4, _explain(error))
    _flush_output()
    return status


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="opsin", description="Train vision models from one YAML recipe.")
    parser.add_argument("--version", action="version", version=f"opsin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (train, check, plan, evaluate, runs, checkpoints, backup, recipes, tune, sweep, data):
        group.add_commands(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        # argparse takes positionals in one piece: of `train RECIPE --out DIR key=value` it leaves the last.
        if "overrides" not in arguments or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    return arguments


def _fail(status: int, *faults: str) -> int:
    for fault in faults:
        print(f"opsin: {fault}", file=sys.stderr)
    return status


def _mend_streams() -> None:
    """Let a stream that the caller closed take everything, and one with few letters show the others as `?`."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # for as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _explain(error: Exception) -> str:
    """One line for an error that is not an `OpsinError`; the traceback comes before it if the cause is unknown."""
    if is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"out of memory ({reason}): raise the limit of this process (ulimit -d, -v or -u, the memory of the "
            "container), or close other programs; saved steps are kept, and the same command goes on from them"
        )
    if isinstance(error, OSError):
        return str(error)
    import traceback

    traceback.print_exception(error)
    return "the above is a fault of opsin or of your own code, not of the recipe; saved steps are kept"


def _check_limits(command: str) -> None:
    """Refuse a limit on memory in which libraries of torch wait for ever when they load, or abort the process.

    Raises:
        ConfigError: the limit is below `_LEAST_BYTES`, and the command needs torch.
    """
    for name, flag in (("RLIMIT_DATA", "-d"), ("RLIMIT_AS", "-v")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and limit < _LEAST_BYTES and command not in _WITHOUT_TORCH:
            raise ConfigError(
                f"ulimit {flag} {limit // 1024}: opsin {command} cannot work in {limit // 2**20} MiB; it "
                f"needs {_LEAST_BYTES // 2**20} MiB for torch alone: raise the limit, 4 GiB if in doubt"
            )


def _flush_output() -> None:
    """Write the rest, unless nobody takes it (`opsin runs | head`), of which Python would complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
