"""HiFi-GAN (2010.05646): least-squares GAN, feature matching and mel L1 (equations 2 to 6)."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ldm_audio.audio.mel import LogMel
from ldm_audio.objectives.base import Logs, Objective, Preview, Turn, random_segments
from ldm_audio.randomness import RowRandom


class VocoderObjective(Objective):
    """Trains `vocoder` against `discriminator` on random segments of `segment_samples`.

    The discriminator joins at step `adversarial_start`; until then the generator sees the mel term alone.
    """

    monitor = "val/mel"
    strategies = ("ddp",)

    def __init__(
        self,
        *,
        mel: LogMel,
        vocoder: nn.Module,
        discriminator: nn.Module,
        seed: int,
        segment_samples: int,
        mel_weight: float,
        feature_weight: float,
        adversarial_start: int,
    ):
        super().__init__()
        self.mel = mel
        self.vocoder = vocoder.requires_grad_(True)  # one from a weights file is frozen
        # In a tuple, so that it is no sub-module; a copy of a weight-normed network could not be folded,
        # for copies share the class that holds the norm.
        self.folded = (copy.deepcopy(vocoder),)
        self.vocoder.add_weight_norm()
        self.discriminator = discriminator
        self.seed = seed
        self.segment_samples = segment_samples
        self.mel_weight = mel_weight
        self.feature_weight = feature_weight
        self.adversarial_start = adversarial_start

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {
            "vocoder": list(self.vocoder.parameters()),
            "discriminator": list(self.discriminator.parameters()),
        }

    def networks(self) -> dict[str, nn.Module]:
        return {"vocoder": self.vocoder}

    @torch.no_grad()
    def weights(self) -> dict[str, nn.Module]:
        """A copy with the weight norm folded in."""
        (folded,) = self.folded
        for plain, normed in zip(folded.convolutions(), self.vocoder.convolutions(), strict=True):
            plain.weight.copy_(normed.weight)
            plain.bias.copy_(normed.bias)
        return {"vocoder": folded}

    @torch.no_grad()
    def start_from(self, networks: dict[str, nn.Module], *, latent_scale: float | None) -> None:
        """Splits the plain weights that files hold into norm and direction."""
        pairs = zip(self.vocoder.convolutions(), networks["vocoder"].convolutions(), strict=True)
        for normed, plain in pairs:
            normed.weight = plain.weight.detach()  # a parameter would be registered, a tensor is split
            normed.bias.copy_(plain.bias)

    def losses(self, batch: dict, step: int) -> Iterator[Turn]:
        rows = RowRandom([(self.seed, step, int(item)) for item in batch["item"]])
        real = random_segments(batch["waveform"], self.segment_samples, rows).unsqueeze(1)  # (b, 1, s)
        mel = self.mel(real.squeeze(1))
        fake, real = same_length(self.parallel(self.vocoder)(mel), real)
        adversarial = step >= self.adversarial_start

        if adversarial:
            self.discriminator.requires_grad_(True)
            judge = self.parallel(self.discriminator)
            loss = torch.stack(
                [
                    ((1 - r) ** 2).mean() + (g**2).mean()
                    for (r, _), (g, _) in zip(judge(real), judge(fake.detach()))
                ]
            ).sum()
            yield "discriminator", loss, {"discriminator": loss}

        mel_l1 = (self.mel(fake.squeeze(1)) - self.mel(real.squeeze(1))).abs().mean()
        loss = self.mel_weight * mel_l1
        logs = {"mel": mel_l1}
        if adversarial:
            self.discriminator.requires_grad_(False)
            with torch.no_grad():
                real_maps = self.discriminator(real)
            fake_maps = self.discriminator(fake)
            fooled = torch.stack([((1 - g) ** 2).mean() for g, _ in fake_maps]).sum()
            features = feature_distance(real_maps, fake_maps)
            loss = loss + fooled + self.feature_weight * features
            logs |= {"adversarial": fooled, "features": features}
        yield "vocoder", loss, logs

    def validate(self, batch: dict) -> Logs:
        mel = self.mel(batch["waveform"])
        fake, real = same_length(self.vocoder(mel).squeeze(1), batch["waveform"])
        target = self.mel(real)
        bin_mean = target.mean(dim=(0, 2), keepdim=True)
        return {
            "mel": (self.mel(fake) - target).abs().mean(),
            "mel_of_bin_mean": (target - bin_mean).abs().mean(),
        }

    def preview(self, batch: dict) -> dict[str, Preview]:
        real = batch["waveform"][:4]
        mel = self.mel(real)
        fake = self.vocoder(mel).squeeze(1)
        rate = self.mel.sample_rate
        previews = {f"{i}_real": Preview(mel[i], real[i], rate) for i in range(len(real))}
        return previews | {
            f"{i}_vocoded": Preview(self.mel(fake[i : i + 1])[0], fake[i], rate) for i in range(len(real))
        }


def same_length(fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts both to the shorter: a generator's output may be a few samples off a whole number of hops."""
    samples = min(fake.shape[-1], real.shape[-1])
    return fake[..., :samples], real[..., :samples]


def feature_distance(real_maps: list, fake_maps: list) -> Tensor:
    """Equation 4: the mean absolute difference of each feature map, summed over maps and discriminators."""
    return torch.stack(
        [(r - g).abs().mean() for (_, rs), (_, gs) in zip(real_maps, fake_maps) for r, g in zip(rs, gs)]
    ).sum()
