"""The discrete autoencoder of speech (TorToise, arXiv 2305.07243; VQ-VAE, arXiv 1711.00937).

Squared error of the mel, and the commitment of the encoder to the vectors it chose; the codebook follows by
moving averages. Departures: what pads a recording counts in neither, and a new codebook begins at what the
untrained encoder says of the first batches. A vector that was hardly ever chosen of late begins anew at what
the encoder says of the batch (arXiv 2005.00341, section 3.1), where `restart_below` is not 0.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.distributed import gather_rows, rank, sum_over_ranks
from ldm_audio.objectives.base import Logs, Objective, Preview, Turn
from ldm_audio.objectives.speech import lengths_mask, mean_of_kept, num_samples_of
from ldm_audio.randomness import generator_for


class DVAEObjective(Objective):
    """Trains `dvae` on whole recordings.

    restart_below: share of its fair count, tokens a batch over vectors, below which a vector begins anew.
    Counts, sums and new vectors are taken over all ranks, so that their codebooks stay the same.
    """

    strategies = ("ddp",)

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
            vectors.append(z.transpose(1, 2)[self.token_mask(mask, z.shape[-1])])
            frames = mel.transpose(1, 2)[mask]
            sums = sum_over_ranks(torch.cat([frames.sum(dim=0), frames.new_tensor([len(frames)])]))
            means.append(sums[:-1] / sums[-1])
        self.dvae.decoder_out.bias.copy_(torch.stack(means).mean(dim=0))
        self.dvae.codebook.start_at(self.draw(vectors, step=-1))

    def draw(self, vectors: Sequence[Tensor], step: int) -> Tensor:
        """(any, c) of each of several batches -> (num_tokens, c) of those of all ranks at random.

        Some come several times where there are too few.
        """
        lengths = gather_rows(torch.tensor([[len(batch) for batch in vectors]])).T  # (batches, ranks)
        starts = (lengths.flatten().cumsum(0).view_as(lengths) - lengths)[:, rank()]
        order = torch.randperm(int(lengths.sum()), generator=generator_for(self.seed, step))
        places = order.repeat(-(-self.dvae.num_tokens // len(order)))[: self.dvae.num_tokens]
        chosen = vectors[0].new_zeros(len(places), vectors[0].shape[1])
        for batch, start in zip(vectors, starts.tolist()):
            here = (places >= start) & (places < start + len(batch))
            chosen[here.to(chosen.device)] = batch[(places[here] - start).to(batch.device)]
        return sum_over_ranks(chosen)

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
        terms, z, tokens = self.terms(mel, mask, across_ranks=True)
        yield "dvae", terms["loss"], {key: value for key, value in terms.items() if key != "loss"}
        self.move_codebook(z.detach(), tokens, self.token_mask(mask, tokens.shape[1]), step)

    def terms(self, mel: Tensor, mask: Tensor, *, across_ranks: bool) -> tuple[Logs, Tensor, Tensor]:
        """The loss and its terms, z (b, c, t), tokens (b, t)."""
        dvae = self.parallel(self.dvae) if across_ranks else self.dvae
        reconstruction, quantised = dvae(mel)
        errors = (reconstruction - mel).square().transpose(1, 2)[mask]
        error = mean_of_kept(errors, across_ranks=across_ranks)
        kept = self.token_mask(mask, quantised.tokens.shape[1])
        distances = (quantised.vectors - quantised.z).square().transpose(1, 2)[kept]
        commitment = mean_of_kept(distances, across_ranks=across_ranks)
        counts = torch.bincount(quantised.tokens[kept], minlength=self.dvae.num_tokens).float()
        terms = {
            "loss": error + self.commitment_weight * commitment,
            "reconstruction": error,
            "commitment": commitment,
            "perplexity": perplexity(sum_over_ranks(counts) if across_ranks else counts),
        }
        return terms, quantised.z, quantised.tokens

    @torch.no_grad()
    def move_codebook(self, z: Tensor, tokens: Tensor, mask: Tensor, step: int) -> None:
        """The codebook's own learning, after the network's step."""
        book = self.dvae.codebook
        counts, sums = (sum_over_ranks(part) for part in book.statistics(z, tokens, mask))
        book.update(counts, sums)
        idle = book.counts < self.restart_below * counts.sum() / len(counts)
        if idle.any():
            book.restart(idle, self.draw([z.transpose(1, 2)[mask]], step))

    def validate(self, batch: dict) -> Logs:
        """The terms, and the squared error of each bin's mean over the batch in place of a reconstruction."""
        mel, mask = self.mel_and_mask(batch)
        terms, _, _ = self.terms(mel, mask, across_ranks=False)
        frames = mel.transpose(1, 2)[mask]
        return terms | {"reconstruction_of_bin_mean": (frames - frames.mean(dim=0)).square().mean()}

    def preview(self, batch: dict) -> dict[str, Preview]:
        mel = self.mel(batch["waveform"][:4])
        reconstruction, _ = self.dvae(mel)
        real = {f"{i}_real": Preview(mel[i]) for i in range(len(mel))}
        return real | {f"{i}_reconstruction": Preview(reconstruction[i]) for i in range(len(mel))}


def perplexity(counts: Tensor) -> Tensor:
    """(num_tokens,) how often each came -> how many would be as surprising if all were equally frequent."""
    return torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp()
