import pytest

from opsin.errors import ConfigError
from opsin.processes.world import World, join


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() == World(rank=0, size=1)


def test_several_processes_are_refused_before_they_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=4: .*start it without torchrun"):
        join()
