"""The mel autoencoder: L1 + perceptual + KL, and a hinge patch GAN with an adaptive weight.

AudioLDM (2301.12503, section 3.3) trains latent diffusion's autoencoder loss on log-mels. As in the
original: reconstruction terms are summed over an item's mel, KL is a mean over its latent, the discriminator
moves first and the autoencoder answers the updated one. Departures: the discriminator starts after
`adversarial_start` batches (the original counts two steps a batch), and LPIPS is never in train mode.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_audio.audio.mel import LogMel
from ldm_audio.distributed import mean_over_ranks
from ldm_audio.objectives.base import Logs, Objective, Preview, Turn, random_segments
from ldm_audio.randomness import RowRandom


class VAEObjective(Objective):
    """Trains `vae` on random segments of `segment_samples`, later against `discriminator`.

    `perceptual(mel, target) -> (b,)`: LPIPS where its weights are at hand, else a multi-resolution mel term.
    """

    strategies = ("ddp",)
    retains_graph = True

    def __init__(
        self,
        *,
        mel: LogMel,
        vae: nn.Module,
        discriminator: nn.Module,
        perceptual: nn.Module,
        seed: int,
        segment_samples: int,
        kl_weight: float,
        perceptual_weight: float,
        adversarial_weight: float,
        adversarial_start: int,
    ):
        super().__init__()
        self.mel = mel
        self.vae = vae.requires_grad_(True)  # one from a weights file is frozen
        self.discriminator = discriminator
        self.perceptual = perceptual.requires_grad_(False)
        self.frozen = ("perceptual",)
        self.seed = seed
        self.segment_samples = segment_samples
        self.kl_weight = kl_weight
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.to(memory_format=torch.channels_last)  # steps are a tenth quicker on the CPU

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"vae": list(self.vae.parameters()), "discriminator": list(self.discriminator.parameters())}

    def networks(self) -> dict[str, nn.Module]:
        return {"vae": self.vae}

    @torch.no_grad()
    def prepare(self, batches: Iterable[dict]) -> None:
        """Starts a new autoencoder at the mean of the mels; its first steps would only shift its output."""
        if getattr(self.vae, "provenance", None) is None:
            means = [self.mel(batch["waveform"]).mean() for batch in batches]
            self.vae.decoder.conv_out.bias.fill_(mean_over_ranks(torch.stack(means).mean()))

    def losses(self, batch: dict, step: int) -> Iterator[Turn]:
        rows = RowRandom([(self.seed, step, int(item)) for item in batch["item"]])
        mel = self.mel(random_segments(batch["waveform"], self.segment_samples, rows))  # (b, f, n)
        noise = rows.randn(*self.vae.latent_shape(mel)).to(mel)
        reconstruction, posterior = self.parallel(self.vae)(mel, noise)  # (b, f, n)
        adversarial = step >= self.adversarial_start

        if adversarial:
            self.discriminator.requires_grad_(True)
            judge = self.parallel(self.discriminator)
            real, fake = judge(mel.unsqueeze(1)), judge(reconstruction.detach().unsqueeze(1))
            loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            yield "discriminator", loss, {"discriminator": loss}

        l1, perceptual, kl = self.reconstruction_terms(mel, reconstruction, posterior)
        elements = mel[0].numel()
        nll = (l1 + self.perceptual_weight * perceptual) * elements
        loss = nll + self.kl_weight * kl
        logs = {"l1": l1, "perceptual": perceptual, "kl": kl}
        if adversarial:
            self.discriminator.requires_grad_(False)
            fooled = -self.discriminator(reconstruction.unsqueeze(1)).mean()
            weight = self.adaptive_weight(nll, fooled)
            loss = loss + weight * fooled
            logs |= {"adversarial": fooled, "adversarial_weight": weight}
        yield "vae", loss, logs

    def reconstruction_terms(
        self, mel: Tensor, reconstruction: Tensor, posterior
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Batch means of L1 (nepers a mel element), perceptual distance and KL (nats a latent element)."""
        l1 = (mel - reconstruction).abs().mean()
        return l1, self.perceptual(reconstruction, mel).mean(), posterior.kl().mean()

    def adaptive_weight(self, nll: Tensor, fooled: Tensor) -> Tensor:
        """VQGAN (2012.09841, equation 7): equal gradients of both terms at the last layer, over all ranks."""
        last = self.vae.last_layer
        nll_grad = mean_over_ranks(torch.autograd.grad(nll, last, retain_graph=True)[0])
        fooled_grad = mean_over_ranks(torch.autograd.grad(fooled, last, retain_graph=True)[0])
        weight = nll_grad.norm() / (fooled_grad.norm() + 1e-4)
        return self.adversarial_weight * weight.clamp(0.0, 1e4).detach()

    def validate(self, batch: dict) -> Logs:
        """L1 of the mean's reconstruction, in the same units as predicting each bin's mean over the batch."""
        mel = self.mel(batch["waveform"])
        posterior = self.vae.encode(mel)
        l1, perceptual, kl = self.reconstruction_terms(mel, self.vae.decode(posterior.mean), posterior)
        bin_mean = mel.mean(dim=(0, 2), keepdim=True)
        return {
            "loss": l1 + self.perceptual_weight * perceptual,
            "l1": l1,
            "perceptual": perceptual,
            "kl": kl,
            "l1_of_bin_mean": (mel - bin_mean).abs().mean(),
        }

    def preview(self, batch: dict) -> dict[str, Preview]:
        mel = self.mel(batch["waveform"][:4])
        reconstruction = self.vae.decode(self.vae.encode(mel).mean)
        real = {f"{i}_real": Preview(mel[i]) for i in range(len(mel))}
        return real | {f"{i}_reconstruction": Preview(reconstruction[i]) for i in range(len(mel))}
