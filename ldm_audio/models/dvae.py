"""The discrete autoencoder that makes TorToise's speech tokens (arXiv 2305.07243, section 4): mel to tokens.

Must match the tensors of the release (`dvae.pth`): two convolutions of stride 2, residual blocks, the nearest
of `num_tokens` vectors, and the way back with nearest-neighbour enlargement. 1024 samples at 22.05 kHz become
one token. The codebook is no parameter: it is the moving average of what it was chosen for (arXiv 1711.00937,
appendix A.1), and `update` moves it.

Axes: b batch, c channels, f mel bins, n mel frames, t speech tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm_audio.errors import InputError

EMA_EPS = 1e-5
DOWNSAMPLE = 2  # of each encoder level


class ResBlock(nn.Module):
    """Two convolutions of width 3 and one of width 1 around an identity."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, t) -> (b, c, t)."""
        return x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


class Codebook(nn.Module):
    """`num_tokens` vectors of width `dim`, and the two moving averages that they are the quotient of."""

    def __init__(self, *, num_tokens: int, dim: int, decay: float):
        super().__init__()
        self.decay = decay
        vectors = torch.randn(num_tokens, dim)
        self.register_buffer("vectors", vectors)
        self.register_buffer("counts", torch.zeros(num_tokens))
        self.register_buffer("sums", vectors.clone())

    def nearest(self, z: Tensor) -> Tensor:
        """(b, c, t) -> (b, t) int64, the vector of least distance."""
        with torch.autocast(z.device.type, enabled=False):
            flat = rearrange(z.to(self.vectors.dtype), "b c t -> (b t) c")
            # |z|² is the same for every vector
            distance = self.vectors.square().sum(dim=1) - 2 * flat @ self.vectors.T  # (b t, num_tokens)
        return rearrange(distance.argmin(dim=1), "(b t) -> b t", b=len(z))

    def look_up(self, tokens: Tensor) -> Tensor:
        """(b, t) -> (b, c, t)."""
        return rearrange(F.embedding(tokens, self.vectors), "b t c -> b c t")

    @torch.no_grad()
    def statistics(self, z: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """How often each vector was chosen where mask (b, t) is True, and the sum of what chose it.

        z (b, c, t), tokens (b, t) -> ((num_tokens,), (num_tokens, c)).
        """
        chosen = tokens[mask]
        flat = rearrange(z, "b c t -> b t c")[mask].to(self.sums.dtype)
        counts = torch.zeros_like(self.counts).index_add_(0, chosen, flat.new_ones(len(chosen)))
        return counts, torch.zeros_like(self.sums).index_add_(0, chosen, flat)

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor) -> None:
        """Moves the averages towards a batch's `statistics`, and the vectors to their quotient.

        Counts are smoothed by 1e-5, so that a vector never chosen stays finite.
        """
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + EMA_EPS) / (total + len(self.counts) * EMA_EPS) * total
        self.vectors.copy_(self.sums / smoothed[:, None])

    @torch.no_grad()
    def restart(self, chosen: Tensor, vectors: Tensor) -> None:
        """Where chosen (num_tokens,) is True, takes the vector of `vectors`, with the mean count."""
        count = self.counts.mean()
        self.vectors[chosen] = vectors[chosen].to(self.vectors.dtype)
        self.sums[chosen] = self.vectors[chosen] * count
        self.counts[chosen] = count

    @torch.no_grad()
    def start_at(self, vectors: Tensor) -> None:
        """Replaces all vectors, (num_tokens, dim), as if each had been chosen once."""
        self.vectors.copy_(vectors)
        self.sums.copy_(vectors)
        self.counts.fill_(1.0)


@dataclass(frozen=True)
class Quantised:
    """z (b, c, t) from the encoder, its tokens (b, t), and their vectors (b, c, t)."""

    z: Tensor
    tokens: Tensor
    vectors: Tensor


class DVAE(nn.Module):
    """Normalised log-mel to tokens and back.

    channels: of the first convolution; each of the `num_levels` doubles them and halves the frames.
    """

    def __init__(
        self,
        *,
        n_mels: int,
        channels: int,
        num_levels: int,
        num_res_blocks: int,
        num_tokens: int,
        codebook_dim: int,
        codebook_decay: float,
    ):
        super().__init__()
        widths = [channels * 2**level for level in range(num_levels)]
        self.n_mels = n_mels
        self.num_tokens = num_tokens
        self.frames_per_token = DOWNSAMPLE**num_levels

        self.down = nn.ModuleList(
            nn.Conv1d(before, after, 3, stride=DOWNSAMPLE, padding=1)
            for before, after in zip([n_mels, *widths], widths)
        )
        self.encoder_blocks = nn.ModuleList(ResBlock(channels=widths[-1]) for _ in range(num_res_blocks))
        self.encoder_out = nn.Conv1d(widths[-1], codebook_dim, 1)
        self.codebook = Codebook(num_tokens=num_tokens, dim=codebook_dim, decay=codebook_decay)
        self.decoder_in = nn.Conv1d(codebook_dim, widths[-1], 1)
        self.decoder_blocks = nn.ModuleList(ResBlock(channels=widths[-1]) for _ in range(num_res_blocks))
        self.up = nn.ModuleList(
            nn.Conv1d(before, after, 3, padding=1)
            for before, after in zip([widths[-1], *reversed(widths)], reversed(widths))
        )
        self.decoder_out = nn.Conv1d(widths[0], n_mels, 1)

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the mel."""
        return self.decoder_out.weight

    def encode(self, mel: Tensor) -> Quantised:
        """(b, f, n) normalised log-mel -> z, tokens and their vectors, t = n / frames_per_token rounded up.

        Raises InputError for another number of mel bins, or no frame.
        """
        if mel.ndim != 3 or mel.shape[1] != self.n_mels or mel.shape[2] == 0:
            raise InputError(f"mel {tuple(mel.shape)}: expected (b, {self.n_mels}, n) with n > 0")
        x = mel
        for conv in self.down:
            x = F.relu(conv(x))  # (b, c, n / 2), (b, 2c, n / 4)
        for block in self.encoder_blocks:
            x = block(x)
        z = self.encoder_out(x)  # (b, codebook_dim, t)
        tokens = self.codebook.nearest(z)
        return Quantised(z, tokens, self.codebook.look_up(tokens))

    def decode(self, tokens: Tensor) -> Tensor:
        """(b, t) tokens -> (b, f, t * frames_per_token) normalised log-mel.

        Raises InputError for a token that the codebook has not, such as the start or the stop.
        """
        if tokens.numel() == 0 or tokens.min() < 0 or tokens.max() >= self.num_tokens:
            raise InputError(f"speech tokens: expected at least one, each 0 to {self.num_tokens - 1}")
        return self.decode_vectors(self.codebook.look_up(tokens))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """(b, codebook_dim, t) -> (b, f, t * frames_per_token)."""
        x = self.decoder_in(vectors)
        for block in self.decoder_blocks:
            x = block(x)
        for conv in self.up:
            x = F.relu(conv(F.interpolate(x, scale_factor=DOWNSAMPLE, mode="nearest")))
        return self.decoder_out(x)

    def forward(self, mel: Tensor) -> tuple[Tensor, Quantised]:
        """(b, f, n) -> its reconstruction (b, f, n), through which gradients pass to z, and `encode`'s."""
        quantised = self.encode(mel)
        straight = quantised.z + (quantised.vectors - quantised.z).detach()
        return self.decode_vectors(straight)[..., : mel.shape[-1]], quantised
