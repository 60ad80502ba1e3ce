"""The commands of backups, and what `train` and `resume` take for a run directory in a bucket."""

import argparse
import os
import sys
from pathlib import Path

from opsin.errors import ConfigError, RunError


def add_commands(restore: argparse.ArgumentParser, backup: argparse.ArgumentParser) -> None:
    """The arguments of `opsin restore` and `opsin backup`."""
    restore.add_argument("url", metavar="URL", help="the backup: a folder, s3://BUCKET/FOLDER, gs://..., az://...")
    restore.add_argument("directory", type=_path, metavar="DIR", help="a new or empty folder")
    restore.add_argument("--step", type=int, metavar="N", help="the state of this step (default: the newest whole one)")
    restore.add_argument("--only", action="store_true", help="no earlier checkpoints: less to fetch")
    restore.set_defaults(run=_restore)
    backup.add_argument("directory", type=_path, metavar="DIR", help="run directory")
    backup.add_argument("url", nargs="?", metavar="URL", help="where to (default: backup.path of its recipe)")
    backup.set_defaults(run=_backup)


def take_local(command: argparse.ArgumentParser) -> None:
    """Give a command the option that goes with an address."""
    local = "with an address for DIR: the folder of the run on this machine (default: in ~/.cache/opsin/runs)"
    command.add_argument("--local", type=_path, metavar="FOLDER", help=local)


def out_of_train(arguments: argparse.Namespace) -> Path:
    """The run directory that `train` asks for; one in a bucket becomes a folder here that is copied there.

    Raises:
        OpsinError: as `find_elsewhere`, `begin_elsewhere`; or the overrides name another backup.
    """
    wanted = arguments.out or os.path.join("runs", Path(arguments.recipe).stem)
    from opsin.storage.backup.elsewhere import begin_elsewhere, find_elsewhere
    from opsin.storage.directory import spelled_out

    run = find_elsewhere(wanted, arguments.local)
    if run is None:
        return spelled_out(_path(wanted))
    named = [text for text in arguments.overrides if text.startswith(("backup=", "backup.path="))]
    if named:
        raise ConfigError(f"command line: {named[0]} and --out {run.url} both say where the run is copied; give one")
    begin_elsewhere(run, say=_aside)
    arguments.overrides.append(f"backup.path={run.url}")
    if not arguments.quiet:
        print(f"run directory: {run.folder} (another one: --local FOLDER), copied to {run.url}", flush=True)
    return run.folder


def directory_of_resume(arguments: argparse.Namespace) -> Path:
    """The run directory that `resume` asks for; one in a bucket is fetched where it is not here.

    Raises:
        OpsinError: as `find_elsewhere`, `fetch_elsewhere`.
    """
    from opsin.storage.backup.elsewhere import fetch_elsewhere, find_elsewhere

    run = find_elsewhere(arguments.directory, arguments.local)
    if run is None:
        return _path(arguments.directory)
    fetch_elsewhere(run, say=_aside)
    return run.folder


def _restore(arguments: argparse.Namespace) -> int:
    from opsin.storage.backup.elsewhere import at_step
    from opsin.storage.backup.restore import restore

    folder = arguments.directory
    found = restore(arguments.url, folder, step=arguments.step, only=arguments.only, say=_aside)
    size = f"{found.num_files} files, {found.num_bytes / 2**20:.1f} MiB fetched"
    print(f"{folder}: restored {at_step(found.step)} ({size}); opsin resume {folder} goes on")
    return 0


def _backup(arguments: argparse.Namespace) -> int:
    from opsin.storage.backup.service import backup_of, finish_backup
    from opsin.storage.directory import RunDirectory

    folder = arguments.directory
    if not RunDirectory(folder).exists():
        raise RunError(f"{folder}: holds no run")
    config = backup_of(folder, arguments.url)
    if config is None:
        raise ConfigError(f"{folder}: its recipe names no backup; say where to: opsin backup {folder} URL")
    with RunDirectory.locked(folder):
        faults = finish_backup(config, folder, say=_aside)
    if faults:
        left = f"{len(faults)} checkpoint{'s'[: len(faults) > 1]}"
        raise RunError(f"{folder}: all but {left} went to {config.path}; what cannot be sent is told above")
    print(f"{folder}: all is in {config.path}")
    return 0


def _aside(text: str) -> None:
    print(f"opsin: {text}", file=sys.stderr, flush=True)


def _path(text: str | Path) -> Path:
    return Path(os.path.expanduser(text))
