"""The discrete autoencoder: an independent writing of it, its codebook's arithmetic, what it refuses."""

import pytest
import speech_toys as toys
import torch
from torch import nn

from ldm_audio.convert.rules import invert_rules
from ldm_audio.convert.tortoise import dvae_rules
from ldm_audio.errors import InputError
from ldm_audio.models.dvae import Codebook


def mel(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Res(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        conv = nn.Conv1d
        self.net = nn.Sequential(
            conv(channels, channels, 3, padding=1), nn.ReLU(),
            conv(channels, channels, 3, padding=1), nn.ReLU(), conv(channels, channels, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


class Up(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.conv = nn.Conv1d(before, after, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.repeat_interleave(2, dim=-1))


def original() -> nn.ModuleDict:
    """The layers in the order and under the names of the released file, at the toy's sizes."""
    encoder = nn.Sequential(
        nn.Sequential(nn.Conv1d(80, 8, 3, 2, 1), nn.ReLU()),
        nn.Sequential(nn.Conv1d(8, 16, 3, 2, 1), nn.ReLU()),
        Res(16), Res(16), nn.Conv1d(16, 6, 1),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Conv1d(6, 16, 1), Res(16), Res(16), nn.Sequential(Up(16, 16), nn.ReLU()),
        nn.Sequential(Up(16, 8), nn.ReLU()), nn.Conv1d(8, 80, 1),
    )  # fmt: skip
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder})


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 4, 13])
def test_tokens_and_mels_equal_layers_in_the_released_order(frames):
    ours, theirs = toys.network(toys.DVAE_RECIPE), original()
    state = invert_rules(dvae_rules(num_levels=2, num_res_blocks=2), ours.state_dict())
    theirs.load_state_dict({k: v for k, v in state.items() if not k.startswith("codebook.")})
    x = mel(2, 80, frames)
    z = theirs["encoder"](x)
    distance = torch.cdist(z.transpose(1, 2), state["codebook.embed"].T[None].expand(2, -1, -1))
    quantised = ours.encode(x)
    assert (quantised.z - z).abs().max() <= 1e-5
    assert torch.equal(quantised.tokens, distance.argmin(-1))
    assert quantised.tokens.shape[1] == -(-frames // 4)
    expected = theirs["decoder"](state["codebook.embed"].T[quantised.tokens].transpose(1, 2))
    assert (ours.decode(quantised.tokens) - expected).abs().max() <= 1e-5
    reconstruction, _ = ours(x)
    assert (reconstruction - expected[..., :frames]).abs().max() <= 1e-5


def test_gradients_pass_straight_through_the_codebook():
    ours = toys.network(toys.DVAE_RECIPE)
    reconstruction, quantised = ours(mel(1, 80, 8))
    reconstruction.square().sum().backward()
    assert ours.encoder_out.weight.grad.abs().sum() > 0
    assert not quantised.vectors.requires_grad and not list(ours.codebook.parameters())


def test_the_codebook_is_the_moving_average_of_what_chose_it():
    book = Codebook(num_tokens=3, dim=2, decay=0.75)
    book.start_at(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]))
    z = torch.tensor([[[1.0, 3.0, 9.0, 100.0], [1.0, 1.0, 1.0, 0.0]]])  # (1, 2, 4), the last place padding
    tokens = book.nearest(z)
    assert tokens.tolist() == [[0, 0, 1, 1]]
    mask = torch.tensor([[True, True, True, False]])
    counts, sums = book.statistics(z, tokens, mask)
    assert counts.tolist() == [2, 1, 0] and sums.tolist() == [[4, 2], [9, 1], [0, 0]]
    book.update(counts, sums)
    assert torch.allclose(book.counts, torch.tensor([1.25, 1.0, 0.75]))
    smoothed = (book.counts + 1e-5) / (3.0 + 3e-5) * 3.0
    expected = torch.tensor([[1.0, 0.5], [9.75, 0.25], [0.0, 7.5]]) / smoothed[:, None]
    assert torch.allclose(book.vectors, expected)


def test_updates_reach_the_mean_and_leave_unused_vectors_finite():
    book = Codebook(num_tokens=2, dim=1, decay=0.5)
    book.start_at(torch.tensor([[1.0], [-50.0]]))
    z = torch.tensor([[[2.0, 4.0]]])
    for _ in range(200):
        tokens = book.nearest(z)
        book.update(*book.statistics(z, tokens, torch.ones(1, 2, dtype=torch.bool)))
    assert abs(book.vectors[0].item() - 3.0) < 1e-3 and book.vectors.isfinite().all()


def test_what_does_not_fit_is_refused():
    ours = toys.network(toys.DVAE_RECIPE)
    for bad in (torch.zeros(1, 79, 8), torch.zeros(1, 80, 0), torch.zeros(80, 8)):
        with pytest.raises(InputError, match=r"expected \(b, 80, n\) with n > 0"):
            ours.encode(bad)
    for bad in (torch.tensor([[30]]), torch.tensor([[-1]]), torch.zeros(1, 0, dtype=torch.int64)):
        with pytest.raises(InputError, match="speech tokens: expected at least one, each 0 to 29"):
            ours.decode(bad)
