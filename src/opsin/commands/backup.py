"""`opsin restore` and `opsin backup`: a run from its second copy, and to it."""

import argparse

from opsin.commands.arguments import Commands, path
from opsin.errors import ConfigError, RunError


def add_commands(commands: Commands) -> None:
    """Add `restore` and `backup`."""
    restore = commands.add_parser("restore", help="get a run back from its backup")
    restore.add_argument("url", metavar="URL", help="the backup: a folder, s3://BUCKET/FOLDER, gs://..., az://...")
    restore.add_argument("directory", type=path, metavar="DIR", help="a new or empty folder")
    restore.add_argument("--step", type=int, metavar="N", help="the state of this step (default: the newest whole one)")
    restore.add_argument("--only", action="store_true", help="no earlier checkpoints: less to fetch")
    restore.set_defaults(run=_restore)
    backup = commands.add_parser("backup", help="bring the backup of a run up to date")
    backup.add_argument("directory", type=path, metavar="DIR", help="run directory")
    backup.add_argument("url", nargs="?", metavar="URL", help="where to (default: backup.path of its recipe)")
    backup.set_defaults(run=_backup)


def _restore(arguments: argparse.Namespace) -> None:
    from opsin.reporting.teller import CommandTeller
    from opsin.storage.backup.restore import restore

    folder = arguments.directory
    found = restore(arguments.url, folder, CommandTeller("opsin: "), step=arguments.step, only=arguments.only)
    size = f"{found.num_files} files, {found.num_bytes / 2**20:.1f} MiB fetched"
    print(f"{folder}: restored {found.at_step()} ({size}); opsin resume {folder} goes on")


def _backup(arguments: argparse.Namespace) -> None:
    from opsin.reporting.teller import CommandTeller
    from opsin.storage.backup.service import backup_of, finish_backup
    from opsin.storage.directory import RunDirectory

    folder = arguments.directory
    if not RunDirectory(folder).exists():
        raise RunError(f"{folder}: holds no run")
    config = backup_of(folder, arguments.url)
    if config is None:
        raise ConfigError(f"{folder}: its recipe names no backup; name one: opsin backup {folder} URL")
    with RunDirectory.locked(folder):
        faults = finish_backup(config, folder, CommandTeller("opsin: "))
    if faults:
        left = f"{len(faults)} checkpoint{'s'[: len(faults) > 1]}"
        raise RunError(f"{folder}: all but {left} went to {config.path}; the reasons are listed above")
    print(f"{folder}: all is in {config.path}")
