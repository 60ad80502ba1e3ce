"""Memory that ends in the middle of training: smaller parts, the same update, and the same again after a resume."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from opsin.clock.schedule import Constant
from opsin.errors import RunError, TrainingError
from opsin.nn.heads import Classifier
from opsin.reporting.journal import read_events
from opsin.run.session import resume_run
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.memory import PartFallback
from opsin.training.optim import SGD, build_optimizer
from opsin.training.state import TrainState
from opsin.training.step import train_step
from tests.digits_run import CONVNET, SMALL_VIT, STEPS_PER_EPOCH, train_digits
from tests.story import Record
from tests.unit.training.test_step import Small, batch_of, copy_of, plan_for

pytestmark = pytest.mark.usefixtures("torch_switches")
CONFIG = SGD(lr=0.1, schedule=Constant())


@contextmanager
def memory_for(images: int, *, after_calls: int = 0) -> Iterator[None]:
    """Classifiers that learn hold so many images at a time, as on a small GPU; after so many calls."""
    calls = 0

    def check(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal calls
        if isinstance(layer, Classifier) and layer.training:
            calls += 1
            if calls > after_calls and len(inputs[0]) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    hook = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


class Cramped(Small):
    """The small method on a device that holds `images` at a time."""

    def __init__(self, images: int, *, error: Exception, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__(norm=norm, dropout=dropout)

        def check(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if len(inputs[0]) > images:
                raise error

        self.second.register_forward_pre_hook(check)  # after batch norm: what it has counted is taken back


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("could not create a primitive"),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", ERRORS, ids=range(len(ERRORS)))
def test_an_update_that_was_split_equals_the_one_that_was_asked_for_in_these_parts(
    tmp_path: Path, error: Exception
) -> None:
    record = Record()
    fallback = PartFallback(tmp_path / "splits.json", teller=record)
    states = []
    for method, changes in (
        (Small(norm=True, dropout=0.5), {"accumulate": 4}),
        (Cramped(8, error=error, norm=True, dropout=0.5), {"fallback": fallback}),
    ):
        state = TrainState(method, build_optimizer(CONFIG, method), step=3)
        train_step(state, batch_of(32), plan_for(method, CONFIG, **changes))
        states.append(copy_of(state))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert [facts["images_at_once"] for _, facts in record.events] == [16, 8]
    assert record.events[-1][1]["accumulate"] == 4
    again = PartFallback(tmp_path / "splits.json")
    assert [again.factor(step) for step in (0, 2, 3, 4)] == [1, 1, 4, 4]


def test_one_image_that_is_too_large_ends_the_update_and_leaves_the_state_whole(tmp_path: Path) -> None:
    method = Cramped(0, error=ERRORS[0])
    state = TrainState(method, build_optimizer(CONFIG, method))
    before = copy_of(state)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(state, batch_of(6), plan_for(method, CONFIG, fallback=PartFallback(tmp_path / "splits.json")))
    assert all(torch.equal(a, b) for a, b in zip(copy_of(state), before, strict=True))


def test_splits_that_did_not_help_are_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "splits.json"
    assert PartFallback(file).double(0, parts=1, images=6)
    record = Record()
    fallback = PartFallback(file, teller=record)
    method = Cramped(0, error=ERRORS[0])
    state = TrainState(method, build_optimizer(CONFIG, method))
    with pytest.raises(torch.OutOfMemoryError):
        train_step(state, batch_of(6), plan_for(method, CONFIG, fallback=fallback))
    assert [PartFallback(file).factor(step) for step in (0, 1)] == [2, 2], "as it was before this update"
    assert record.warnings[-1].endswith("one image at a time: the smaller parts of this step are taken back")


@pytest.mark.parametrize("text", ["shapes differ", "could not create a primitive descriptor for a convolution"])
def test_other_errors_are_not_mistaken_for_a_lack_of_memory(tmp_path: Path, text: str) -> None:
    method = Cramped(8, error=RuntimeError(text))
    state = TrainState(method, build_optimizer(CONFIG, method))
    with pytest.raises(RuntimeError, match=text):
        train_step(state, batch_of(32), plan_for(method, CONFIG, fallback=PartFallback(tmp_path / "splits.json")))
    assert not (tmp_path / "splits.json").exists()


@pytest.mark.parametrize("free", [0.01, 0.5])
@pytest.mark.parametrize("kind", ["GET was", "FIND was"])
def test_a_convolution_without_an_engine_lacks_memory_if_the_gpu_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, free: float
) -> None:
    """cuDNN hides the lack of memory of each engine that it tries."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**34), 2**34))
    method = Cramped(8, error=RuntimeError(f"{kind} unable to find an engine to execute this computation"))
    state = TrainState(method, build_optimizer(CONFIG, method))
    plan = plan_for(method, CONFIG, fallback=PartFallback(tmp_path / "splits.json"))
    if free > 0.05:
        with pytest.raises(RuntimeError, match="unable to find an engine"):
            train_step(state, batch_of(32), plan)
    else:
        assert train_step(state, batch_of(32), plan).applied == 1
    assert (tmp_path / "splits.json").exists() == (free <= 0.05)


def test_what_cannot_be_written_down_is_told_once_and_written_later(tmp_path: Path) -> None:
    record = Record()
    file = tmp_path / "run" / "splits.json"
    fallback = PartFallback(file, teller=record)
    assert fallback.double(5, parts=1, images=8)
    assert [fallback.factor(step) for step in (5, 6)] == [2, 2]
    assert record.kinds == ["splits_unwritten", "out_of_memory"]
    file.parent.mkdir()
    assert fallback.factor(7) == 2
    assert PartFallback(file).factor(5) == 2


def test_memory_that_ends_at_an_earlier_step_splits_there_too(tmp_path: Path) -> None:
    fallback = PartFallback(tmp_path / "splits.json")
    assert fallback.double(10, parts=1, images=8)
    assert fallback.double(20, parts=2, images=8)
    again = PartFallback(tmp_path / "splits.json")
    assert again.double(4, parts=1, images=8)
    assert [again.factor(step) for step in (3, 4, 10, 20)] == [1, 2, 2, 4]


def test_other_wishes_for_batches_forget_the_splits_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "splits.json"
    assert PartFallback(file, asked="256 in 1").double(4, parts=1, images=8)
    assert PartFallback(file, asked="128 in 1").found == ()
    file.write_text(json.dumps({"splits": [{}], "asked": ""}))
    with pytest.raises(RunError, match=r"splits\.json: is damaged"):
        PartFallback(file)


def test_a_run_that_was_split_resumes_to_the_same_weights_where_memory_suffices(tmp_path: Path) -> None:
    keys = ("checkpoints.every=3 steps", "checkpoints.keep=9", "model.dropout=0.1")
    with memory_for(100, after_calls=4):
        train_digits(tmp_path / "cramped", *keys, model=SMALL_VIT[:3])
    (event,) = (e for e in read_events(tmp_path / "cramped" / "events.jsonl") if e.facts.get("accumulate") == 4)
    assert (event.kind, event.step) == ("out_of_memory", 4)
    # The newest checkpoint that is left lies before the split, the machine is a larger one.
    shutil.copytree(tmp_path / "cramped", tmp_path / "later")
    for step, checkpoint in find_checkpoints(tmp_path / "later" / "checkpoints").items():
        if step > 3:
            shutil.rmtree(checkpoint)
    resume_run(tmp_path / "later", [], quiet=True)
    train_digits(tmp_path / "straight", *keys, model=SMALL_VIT[:3])
    weights = {path.name: (path / "model.safetensors").read_bytes() for path in tmp_path.iterdir()}
    assert weights["cramped"] == weights["later"] != weights["straight"]


@pytest.mark.parametrize("model", [SMALL_VIT, CONVNET], ids=["vit", "batch norm"])
def test_what_the_recipe_forbids_ends_the_run_in_words(tmp_path: Path, model: tuple[str, ...]) -> None:
    policy = "stop" if model is SMALL_VIT else "split"
    with memory_for(100), pytest.raises(TrainingError, match="out of memory at batches of up to 256 images"):
        train_digits(tmp_path, f"memory.on_out_of_memory={policy}", model=model)
    assert not (tmp_path / "splits.json").exists()


def test_batch_norm_is_split_where_the_recipe_says_always(tmp_path: Path) -> None:
    with memory_for(100):
        train_digits(tmp_path, "memory.on_out_of_memory=always", "epochs=1", model=CONVNET)
    assert json.loads((tmp_path / "splits.json").read_text())["splits"] == [{"step": 0, "factor": 4}]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == STEPS_PER_EPOCH
