"""Batches repeat exactly: across worker counts, caches, resumed runs and Fabric."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image

import afds  # noqa: F401
from afds.data.folder import Item
from afds.data.images import ImageError
from afds.data.loader import ImageDataset, make_loader, set_epoch
from afds.data.preprocess import Preprocess
from afds.data.shared import free_shared
from afds.data.transforms import Augment, eval_transform, train_transform
from afds.errors import AfdsWarning, ConfigError, DataError

PREPROCESS = Preprocess(16, 18, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
N = 10


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    made = []
    for i in range(N):
        path = root / f"{i}.jpg"
        Image.fromarray(rng.integers(0, 255, (50 + i, 40, 3), dtype=np.uint8)).save(path)
        made.append(Item(path, i))  # labels tell the images apart
    return made


def loader_of(items, *, cache=False, seed=3, epoch=0, workers=0, **options):
    dataset = ImageDataset(items, train_transform(PREPROCESS, Augment(colour=0.3)), cache=cache)
    return make_loader(dataset, batch_size=4, shuffle=True, seed=seed, epoch=epoch, workers=workers, **options)


def run(loader, epochs):
    """For each epoch all images and labels, in order."""
    passes = []
    for epoch in epochs:
        set_epoch(loader, epoch)
        batches = list(loader)
        passes.append((torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])))
    return passes


def same(passes, others):
    return all(torch.equal(a, b) for p, o in zip(passes, others, strict=True) for a, b in zip(p, o, strict=True))


@pytest.fixture(scope="module")
def truth(items):
    return run(loader_of(items), range(3))


def test_every_image_once_in_another_order_each_epoch(truth):
    orders = [labels.tolist() for _, labels in truth]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    by_label = [x[labels.argsort()] for x, labels in truth]
    assert not torch.equal(by_label[0], by_label[1])  # augmented anew


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_workers_and_cache_change_no_value(items, truth, workers, cache):
    assert same(run(loader_of(items, workers=workers, cache=cache), range(3)), truth)


def test_the_cache_is_shared_with_the_workers(items):
    loader = loader_of(items, workers=2, cache=True)
    run(loader, [0])
    assert all(loader.dataset._cache.get(i) is not None for i in range(N))


def test_a_resumed_run_continues_as_the_first_would_have(items, truth):
    assert same(run(loader_of(items, epoch=2), [2]), truth[2:])
    first_pass_without_set_epoch = list(loader_of(items, epoch=2))
    assert torch.equal(torch.cat([y for _, y in first_pass_without_set_epoch]), truth[2][1])


def test_another_seed_another_order(items, truth):
    assert run(loader_of(items, seed=4), [0])[0][1].tolist() != truth[0][1].tolist()


def test_the_trainings_own_generator_is_left_alone(items):
    before = torch.get_rng_state()
    run(loader_of(items), [0])
    run(loader_of(items, workers=1), [0])
    assert torch.equal(torch.get_rng_state(), before)


def test_fabric_does_not_disturb_the_epoch(items, truth):
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(loader_of(items))
    list(loader)  # Fabric counts passes of its own
    assert same(run(loader, [2, 1]), [truth[2], truth[1]])


def test_fabrics_distributed_sampler_shares_the_tickets_out(items, truth):
    from lightning_fabric.utilities.data import _update_dataloader

    shares = []
    for rank in range(2):
        loader = loader_of(items)
        sampler = Fabric._get_distributed_sampler(loader, num_replicas=2, rank=rank)
        shares.append(run(_update_dataloader(loader, sampler), [1])[0])
    labels = torch.stack([share[1] for share in shares], dim=1).flatten()
    images = torch.stack([share[0] for share in shares], dim=1).flatten(0, 1)
    assert same([(images, labels)], truth[1:2])


def test_evaluation_keeps_the_order_and_takes_positions(items):
    dataset = ImageDataset(items, eval_transform(PREPROCESS))
    loader = make_loader(dataset, batch_size=4, shuffle=False, seed=0)
    x, labels = next(iter(loader))
    assert labels.tolist() == [0, 1, 2, 3]
    assert torch.equal(dataset[2][0], x[2])


def test_batches(items):
    assert [len(y) for _, y in loader_of(items)] == [4, 4, 2]
    assert [len(y) for _, y in loader_of(items, drop_last=True)] == [4, 4]
    assert [len(y) for _, y in loader_of(items[:3], drop_last=True)] == [3]


class _Threads:
    """Stands in for a transform, and tells how many threads it may use."""

    shrink_to, bytes = None, 4

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.tensor(torch.get_num_threads())


def test_a_worker_uses_one_thread(items):
    loader = make_loader(ImageDataset(items, _Threads()), batch_size=N, shuffle=False, seed=0, workers=1)
    assert next(iter(loader))[0].unique().tolist() == [1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_went_bad_is_named(items, tmp_path, workers):
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"")
    loader = loader_of([*items, Item(path, 0)], workers=workers)
    found = None
    try:  # pytest.raises would keep the loader, and its workers, beyond the test
        list(loader)
    except ImageError as error:
        found = error.path, str(error)
    assert found is not None
    assert found[0] == path
    assert "\n" not in found[1]  # no worker's traceback in what the command line prints


def test_nonsense_is_refused(items):
    with pytest.raises(DataError, match="empty"):
        ImageDataset([], eval_transform(PREPROCESS))
    dataset = ImageDataset(items, eval_transform(PREPROCESS))
    for options in ({"batch_size": 0}, {"batch_size": 2, "workers": -1}, {"batch_size": 2, "seed": -1}):
        with pytest.raises(ConfigError):
            make_loader(dataset, **{"shuffle": False, "seed": 0, **options})


def test_without_room_to_hand_photos_over_there_are_no_workers(items, truth, monkeypatch):
    monkeypatch.setattr("afds.data.loader.free_shared", lambda: 64 * 2**20)
    with pytest.warns(AfdsWarning, match="64 MB free, and 2 processes want 256 .*--shm-size 2g"):
        loader = loader_of(items, workers=2)
    assert loader.num_workers == 0
    dataset = ImageDataset(items * 200, eval_transform(PREPROCESS))
    each = 3 * 4 * 3 * PREPROCESS.input_size**2 * 128  # bytes a worker wants: three batches of 128
    workers = 1 + 256 * 2**20 // each
    monkeypatch.setattr("afds.data.loader.free_shared", lambda: 256 * 2**20)
    with pytest.warns(AfdsWarning, match="256 MB free, and"):
        assert make_loader(dataset, batch_size=128, shuffle=False, seed=0, workers=workers).num_workers == 0
    assert make_loader(dataset, batch_size=128, shuffle=False, seed=0, workers=1).num_workers == 1
    assert free_shared("/nowhere") == sys.maxsize
    assert 0 < free_shared("/tmp") < sys.maxsize
