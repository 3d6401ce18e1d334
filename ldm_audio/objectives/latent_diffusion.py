"""Latent diffusion under a CLAP embedding: AudioLDM (2301.12503, section 3.1, equation 4).

The embedding of the audio itself may train the network and the embedding of a text steer it ("audio embedding
at training, text embedding at sampling"); which of them is used is a setting and not a switch hidden in the
code. Departures from the original: CLAP stays in eval mode, the condition is dropped by one rule for each
item (the original stacks two), and `latent_scale` comes from several batches.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_audio.audio.io import resample_sinc
from ldm_audio.audio.mel import LogMel
from ldm_audio.diffusion.guidance import classifier_free
from ldm_audio.diffusion.samplers import ddim, timestep_grid
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.errors import InputError
from ldm_audio.objectives.base import Logs, Objective, Preview, Turn
from ldm_audio.randomness import RowRandom

VALIDATION_STEP = -1  # the "step" of validation's own random streams: the same noise at every validation


class LatentDiffusionObjective(Objective):
    """Trains `unet` on the latents of `vae`, conditioned on `clap`; all but the UNet are frozen.

    text_probability: share of items conditioned on their caption's embedding, the others on their audio's.
    condition_dropout: share of items whose condition becomes the embedding of "" (classifier-free guidance).
    Batches hold `waveform` (b, s), or `z_mean`, `z_std` (b, c, t, f) and `audio_embed` (b, d) from a cache.
    """

    accumulable = True

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
        self.register_buffer("latent_scale", torch.tensor(1.0))
        self.is_scale_known = False
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
        embed = self.condition(batch, rows)
        prediction = self.unet(self.schedule.add_noise(z0, noise, timestep), timestep, embed)
        return F.mse_loss(prediction.to(z0.dtype), self.schedule.target(z0, noise, timestep))

    @torch.no_grad()
    def posterior(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (b, c, t, f) each, unscaled."""
        if "z_mean" in batch:
            return batch["z_mean"], batch["z_std"]
        posterior = self.vae.encode(self.mel(batch["waveform"]))
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def condition(self, batch: dict, rows: RowRandom) -> Tensor:
        """(b, d): the embedding of each item's caption or audio, or of "" where it is dropped."""
        use_text = rows.rand().lt(self.text_probability)
        dropped = rows.rand().lt(self.condition_dropout)
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"])]
        text_tokens, text_mask = self.tokenizer(captions)
        device = self.latent_scale.device
        embed = self.clap.embed_text(text_tokens.to(device), text_mask.to(device)).float()
        if self.text_probability >= 1.0:
            return embed
        use_text = (use_text | dropped).to(device).unsqueeze(1)
        return torch.where(use_text, embed, self.audio_embed(batch))

    def audio_embed(self, batch: dict) -> Tensor:
        """(b, d) CLAP embedding of the batch's audio, resampled to CLAP's own rate."""
        if "audio_embed" in batch:
            return batch["audio_embed"]
        waveform = resample_sinc(batch["waveform"], self.mel.sample_rate, self.clap.front_end.sample_rate)
        return self.clap.embed_audio(waveform).float()

    def validate(self, batch: dict) -> Logs:
        return {"loss": self.diffusion_loss(batch, VALIDATION_STEP)}

    def preview(self, batch: dict) -> dict[str, Preview]:
        """Sounds for the captions of a validation batch: 25 DDIM steps, guidance 2.5."""
        captions = batch["caption"][:4]
        device = self.latent_scale.device
        tokens, mask = self.tokenizer([*captions, ""])
        embed = self.clap.embed_text(tokens.to(device), mask.to(device))
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
