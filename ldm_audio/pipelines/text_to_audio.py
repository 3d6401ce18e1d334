"""Text to sound as AudioLDM (arXiv 2301.12503) and MusicLDM (arXiv 2308.01546) do it.

The prompt's CLAP text embedding steers the diffusion of mel latents, which the VAE and the vocoder turn into
sound. As in both, the network's unconditional embedding is CLAP's of "", and several candidates of a prompt
are ranked by CLAP's similarity of sound and condition. Departures: candidates compete within their prompt
only (diffusers: across prompts), no prompt is dropped at random (the original drops a tenth), and every row
has its own noise, so that a prompt and a seed give the same sound in any batch.

Axes: p prompts, k candidates, b = p k rows (a prompt's candidates side by side), d width, f mel bins,
n mel frames, s samples.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm_audio.audio.io import resample_sinc
from ldm_audio.audio.mel import LogMel
from ldm_audio.diffusion.guidance import classifier_free
from ldm_audio.diffusion.samplers import Spacing, timestep_grid
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.errors import InputError
from ldm_audio.pipelines.decoding import decode_latents
from ldm_audio.randomness import RowRandom

Tokenizer = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Generated:
    """Sounds, prompt by prompt, the best first where there were several candidates; tensors on the CPU."""

    waveforms: Tensor  # (b, s) float32 in [-1, 1]
    mels: Tensor  # (b, f, n) float32 natural-log, what the vocoder was given
    scores: Tensor | None  # (b,) cosine of sound and condition, where candidates were ranked
    prompts: list[str]  # one a row; "" where the condition was given as an embedding
    seeds: list[tuple[int, int]]  # (seed, candidate) of each row


class TextToAudio:
    """Holds the parts, which it puts into eval mode; a call turns prompts into sounds.

    clap: has `embed_text`, `joint_dim` and, to rank candidates, `audio_tower`, `front_end`, `embed_audio`.
    mel: what the VAE and the vocoder were trained on; it gives sample rate, hop and number of bins.
    latent_scale: the diffusion's latents are the VAE's times this.
    """

    def __init__(
        self,
        *,
        unet: nn.Module,
        vae: nn.Module,
        vocoder: nn.Module,
        clap: nn.Module,
        tokenizer: Tokenizer,
        schedule: Schedule,
        mel: LogMel,
        latent_scale: float,
    ):
        if vocoder.hop_length != mel.hop_length:
            raise InputError(f"the vocoder's hop is {vocoder.hop_length} samples, the mel's {mel.hop_length}")
        self.unet = unet.eval()
        self.vae = vae.eval()
        self.vocoder = vocoder.eval()
        self.clap = clap.eval()
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.mel = mel
        self.latent_scale = latent_scale

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.unet.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Moves the networks, in place; returns the pipeline."""
        for network in (self.unet, self.vae, self.vocoder, self.clap):
            network.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str] | None = None,
        *,
        duration: float,
        num_steps: int,
        guidance_scale: float,
        sampler: Callable[..., Tensor],
        spacing: Spacing,
        seed: int,
        batch_size: int,
        prompt_embeds: Tensor | None = None,
        negative_prompts: Sequence[str] | None = None,
        num_waveforms_per_prompt: int = 1,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[int, int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generated:
        """p prompts, or p embeddings (p, d) instead -> p * num_waveforms_per_prompt sounds.

        duration: seconds, to the nearest sample. sampler: of `diffusion.samplers`, its own settings bound:
        `functools.partial(ddim, eta=1.0)`. batch_size: rows at a time (guidance doubles them in the network).
        negative_prompts: one a prompt, in place of "". seed: a row's noise depends on it and on the number of
        the candidate alone: different prompts begin with the same noise. guidance_*: see `classifier_free`.
        progress: called with the sampling steps done and their total.

        Raises InputError for what cannot be sampled; the message names the argument.
        """
        self.check(prompts, prompt_embeds, negative_prompts, duration, num_waveforms_per_prompt, batch_size)
        timesteps = timestep_grid(num_steps, self.schedule, spacing)
        num_samples = round(duration * self.mel.sample_rate)
        shape = self.latent_shape(num_samples)

        place = next(self.unet.parameters())  # its device and dtype are the sampling's
        embed = (self.embed(prompts, batch_size) if prompt_embeds is None else prompt_embeds).to(place)
        negative = self.embed([""] if negative_prompts is None else negative_prompts, batch_size).to(place)
        negative = negative.expand_as(embed)
        num_prompts, candidates = len(embed), num_waveforms_per_prompt
        embed, negative = (repeat(rows, "p d -> (p k) d", k=candidates) for rows in (embed, negative))
        keys = [(seed, candidate) for _ in range(num_prompts) for candidate in range(candidates)]

        guide = partial(
            classifier_free,
            self.unet,
            guidance_scale=guidance_scale,
            rescale=guidance_rescale,
            interval=guidance_interval,
        )
        done, total = itertools.count(), num_steps * math.ceil(len(keys) / batch_size)

        def report(zt: Tensor, timestep: Tensor) -> Tensor:
            if progress is not None:
                progress(next(done), total)
            return zt

        waveforms, mels, scores = [], [], []
        for start in range(0, len(keys), batch_size):
            chunk = slice(start, start + batch_size)
            rows = RowRandom(keys[chunk])
            z = rows.randn(*shape).to(embed)
            denoiser = guide(embed[chunk], negative[chunk])
            z0 = sampler(denoiser, z, timesteps, self.schedule, rows.randn, report)
            waveform, mel = decode_latents(self.vae, self.vocoder, z0, self.latent_scale, num_samples)
            waveforms.append(waveform.float().cpu())
            mels.append(mel.float().cpu())
            if candidates > 1:
                scores.append(self.similarity(waveform, embed[chunk]).float().cpu())
        if progress is not None:
            progress(total, total)

        generated = Generated(
            waveforms=torch.cat(waveforms),
            mels=torch.cat(mels),
            scores=torch.cat(scores) if scores else None,
            prompts=[prompt for prompt in prompts or [""] * num_prompts for _ in range(candidates)],
            seeds=keys,
        )
        return best_first(generated, candidates) if candidates > 1 else generated

    def check(
        self,
        prompts: Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompts: Sequence[str] | None,
        duration: float,
        num_waveforms_per_prompt: int,
        batch_size: int,
    ) -> None:
        """InputError for the arguments that nothing further down looks at."""
        if (prompts is None) == (prompt_embeds is None):
            raise InputError("expected either prompts or prompt_embeds, one of them")
        for name, texts in (("prompts", prompts), ("negative_prompts", negative_prompts)):
            if isinstance(texts, str):
                raise InputError(f"{name}={texts!r}: expected a list of strings")
            for i, text in enumerate(texts or []):
                if not isinstance(text, str):
                    raise InputError(f"{name}[{i}]={text!r}: expected a string")
        given = prompts if prompt_embeds is None else prompt_embeds
        if len(given) == 0:
            raise InputError("prompts is empty: expected at least one")
        if prompt_embeds is not None and prompt_embeds.shape[1:] != (self.clap.joint_dim,):
            shape = tuple(prompt_embeds.shape)
            raise InputError(f"prompt_embeds {shape}: expected (prompts, {self.clap.joint_dim})")
        if negative_prompts is not None and len(negative_prompts) != len(given):
            raise InputError(f"{len(negative_prompts)} negative_prompts for {len(given)} prompts")
        if not math.isfinite(duration) or round(duration * self.mel.sample_rate) < 1:
            raise InputError(f"duration={duration}: expected seconds, more than 0")
        for name, value in (
            ("num_waveforms_per_prompt", num_waveforms_per_prompt),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise InputError(f"{name}={value}: expected 1 or more")
        if num_waveforms_per_prompt > 1 and self.clap.audio_tower is None:
            raise InputError(
                f"num_waveforms_per_prompt={num_waveforms_per_prompt}: this system's CLAP has no audio tower "
                "to rank candidates with, expected 1"
            )

    def latent_shape(self, num_samples: int) -> tuple[int, int, int]:
        """(c, t, f) of a waveform's latents: whole mel frames, rounded up to whole latent frames."""
        frames = math.ceil(num_samples / self.mel.hop_length)
        bins = self.mel.n_mels // self.vae.in_channels
        downsample = self.vae.downsample
        return self.vae.latent_channels, math.ceil(frames / downsample), bins // downsample

    def embed(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """CLAP's text embeddings, (p, d)."""
        rows = []
        for start in range(0, len(texts), batch_size):
            text_tokens, text_mask = self.tokenizer(texts[start : start + batch_size])
            rows.append(self.clap.embed_text(text_tokens.to(self.device), text_mask.to(self.device)))
        return torch.cat(rows)

    def similarity(self, waveform: Tensor, embed: Tensor) -> Tensor:
        """(b, s) sounds and their conditions (b, d) -> (b,) cosines in CLAP's joint space."""
        heard = resample_sinc(waveform.float(), self.mel.sample_rate, self.clap.front_end.sample_rate)
        return F.cosine_similarity(self.clap.embed_audio(heard), embed)


def best_first(generated: Generated, candidates: int) -> Generated:
    """The same rows, the `candidates` of each prompt by falling score."""
    scores = rearrange(generated.scores, "(p k) -> p k", k=candidates)
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = rearrange(order + candidates * torch.arange(len(scores))[:, None], "p k -> (p k)")
    return Generated(
        waveforms=generated.waveforms[order],
        mels=generated.mels[order],
        scores=generated.scores[order],
        prompts=generated.prompts,
        seeds=[generated.seeds[row] for row in order],
    )
