"""The moving average of weights."""

import pytest
import torch
from torch import nn

from ldm_audio.errors import InputError
from ldm_audio.training.ema import EMA


def test_decay_warms_up_as_one_plus_n_over_ten_plus_n_and_stops_at_the_limit():
    ema = EMA({"net": nn.Linear(2, 2)}, decay=0.5)
    assert [round(ema.update(), 6) for _ in range(4)] == pytest.approx(
        [2 / 11, 3 / 12, 4 / 13, 5 / 14], abs=1e-6
    )
    for _ in range(20):
        last = ema.update()
    assert last == 0.5


def test_shadow_equals_the_recursion_by_hand():
    net = nn.Linear(1, 1, bias=False)
    ema = EMA({"net": net}, decay=0.9)
    expected = net.weight.item()
    for step, value in enumerate((1.0, -2.0, 5.0), start=1):
        net.weight.data.fill_(value)
        ema.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert ema.shadow["net.weight"].item() == pytest.approx(expected, rel=1e-6)


def test_swapped_shows_the_average_and_gives_the_own_weights_back_even_after_an_error():
    net = nn.Linear(2, 2)
    ema = EMA({"net": net}, decay=0.9)
    net.weight.data.add_(1.0)
    own, average = net.weight.clone(), ema.shadow["net.weight"].clone()
    with pytest.raises(KeyError), ema.swapped():
        assert torch.equal(net.weight, average)
        raise KeyError
    assert torch.equal(net.weight, own)


def test_state_of_other_networks_is_refused():
    ema = EMA({"net": nn.Linear(2, 2)}, decay=0.9)
    with pytest.raises(InputError, match="other networks"):
        ema.load_state_dict(EMA({"other": nn.Linear(2, 2)}, decay=0.9).state_dict())
