"""Latent diffusion under a CLAP embedding: AudioLDM (2301.12503, section 3.1, equation 4).

The embedding of the audio itself may train the network and the embedding of a text steer it ("audio embedding
at training, text embedding at sampling"); which of them is used is a setting and not a switch hidden in the
code. Departures from the original: CLAP stays in eval mode, the condition is dropped by one rule for each
item (the original stacks two), and `latent_scale` comes from several batches.

Latent mixup (BLM, MusicLDM 2308.01546) happens here: the latents of two aligned clips are mixed, and CLAP
hears what decoder and vocoder make of the mix. Which two, and lambda, are in the batch (`data/mixing.py`).

Axes: b batch, s samples, c channels, t latent frames, f mel bins (of a latent), d width of an embedding.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_audio.audio.io import resample_sinc
from ldm_audio.audio.mel import LogMel
from ldm_audio.audio.mixup import Mixup, mix_posteriors, silence_tail
from ldm_audio.diffusion.guidance import classifier_free
from ldm_audio.diffusion.samplers import ddim, timestep_grid
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.distributed import mean_over_ranks
from ldm_audio.errors import InputError
from ldm_audio.objectives.base import Logs, Objective, Preview, Turn
from ldm_audio.randomness import RowRandom

VALIDATION_STEP = -1  # the "step" of validation's own random streams: the same noise at every validation


class LatentDiffusionObjective(Objective):
    """Trains `unet` on the latents of `vae`, conditioned on `clap`; all but the UNet are frozen.

    text_probability: share of items conditioned on their caption's embedding, the others on their audio's.
    condition_dropout: share of items whose condition becomes the embedding of "" (classifier-free guidance).
    mixup: how latents and captions of mixed items are mixed.
    latent_scale: what latents are multiplied by; None measures it.
    Batches hold `caption` and `waveform` (b, s), or `z_mean`, `z_std` (b, c, t, f) with `audio_embed` and
    `text_embed` (b, d) from a cache; of latents to be mixed also `partner` (b, s), or `partner_z_mean` and
    `partner_z_std`, and `mix_ratio` (b,): lambda, 1 where nothing is to be mixed.
    """

    accumulable = True
    strategies = ("ddp", "fsdp2")

    def __init__(
        self,
        *,
        mel: LogMel,
        unet: nn.Module,
        vae: nn.Module,
        clap: nn.Module,
        vocoder: nn.Module | None,
        tokenizer: Callable,
        schedule: Schedule,
        seed: int,
        text_probability: float,
        condition_dropout: float,
        mixup: Mixup,
        latent_scale: float | None,
        allow_random_frozen: bool,
    ):
        super().__init__()
        self.mel = mel
        self.unet = unet.requires_grad_(True)  # one from a weights file is frozen
        self.vae = vae
        self.clap = clap
        self.vocoder = vocoder
        self.frozen = ("vae", "clap", "vocoder")
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.seed = seed
        self.text_probability = text_probability
        self.condition_dropout = condition_dropout
        self.mixup = mixup
        if mixup.prob > 0 and mixup.space == "latent" and vocoder is None and text_probability < 1:
            raise InputError(
                "mixup.space=latent: CLAP hears mixed latents through a vocoder, and vocoder is null"
            )
        self.empty_embed: Tensor | None = None
        self.register_buffer("latent_scale", torch.tensor(1.0 if latent_scale is None else latent_scale))
        self.is_scale_known = latent_scale is not None
        self.freeze_parts(allow_random=allow_random_frozen)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"unet": list(self.unet.parameters())}

    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def averaged(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def prepare(self, batches: Iterable[dict]) -> None:
        """Sets `latent_scale` to one over the standard deviation of the posterior over all of `batches`.

        Not for a network that began with another's weights: it knows that one's latents.
        Sum and sum of squares are kept in float64; the mean is subtracted, as in the original's std.
        """
        if self.is_scale_known:
            return
        count, total, squares = 0, 0.0, 0.0
        for batch in batches:
            mean, std = self.posterior(batch)
            count += mean.numel()
            total += mean.double().sum().item()
            squares += (mean.double() ** 2 + std.double() ** 2).sum().item()
        sums = torch.tensor([count, total, squares], dtype=torch.float64)
        count, total, squares = mean_over_ranks(sums).tolist()
        variance = squares / count - (total / count) ** 2
        if not variance > 0:
            raise InputError(
                f"the latents of the first batches have variance {variance}: is the vae trained?"
            )
        self.latent_scale.fill_(variance**-0.5)

    def start_from(self, networks: dict[str, nn.Module], *, latent_scale: float | None) -> None:
        super().start_from(networks, latent_scale=latent_scale)
        if latent_scale is not None:
            self.latent_scale.fill_(latent_scale)
            self.is_scale_known = True

    def losses(self, batch: dict, step: int) -> Iterator[Turn]:
        loss = self.diffusion_loss(batch, step)
        yield "unet", loss, {"diffusion": loss}

    def diffusion_loss(self, batch: dict, step: int) -> Tensor:
        """Mean squared error of the network's prediction at a random time step of each item."""
        rows = RowRandom([(self.seed, step, int(item)) for item in batch["item"]])
        mean, std = self.posterior(batch)
        z0 = self.latent_scale * (mean + std * rows.randn(*mean.shape[1:]).to(mean))  # (b, c, t, f)
        noise = rows.randn(*z0.shape[1:]).to(z0)
        timestep = rows.randint(self.schedule.num_timesteps).to(z0.device)
        embed = self.condition(batch, rows, z0)
        zt = self.schedule.add_noise(z0, noise, timestep)
        prediction = self.parallel(self.unet)(zt, timestep, embed)
        return F.mse_loss(prediction.to(z0.dtype), self.schedule.target(z0, noise, timestep))

    @torch.no_grad()
    def posterior(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (b, c, t, f) each, unscaled, those of pairs mixed."""
        mean, std = self.encoded(batch, "waveform", "z_mean", "z_std", rows=slice(None))
        mixed = mixed_rows(batch)
        if mixed is None:
            return mean, std
        partner = self.encoded(batch, "partner", "partner_z_mean", "partner_z_std", rows=mixed)
        found = mix_posteriors((mean[mixed], std[mixed]), partner, batch["mix_ratio"][mixed], self.mixup)
        return mean.index_copy(0, mixed, found[0]), std.index_copy(0, mixed, found[1])

    def encoded(
        self, batch: dict, heard: str, mean: str, std: str, rows: Tensor | slice
    ) -> tuple[Tensor, Tensor]:
        """Mean and deviation of some rows of a batch: from the cache, or the VAE's of a waveform."""
        if mean in batch:
            return batch[mean][rows], batch[std][rows]
        posterior = self.vae.encode(self.mel(batch[heard][rows]))
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def condition(self, batch: dict, rows: RowRandom, z0: Tensor) -> Tensor:
        """(b, d): the embedding of each item's caption or audio, or of "" where it is dropped.

        z0: (b, c, t, f) the scaled latents that the network learns from; what CLAP hears of a mixed one.
        """
        use_text = rows.rand().lt(self.text_probability).to(z0.device).unsqueeze(1)
        dropped = rows.rand().lt(self.condition_dropout).to(z0.device).unsqueeze(1)
        if self.text_probability >= 1.0:
            embed = self.text_embed(batch)
        elif self.text_probability <= 0.0:
            embed = self.audio_embed(batch, z0)
        else:
            embed = torch.where(use_text, self.text_embed(batch), self.audio_embed(batch, z0))
        if self.empty_embed is None:  # CLAP is frozen: once is enough
            self.empty_embed = self.embed_captions([""])
        return torch.where(dropped, self.empty_embed.to(embed), embed)

    def text_embed(self, batch: dict) -> Tensor:
        """(b, d) CLAP embedding of the captions."""
        own = batch["text_embed"] if "text_embed" in batch else self.embed_captions(batch["caption"])
        if self.mixup.text != "interpolate" or "partner_caption" not in batch:
            return own
        other = self.embed_captions(batch["partner_caption"])
        return F.normalize(torch.lerp(other, own, batch["mix_ratio"].to(own).unsqueeze(1)), dim=1)

    def embed_captions(self, captions: list[str]) -> Tensor:
        text_tokens, text_mask = self.tokenizer(captions)
        device = self.latent_scale.device
        return self.clap.embed_text(text_tokens.to(device), text_mask.to(device)).float()

    def audio_embed(self, batch: dict, z0: Tensor) -> Tensor:
        """(b, d) CLAP embedding of the batch's audio, resampled to CLAP's own rate."""
        mixed = mixed_rows(batch)
        if mixed is None:
            return batch["audio_embed"] if "audio_embed" in batch else self.embed_audio(batch["waveform"])
        if "audio_embed" in batch:
            return batch["audio_embed"].index_copy(0, mixed, self.embed_audio(self.heard(z0[mixed], None)))
        waveform = batch["waveform"]
        return self.embed_audio(
            waveform.index_copy(0, mixed, self.heard(z0[mixed], waveform.shape[-1]).to(waveform))
        )

    def embed_audio(self, waveform: Tensor) -> Tensor:
        return self.clap.embed_audio(
            resample_sinc(waveform, self.mel.sample_rate, self.clap.front_end.sample_rate)
        ).float()

    def heard(self, z0: Tensor, num_samples: int | None) -> Tensor:
        """(b, c, t, f) scaled latents -> (b, num_samples) what the decoder and the vocoder make of them.

        None: as many as the mel stands for; a vocoder gives some more, and they are cut.
        """
        mel = self.vae.decode(z0 / self.latent_scale)
        waveform = self.vocoder(mel).squeeze(1).float()
        length = mel.shape[-1] * self.mel.hop_length if num_samples is None else num_samples
        waveform = F.pad(waveform, (0, length - waveform.shape[-1]))  # negative: cuts
        return silence_tail(waveform) if self.mixup.condition_tail == "silent" else waveform

    def validate(self, batch: dict) -> Logs:
        return {"loss": self.diffusion_loss(batch, VALIDATION_STEP)}

    def preview(self, batch: dict) -> dict[str, Preview]:
        """Sounds for the captions of a validation batch: 25 DDIM steps, guidance 2.5."""
        captions = batch["caption"][:4]
        device = self.latent_scale.device
        embed = self.embed_captions([*captions, ""])
        denoiser = classifier_free(self.unet, embed[:-1], embed[-1:].expand_as(embed[:-1]), 2.5)
        shape = self.posterior(batch)[0].shape[1:]
        rows = RowRandom([(self.seed, VALIDATION_STEP, i) for i in range(len(captions))])
        z = rows.randn(*shape).to(device)
        steps = timestep_grid(25, self.schedule, "leading")
        z0 = partial(ddim, eta=0.0)(denoiser, z, steps, self.schedule, rows.randn)
        mel = self.vae.decode(z0 / self.latent_scale)
        if self.vocoder is None:
            return {f"{i}_{caption}": Preview(mel[i]) for i, caption in enumerate(captions)}
        waveform = self.vocoder(mel).squeeze(1)
        rate = self.mel.sample_rate
        return {f"{i}_{caption}": Preview(mel[i], waveform[i], rate) for i, caption in enumerate(captions)}


def mixed_rows(batch: dict) -> Tensor | None:
    """(b',) indices of the rows whose latents are to be mixed with their partners', None for none."""
    if "partner" not in batch and "partner_z_mean" not in batch:
        return None
    rows = (batch["mix_ratio"] < 1).nonzero().squeeze(1)
    return rows if len(rows) else None
