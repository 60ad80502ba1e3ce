"""What happens to a training in real life. A fault disturbs a run, is gone when it returns, and gives an exit status.

The status is that of the disturbed process, negative where a signal ended it. Whether the run is whole in the end is
not asked here. A fault that the run has felt says so (`Case.strike`): chance may bring one too late, or to a place
where nobody looks.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from chaos_conditions import clock_jumps, disk_may_fill, files_end_at, syncs_take, writes_fail
from chaos_runs import STEPS, Case, Training, said
from opsin.commands.verify import digest, train_killed
from opsin.reporting.journal import read_events
from opsin.storage.directory import RunDirectory
from opsin.storage.listing import last_step
from opsin.training.checkpoints.format import find_checkpoints
from tests.chaos.killed_runs import descendants
from tests.s3_server import BUCKET, S3Server

Fault = Callable[[Case], int]

_TMPFS_BYTES = 8 << 20
_IN_CHECKPOINT = 0.5
"""How much of the damage falls into the newest checkpoint."""
_SAVED = 5
"""After so many steps more a checkpoint was due, which is copied at once."""
_BACKUP_WAIT_S = 5.0
_STALL_S = 40.0
"""Longer than the rest of a training and what is waited for a backup at its end, shorter than a request to a server."""


def sigkill(case: Case) -> int:
    """One to three SIGKILLs; every second one waits for a checkpoint write."""
    kills = case.draw.randint(1, 3)
    for kill in train_killed(case, case.run, STEPS, kills, case.draw):
        case.strike()
        case.tell(f"killed {kill}")
    return 0


def sigterm(case: Case) -> int:
    """SIGTERM, SIGINT or SIGUSR1 in a step."""
    process = case.start()
    number = case.draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    case.tell(f"{number.name} after step {case.reach(process)}")
    process.send(number)
    in_time = (last_step(case.run.metrics) or 0) < STEPS - 2  # looked at afterwards: at least so early it was
    if status := process.wait():
        case.strike()
    elif in_time:
        case.proofs.append(lambda: f"{number.name} was not heard")
    return status


def full_disk(case: Case) -> int:
    """Another program fills the disk, and leaves room again later or only after the end."""
    folder = case.run.path
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_BYTES}", "opsin-chaos", str(folder)], check=True)
    case.cleanup.callback(subprocess.run, ["umount", "-l", str(folder)], check=False)
    process = case.start(disk_may_fill(folder, case.undisturbed.largest_bytes))
    ballast, began_s = folder / ".ballast", time.monotonic()
    first = case.reach(process, last=STEPS // 2)
    so_far_s = time.monotonic() - began_s
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    left = case.draw.choice([0, 1, 4, 16, 64]) * 4096
    os.truncate(ballast, max(0, ballast.stat().st_size - left))
    case.tell(f"after step {first} {left} bytes were free")
    if case.draw.random() < 0.5:
        # By the clock: a journal that finds no room does not tell how far the run is.
        share = case.draw.uniform(0.0, 1.5)
        time.sleep(share * so_far_s)
        case.tell(f"room again after {share:.2f} of the time so far")
        ballast.unlink()
    status = process.wait()
    ballast.unlink(missing_ok=True)
    return status


def write_error(case: Case) -> int:
    """Writes of the run end with EIO, some of them or all from one on."""
    first, count = 1 + int(case.draw.random() * case.undisturbed.writes), case.draw.choice([1, 5, 40, 10**9])
    case.tell(f"EIO from write {first} on, {count} times")
    return case.start(writes_fail(case.run.path, first, count)).wait()


def file_limit(case: Case) -> int:
    """No file may grow beyond a size, as with a quota."""
    size_bytes = int(case.draw.choice([0.01, 0.05, 0.2, 0.6, 0.99]) * case.undisturbed.largest_bytes)
    case.tell(f"files end at {size_bytes} bytes")
    return case.start(files_end_at(size_bytes)).wait()


def corrupt_newest(case: Case) -> int:
    """A file of the newest checkpoint is full of nonsense, empty or gone."""
    _leave_unfinished(case)
    newest = list(find_checkpoints(case.run.checkpoints).values())[-1]
    victim = case.draw.choice(sorted(newest.iterdir()))
    content = case.draw.choice([None, b"", case.draw.randbytes(victim.stat().st_size)])
    victim.unlink() if content is None else victim.write_bytes(content)
    case.tell(f"{newest.name}/{victim.name} {'gone' if content is None else f'{len(content)} bytes of nonsense'}")
    return case.start().wait()


def flipped_byte(case: Case) -> int:
    """One byte of a checkpoint is another."""
    _leave_unfinished(case)
    victim = case.draw.choice(_files(case.run.checkpoints))
    data = bytearray(victim.read_bytes())
    place = case.draw.randrange(len(data))
    data[place] ^= case.draw.randint(1, 255)
    victim.write_bytes(data)
    case.tell(f"{victim.relative_to(case.run.path)}: byte {place}")
    return case.start().wait()


def truncated_file(case: Case) -> int:
    """A file of the run is cut off; where the run is refused because of it, it is brought back afterwards."""
    _leave_unfinished(case)
    run = case.run
    others = [
        path for path in (run.run_json, run.recipe, run.summary, run.events, run.path / "log.txt") if path.exists()
    ]
    of_checkpoints = case.draw.random() < _IN_CHECKPOINT
    victim = case.draw.choice(_files(run.checkpoints) if of_checkpoints else others)
    data = victim.read_bytes()
    length = case.draw.randrange(len(data))
    os.truncate(victim, length)
    case.tell(f"{victim.relative_to(run.path)}: {length} of {len(data)} bytes are left")
    status = case.start().wait()
    if status > 0:
        victim.write_bytes(data)
    return status


def clock_jump(case: Case) -> int:
    """The clock of the day leaps by seconds to years, in the middle of a run that is also killed."""
    shift_s = case.draw.choice([-1, 1]) * case.draw.choice([1.0, 3600.0, 86400.0, 3e7])
    after = case.draw.randint(0, 60)
    case.tell(f"the clock leaps by {shift_s:+g} s when it is asked for time number {after}")
    process = case.start(clock_jumps(shift_s, after))
    if case.draw.random() < 0.5:
        return process.wait()
    case.tell(f"killed after step {case.reach(process)}")
    process.kill()
    return process.wait()


def worker_killed(case: Case) -> int:
    """A process that reads images, or the one that they are forked from, is killed."""
    case.overrides += ("data.resident=false", f"data.workers={case.draw.randint(1, 2)}")
    process = case.start()
    reached = case.reach(process)
    victims = sorted(descendants(process.pid))
    if victims:
        victim = case.draw.choice(victims)
        with suppress(OSError):
            case.tell(f"killed after step {reached}: {Path(f'/proc/{victim}/cmdline').read_text()[-60:]!r}")
            os.kill(victim, signal.SIGKILL)
            case.strike()
    return process.wait()


def slow_disk(case: Case) -> int:
    """Each fsync takes long, and half of the runs are killed."""
    delay_s = case.draw.choice([0.01, 0.05, 0.2])
    case.tell(f"each fsync takes {delay_s} s longer")
    process = case.start(syncs_take(delay_s))
    if case.draw.random() < 0.5:
        case.tell(f"killed after step {case.reach(process)}")
        process.kill()
    return process.wait()


def backup_gone(case: Case) -> int:
    """The folder of the backup is away for a while; half of the runs are killed."""
    place, away = case.folder / "disk", case.folder / "away"
    place.mkdir()
    case.overrides += (f"backup.path={place / 'copy'}", f"backup.wait={_BACKUP_WAIT_S:g}")
    process = case.start()
    first = case.reach(process, last=STEPS // 2)
    place.rename(away)
    _strikes_if_alive(case, process)
    last = case.reach(process, first + _SAVED, STEPS - 1)
    if case.draw.random() < 0.5:
        case.tell(f"away from step {first} to {last}")
        _bring_back(away, place)
    else:
        case.tell(f"away from step {first} on")
    if case.draw.random() < 0.5:
        process.kill()
        case.tell(f"killed after step {last}")
    status = process.wait()
    _bring_back(away, place)
    case.proofs.append(partial(_is_copied, case, str(place / "copy")))
    return status


def s3_gone(case: Case) -> int:
    """The server of the backup hangs, taking connections and never answering, or dies and forgets what it held."""
    server = S3Server()
    case.cleanup.callback(server.kill)
    case.environment.update(server.environment)
    address = f"s3://{BUCKET}/run"
    case.overrides += (f"backup.path={address}", f"backup.wait={_BACKUP_WAIT_S:g}")
    case.proofs.append(partial(_is_copied, case, address))
    process = case.start()
    first = case.reach(process, last=STEPS - 1 - _SAVED)
    leave, come_back, what = case.draw.choice(
        [(server.kill, server.start, "away"), (server.pause, server.go_on, "silent")]
    )
    leave()
    began_s = time.monotonic()
    _strikes_if_alive(case, process)
    if case.draw.random() < 0.5:
        case.tell(f"server {what} from step {first} to {case.reach(process, first + _SAVED, STEPS)}")
        come_back()
        return process.wait()
    case.tell(f"server {what} from step {first} on")
    status = process.wait()
    if (took_s := time.monotonic() - began_s) > _STALL_S:
        case.proofs.append(lambda: f"with the server {what} the run took {took_s:.0f} s to its end")
    come_back()
    return status


def supervised_killed(case: Case) -> int:
    """The training below `--restarts 3` is killed; its supervisor goes on."""
    supervisor = case.opsin([*case.command(), "--restarts", "3"])
    reached = case.reach(supervisor)
    with suppress(OSError, ValueError):  # it has ended meanwhile
        child: int = json.loads((case.run.path / ".lock").read_text())["pid"]
        os.kill(child, signal.SIGKILL)
        case.strike()
        case.tell(f"killed after step {reached}")
    return supervisor.wait()


def rollback_killed(case: Case) -> int:
    """Some images are poison for a while: the run goes back and around them, and is killed two to four times."""
    first, length = case.draw.randint(15, STEPS - 12), case.draw.randint(5, 12)
    images = ",".join(str(case.draw.randrange(1000)) for _ in range(3))
    case.overrides += (
        "method.name=poisoned",
        f"method.steps=[{first},{first + length}]",
        f"method.images=[{images}]",
        "optim.schedule.warmup_epochs=0",
        "monitors.loss.action=rollback",
        "monitors.loss.patience=1",
        "guard.margin=3 steps",
        "guard.lr_for=10 steps",
        "guard.max_rollbacks=30",
    )
    twin = case.twin = RunDirectory(case.folder / "twin")
    status = case.opsin(case.command(twin)).wait()
    assert status == 0, "left alone"
    gone_back = [event.step for event in read_events(twin.events) if event.kind == "rollback"]
    case.tell(f"poison in images {images} from step {first} to {first + length}; went back to steps {gone_back}")
    kills = case.draw.randint(2, 4)
    for kill in train_killed(case, case.run, STEPS, kills, case.draw):
        case.tell(f"killed {kill}")
        if gone_back and kill.step >= min(gone_back):
            case.strike()
    case.proofs.append(partial(_same_rollbacks, case.run, twin))
    return 0


FAULTS: Mapping[str, Fault] = {
    fault.__name__: fault
    for fault in (
        sigkill,
        sigterm,
        full_disk,
        write_error,
        file_limit,
        corrupt_newest,
        flipped_byte,
        truncated_file,
        clock_jump,
        worker_killed,
        slow_disk,
        backup_gone,
        s3_gone,
        supervised_killed,
        rollback_killed,
    )
}


def _leave_unfinished(case: Case) -> None:
    """A run with two checkpoints at least that was killed or stopped."""
    process = case.start()
    number = case.draw.choice([signal.SIGKILL, signal.SIGTERM])
    case.tell(f"{number.name} after step {case.reach(process, 16)}")
    process.send(number)
    if process.wait():  # a run that is done reads no checkpoint
        case.strike()


def _strikes_if_alive(case: Case, process: Training) -> None:
    """For places that are gone until a checkpoint or the end of the run wants them."""
    if process.poll() is None:
        case.strike()


def _files(folder: Path) -> list[Path]:
    """Those of complete checkpoints that are not empty."""
    return sorted(path for path in folder.glob("step-*/*") if path.stat().st_size)


def _bring_back(away: Path, place: Path) -> None:
    if away.exists():
        shutil.rmtree(place, ignore_errors=True)
        away.rename(place)


def _is_copied(case: Case, address: str) -> str:
    """What is wrong with the backup of a finished run, once `opsin backup` has brought it up to date."""
    if case.opsin(["backup", str(case.run.path)]).wait():
        return f"opsin backup: {said(case)}"
    if case.opsin(["restore", address, str(case.folder / "restored")]).wait():
        return f"opsin restore: {said(case)}"
    return "" if digest(RunDirectory(case.folder / "restored")) == digest(case.run) else "the backup has other weights"


def _same_rollbacks(run: RunDirectory, twin: RunDirectory) -> str:
    own, wanted = ([event.facts for event in read_events(of.events) if event.kind == "rollback"] for of in (run, twin))
    return "" if own == wanted else f"other rollbacks than alone: {own} instead of {wanted}"
