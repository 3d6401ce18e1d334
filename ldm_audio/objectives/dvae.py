"""The discrete autoencoder of speech (TorToise, arXiv 2305.07243; VQ-VAE, arXiv 1711.00937).

Squared error of the mel, and the commitment of the encoder to the vectors it chose; the codebook follows by
moving averages. Departures: what pads a recording counts in neither, and a new codebook begins at what the
untrained encoder says of the first batches. A vector that was hardly ever chosen of late begins anew at what
the encoder says of the batch (arXiv 2005.00341, section 3.1), where `restart_below` is not 0.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.objectives.base import Logs, Objective, Preview, Turn
from ldm_audio.objectives.speech import lengths_mask, num_samples_of
from ldm_audio.randomness import generator_for


class DVAEObjective(Objective):
    """Trains `dvae` on whole recordings.

    restart_below: share of its fair count, tokens a batch over vectors, below which a vector begins anew.
    """

    def __init__(
        self, *, mel: SpeechMel, dvae: nn.Module, seed: int, commitment_weight: float, restart_below: float
    ):
        super().__init__()
        self.mel = mel
        self.dvae = dvae.requires_grad_(True)  # one from a weights file is frozen
        self.seed = seed
        self.commitment_weight = commitment_weight
        self.restart_below = restart_below

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"dvae": list(self.dvae.parameters())}

    def networks(self) -> dict[str, nn.Module]:
        return {"dvae": self.dvae}

    @torch.no_grad()
    def prepare(self, batches: Iterable[dict]) -> None:
        """Starts a new decoder at the mean of the mels, and a new codebook at the encoder's vectors."""
        if getattr(self.dvae, "provenance", None) is not None:
            return
        vectors, means = [], []
        for batch in batches:
            mel, mask = self.mel_and_mask(batch)
            z = self.dvae.encode(mel).z
            vectors.append(z.transpose(1, 2)[self.token_mask(mask, z.shape[-1])].float())
            means.append(mel.transpose(1, 2)[mask].mean(dim=0))
        self.dvae.decoder_out.bias.copy_(torch.stack(means).mean(dim=0))
        self.dvae.codebook.start_at(self.draw(torch.cat(vectors), step=-1))

    def draw(self, vectors: Tensor, step: int) -> Tensor:
        """(any, c) -> (num_tokens, c) of them at random, some several times where there are too few."""
        order = torch.randperm(len(vectors), generator=generator_for(self.seed, step))
        places = order.repeat(-(-self.dvae.num_tokens // len(order)))[: self.dvae.num_tokens]
        return vectors[places.to(vectors.device)]

    def mel_and_mask(self, batch: dict) -> tuple[Tensor, Tensor]:
        """(b, f, n) and (b, n) bool, True within the recording."""
        mel = self.mel(batch["waveform"])
        frames = num_samples_of(batch) // self.mel.hop_length + 1
        return mel, lengths_mask(frames, mel.shape[-1])

    def token_mask(self, mask: Tensor, num_tokens: int) -> Tensor:
        """(b, n) frames -> (b, t) tokens, True where the first frame of a token is within the recording."""
        return mask[:, :: self.dvae.frames_per_token][:, :num_tokens]

    def losses(self, batch: dict, step: int) -> Iterator[Turn]:
        mel, mask = self.mel_and_mask(batch)
        terms, z, tokens = self.terms(mel, mask)
        yield "dvae", terms["loss"], {key: value for key, value in terms.items() if key != "loss"}
        self.move_codebook(z.detach().float(), tokens, self.token_mask(mask, tokens.shape[1]), step)

    def terms(self, mel: Tensor, mask: Tensor) -> tuple[Logs, Tensor, Tensor]:
        """The loss and its terms, z (b, c, t), tokens (b, t)."""
        reconstruction, quantised = self.dvae(mel)
        error = (reconstruction - mel).square().transpose(1, 2)[mask].mean()
        kept = self.token_mask(mask, quantised.tokens.shape[1])
        commitment = (quantised.vectors - quantised.z).square().transpose(1, 2)[kept].mean()
        terms = {
            "loss": error + self.commitment_weight * commitment,
            "reconstruction": error,
            "commitment": commitment,
            "perplexity": perplexity(quantised.tokens[kept], self.dvae.num_tokens),
        }
        return terms, quantised.z, quantised.tokens

    @torch.no_grad()
    def move_codebook(self, z: Tensor, tokens: Tensor, mask: Tensor, step: int) -> None:
        """The codebook's own learning, after the network's step."""
        book = self.dvae.codebook
        counts, sums = book.statistics(z, tokens, mask)
        book.update(counts, sums)
        idle = book.counts < self.restart_below * counts.sum() / len(counts)
        if idle.any():
            book.restart(idle, self.draw(z.transpose(1, 2)[mask], step))

    def validate(self, batch: dict) -> Logs:
        """The terms, and the squared error of each bin's mean over the batch in place of a reconstruction."""
        mel, mask = self.mel_and_mask(batch)
        terms, _, _ = self.terms(mel, mask)
        frames = mel.transpose(1, 2)[mask]
        return terms | {"reconstruction_of_bin_mean": (frames - frames.mean(dim=0)).square().mean()}

    def preview(self, batch: dict) -> dict[str, Preview]:
        mel = self.mel(batch["waveform"][:4])
        reconstruction, _ = self.dvae(mel)
        real = {f"{i}_real": Preview(mel[i]) for i in range(len(mel))}
        return real | {f"{i}_reconstruction": Preview(reconstruction[i]) for i in range(len(mel))}


def perplexity(tokens: Tensor, num_tokens: int) -> Tensor:
    """How many tokens would be as surprising if all were equally frequent: 1 to num_tokens."""
    share = torch.bincount(tokens, minlength=num_tokens).float() / max(1, tokens.numel())
    return torch.special.entr(share).sum().exp()
