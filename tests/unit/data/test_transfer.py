import pytest
import torch

from opsin.data.base import Batch, Blend
from opsin.data.transfer import Courier, send
from tests.meta_device import META, watched

CPU = torch.device("cpu")


def batch() -> Batch:
    ids = torch.arange(3)
    masks = {"context": ids[:, None]}
    return Batch({"image": torch.rand(1, 3, 3, 4, 4)}, ids, ids, masks, Blend(ids, torch.rand(3)))


def test_what_stays_on_the_host_is_not_copied() -> None:
    images = torch.rand(2, 3)
    assert send(images, CPU) is images
    assert Courier(CPU).send(images) is images


def test_everything_of_a_batch_is_sent_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    here = batch()
    with watched(monkeypatch) as seen:
        there = here.to(META)
    assert not seen.waits
    assert there.blend is not None
    sent = [*there.views.values(), *there.masks.values(), there.labels, there.ids, there.blend.labels]
    assert all(tensor.is_meta for tensor in [*sent, there.blend.shares])


def test_a_copy_from_ordinary_memory_is_seen_as_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as seen:
        torch.rand(2).to(META)
        torch.rand(2).to(META, non_blocking=True)
    assert seen.waits == {"copy to meta, torch"}


@pytest.mark.gpu
def test_pixels_that_are_copied_beside_other_work_are_whole_when_they_are_used() -> None:
    gpu = torch.device("cuda")
    courier, busy = Courier(gpu), torch.rand(4096, 4096, device=gpu)
    pixels = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8).pin_memory()
    for _ in range(20):
        busy = busy @ busy / 4096
        assert torch.equal((courier.send(pixels).float() + 1).cpu(), pixels.float() + 1)
