"""The step-addressed sampler and the loader: order, resumption, ranks, collation, errors, randomness."""

import json
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_audio.data.loader import (
    ItemKey,
    StepBatches,
    Unreadable,
    make_loader,
    sequential_batches,
    share_of,
)
from ldm_audio.errors import InputError


def batches(length, *, batch_size=2, seed=0, start_step=0, num_steps=5, rank=0, world_size=1):
    return list(
        StepBatches(
            length,
            batch_size=batch_size,
            seed=seed,
            start_step=start_step,
            num_steps=num_steps,
            rank=rank,
            world_size=world_size,
        )
    )


class Toy:
    """Items that say which they are and how many threads read them; index `broken` is a user's mistake."""

    def __init__(self, length: int, *, broken: int | None = None, bug: int | None = None):
        self.length, self.broken, self.bug = length, broken, bug

    def __len__(self) -> int:
        return self.length

    def captions(self) -> list[str]:
        return [str(index) for index in range(self.length)]

    def __getitem__(self, key) -> dict:
        epoch, index, _ = (0, key, key) if isinstance(key, int) else key
        if index == self.broken:
            raise InputError(f"{index}.wav: broken")
        if index == self.bug:
            raise ZeroDivisionError("a bug")
        return {
            "waveform": torch.full((3,), float(index)),
            "caption": f"clip {index} of epoch {epoch}",
            "beats": np.arange(index),
            "threads": torch.get_num_threads(),
        }


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 23),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    start=st.integers(0, 40),
    seed=st.integers(0, 2**40),
)
def test_ranks_together_see_one_process_with_the_global_batch(length, batch_size, world_size, start, seed):
    whole = batches(length, batch_size=batch_size * world_size, seed=seed, start_step=start, num_steps=4)
    ranks = [
        batches(
            length,
            batch_size=batch_size,
            seed=seed,
            start_step=start,
            num_steps=4,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    assert whole == [list(chain(*parts)) for parts in zip(*ranks)]


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 23), batch_size=st.integers(1, 60), start=st.integers(0, 40))
def test_resuming_at_a_step_gives_the_rest_of_the_run(length, batch_size, start):
    run = batches(length, batch_size=batch_size, num_steps=start + 6)
    assert run[start:] == batches(length, batch_size=batch_size, start_step=start, num_steps=6)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 23), batch_size=st.integers(1, 60))
def test_every_epoch_is_a_permutation_and_items_are_numbered_through(length, batch_size):
    keys = list(chain(*batches(length, batch_size=batch_size, num_steps=3 * length)))
    assert [key.item for key in keys] == list(range(len(keys)))
    assert all(key.epoch == key.item // length for key in keys)
    for epoch in range(3):
        assert sorted(key.index for key in keys[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_epochs_and_seeds_shuffle_differently():
    first, second = batches(100, batch_size=100, num_steps=2)
    other = batches(100, batch_size=100, num_steps=1, seed=1)[0]
    orders = [[key.index for key in keys] for keys in (first, second, other)]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[0] != list(range(100))


def test_an_endless_run_starts_at_once():
    endless = StepBatches(
        49838, batch_size=8, seed=0, start_step=10**9, num_steps=2**40, rank=1, world_size=2
    )
    assert len(endless) == 2**40
    assert [key.item for key in next(iter(endless))] == list(range(16 * 10**9 + 8, 16 * 10**9 + 16))


def test_validation_batches_are_the_first_items_in_order():
    assert sequential_batches(3, 2, 10) == [[ItemKey(0, 0, 0), ItemKey(0, 1, 1)], [ItemKey(0, 2, 2)]]
    assert sequential_batches(30, 4, 4) == [[ItemKey(0, i, i) for i in range(4)]]
    assert len(sequential_batches(30, 4, None)) == 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_stacks_tensors_lists_the_rest_and_tells_its_items(num_workers):
    keys = [[ItemKey(1, 2, 7), ItemKey(2, 0, 8)], [ItemKey(2, 1, 9)]]
    loader = make_loader(Toy(3), keys, num_workers=num_workers)
    for _ in range(2):  # a second pass, through the same workers
        first, last = list(loader)
        assert torch.equal(first["waveform"], torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]))
        assert first["caption"] == ["clip 2 of epoch 1", "clip 0 of epoch 2"]
        assert [len(beats) for beats in first["beats"]] == [2, 0]
        assert first["item"].tolist() == [7, 8] and first["index"].tolist() == [2, 0]
        assert first["item"].dtype == first["index"].dtype == torch.int64
        assert last["item"].tolist() == [9]
        assert num_workers == 0 or first["threads"] == [1, 1]


def test_workers_change_neither_order_nor_content():
    steps = StepBatches(7, batch_size=3, seed=5, start_step=2, num_steps=9, rank=0, world_size=1)
    alone, helped = (list(make_loader(Toy(7), steps, num_workers=n)) for n in (0, 2))
    assert [batch["caption"] for batch in alone] == [batch["caption"] for batch in helped]
    assert len(alone) == 9


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_users_mistake_in_a_worker_stays_one_line(num_workers):
    loader = make_loader(Toy(4, broken=2), sequential_batches(4, 2, None), num_workers=num_workers)
    with pytest.raises(InputError) as caught:
        list(loader)
    assert str(caught.value) == "2.wav: broken"
    del caught  # its traceback holds the loader, whose workers end with it


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_clip_is_replaced_the_same_way_by_any_worker_and_named_once(num_workers, tmp_path, caplog):
    unreadable = Unreadable(tmp_path / "unreadable.json")
    keys = [[ItemKey(epoch, index, 9 * epoch + index) for index in (1, 2, 3)] for epoch in range(4)]
    loader = make_loader(Toy(5, broken=2), keys, num_workers=num_workers, unreadable=unreadable)
    batches = list(loader)
    assert [batch["item"].tolist() for batch in batches] == [[key.item for key in row] for row in keys]
    places = [batch["index"].tolist() for batch in batches]
    chosen = [np.random.default_rng([epoch, 2]) for epoch in range(4)]
    for (one, other, three), draw in zip(places, chosen):
        expected = next(index for index in draw.integers(5, size=20).tolist() if index != 2)
        assert (one, other, three) == (1, expected, 3)
    assert [batch["replaced"] for batch in batches] == [1, 1, 1, 1]
    assert caplog.text.count("2.wav: broken; another clip takes its place") == 1
    again = Unreadable(tmp_path / "unreadable.json")  # as a run that goes on does
    again.note(2, "2.wav: broken")
    assert json.loads((tmp_path / "unreadable.json").read_text()) == [{"index": 2, "reason": "2.wav: broken"}]
    assert caplog.text.count("2.wav") == 1


def test_a_data_set_of_broken_clips_is_an_error(tmp_path):
    unreadable = Unreadable(tmp_path / "unreadable.json")
    loader = make_loader(
        Toy(1, broken=0), sequential_batches(1, 1, None), num_workers=0, unreadable=unreadable
    )
    with pytest.raises(InputError, match=r"0\.wav: broken"):
        list(loader)


def test_ranks_share_validation_batches_evenly():
    batches = sequential_batches(9, 2, None)
    shares = [share_of(batches, rank=rank, world_size=2) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    assert shares[0] == batches[::2] and shares[1][:2] == batches[1::2]
    assert shares[1][2] == [ItemKey(0, 0, -1), ItemKey(0, 1, -1)]  # computed, and not counted
    assert share_of(batches, rank=0, world_size=1) == batches


def test_a_bug_is_no_users_mistake():
    with pytest.raises(ZeroDivisionError):
        list(make_loader(Toy(4, bug=2), sequential_batches(4, 2, None), num_workers=0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(num_workers):
    before = torch.get_rng_state()
    list(islice(make_loader(Toy(4), sequential_batches(4, 2, None), num_workers=num_workers), 1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "change,message",
    [({"length": 0}, "data set is empty"), ({"batch_size": 0}, "batch_size=0"), ({"seed": -1}, "seed=-1")],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(InputError, match=message):
        batches(**({"length": 3} | change))
