"""Threads that compute: their number, and how they wait for each other."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from opsin.errors import ConfigError
from opsin.processes.cores import num_allowed
from opsin.processes.load import Usage
from opsin.processes.openmp import find_waiting_threads
from opsin.run.recipe import read
from opsin.run.threads import Watch, choose_threads, computing
from tests.story import Story

CPU = torch.device("cpu")


def test_the_number_of_the_environment_counts_and_a_recipe_counts_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads("auto") == torch.get_num_threads()
    assert choose_threads(3) == 3


def test_without_one_the_quota_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("opsin.run.threads.num_cores", lambda: 3)
    assert choose_threads("auto") == 3
    monkeypatch.setattr("opsin.run.threads.num_cores", lambda: 64)
    assert choose_threads("auto") == 8, "torch counts two threads of one core once"


def test_the_number_holds_inside_and_is_put_back() -> None:
    before, story = torch.get_num_threads(), Story()
    with computing(before + 1, CPU, story):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    [line] = story.notices
    assert line.startswith(f"threads: {before + 1} of {num_allowed()} cores; ")


def test_one_thread_needs_no_line() -> None:
    story = Story()
    with computing(1, CPU, story):
        pass
    assert story.notices == []


@pytest.mark.parametrize("text", ["threads=0", "threads=-1", "threads=1.5", "threads=many", "threads=100000"])
def test_a_number_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="threads"):
        read("quickstart", [text])


def moments(*others: float) -> list[Usage]:
    """A look each two seconds, between which other programs use that many cores and this process one."""
    found = [Usage(0.0, 0.0, 0.0, 0.0)]
    for cores in others:
        last = found[-1]
        found.append(Usage(last.at_s + 2, last.busy_s + 2 * (cores + 1), last.own_s + 2, last.waited_s + cores))
    return found


def test_threads_sleep_while_others_need_the_cores_and_spin_after_some_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    waiting = find_waiting_threads(num_allowed())
    if waiting is None:
        pytest.skip("this torch computes with another library than libgomp")
    watch = Watch(num_allowed(), Story(), waiting)
    found = []
    for before, now in pairwise(moments(0.0, 1.0, 0.1, 0.0, 0.0, 0.0, 1.0)):
        watch.see(now, before)
        found.append(waiting.sleeps)
    watch.end()
    assert found == [False, True, True, True, True, False, True]
    assert not waiting.sleeps


def test_cores_without_a_thread_are_left_to_others() -> None:
    waiting = find_waiting_threads(num_allowed())
    if waiting is None or num_allowed() < 2:
        pytest.skip("needs libgomp and two cores")
    watch = Watch(num_allowed() - 1, Story(), waiting)
    before, now = moments(1.0)
    watch.see(now, before)
    assert not waiting.sleeps


def test_other_programs_are_reported_once_after_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.run.threads.family_s", lambda: 0.0)
    story = Story()
    watch = Watch(num_allowed(), story, None)
    for count, (before, now) in enumerate(pairwise(moments(*[1.0] * 8)), 1):
        watch.see(now, before)
        assert len(story.notices) == (count >= 6)
    [line] = story.notices
    assert line.startswith(f"other programs take {1 / num_allowed():.0%} of this machine's {num_allowed()} cores: ")


def test_workers_of_the_run_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter(range(0, 100, 2))
    monkeypatch.setattr("opsin.run.threads.family_s", lambda: float(next(used)))
    story = Story()
    watch = Watch(num_allowed(), story, None)
    for before, now in pairwise(moments(*[1.0] * 8)):
        watch.see(now, before)
    assert story.notices == []


SAME_BITS = """
import time
import torch
from opsin.processes.openmp import find_waiting_threads

torch.set_num_threads(2)
numbers = torch.arange(3_000_000, dtype=torch.float32).sin_()
waiting = find_waiting_threads(2)

def used():
    begun = time.process_time()
    for _ in range(100):
        numbers[:100_000] + 1
        time.sleep(0.003)
    return time.process_time() - begun

if waiting is None:
    print("none")
else:
    sums, times = [], []
    for change in (waiting.spin, waiting.sleep) * 3:
        change()
        sums.append(float(numbers.sum()))
        times.append(used())
    print(len(set(sums)), sum(times[1::2]) < sum(times[::2]))
"""


def test_sleeping_threads_use_less_of_the_cores_and_compute_the_same_bits(opsin_env: dict[str, str]) -> None:
    environment = {name: value for name, value in opsin_env.items() if "NUM_THREADS" not in name}
    command = [sys.executable, "-c", SAME_BITS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    if done.stdout == "none\n":
        pytest.skip("this torch computes with another library than libgomp")
    assert done.stdout == "1 True\n"
