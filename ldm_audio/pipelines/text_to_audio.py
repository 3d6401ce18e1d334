"""Text to sound as AudioLDM (arXiv 2301.12503) and MusicLDM (arXiv 2308.01546) do it.

The prompt's CLAP text embedding steers the diffusion of mel latents, which the VAE and the vocoder turn into
sound. As in both, the network's unconditional embedding is CLAP's of "", and several candidates of a prompt
are ranked by CLAP's similarity of sound and condition. Departures: candidates compete within their prompt
only (diffusers: across prompts), no prompt is dropped at random (the original drops a tenth), every row has
its own noise, so that a prompt and a seed give the same sound in any batch, and a sound longer than the
network knows is denoised in overlapping windows.

Axes: b = p k rows (a prompt's candidates side by side), c channels, d width, f mel bins (of the latent or the
mel), k candidates, n mel frames, p prompts, s samples, t latent frames.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from ldm_audio.audio.io import resample_sinc
from ldm_audio.audio.mel import LogMel
from ldm_audio.diffusion.guidance import classifier_free
from ldm_audio.diffusion.samplers import Spacing, timestep_grid
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.diffusion.windows import windowed
from ldm_audio.errors import InputError
from ldm_audio.layers import PackedNarrowConv, can_pack, pack_linears
from ldm_audio.pipelines.decoding import decode_latents
from ldm_audio.randomness import RowRandom

Tokenizer = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
Progress = Callable[[int, int], None]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Generated:
    """Sounds, prompt by prompt, the best first where there were several candidates; tensors on the CPU."""

    waveforms: Tensor  # (b, s) float32 in [-1, 1]
    mels: Tensor  # (b, f, n) float32 natural-log, what the vocoder was given
    scores: Tensor | None  # (b,) cosine of sound and condition, where candidates were ranked
    prompts: list[str]  # one a row; "" where the condition was given as an embedding
    seeds: list[tuple[int, int]]  # (seed, candidate) of each row
    embeds: Tensor  # (b, d) the conditions, as `prompt_embeds` takes them


@dataclass(frozen=True)
class Source:
    """What an edit begins with; see `pipelines.editing`."""

    z0: Tensor  # (c, t, f) latents of the sound that is edited, as the diffusion knows them
    num_samples: int  # of the result
    strength: float  # how much of the schedule is run, in (0, 1]; 1 starts from noise
    keep_mask: Tensor | None  # (t, f) bool, True = held to z0 while the rest is denoised
    finish: Callable[[Tensor], Tensor]  # (b, s) what the networks made -> (b, s) with what must be kept
    one_step_noisier: bool = False  # start at the noise of the grid's step before, as AudioLDM does


class Edit(Protocol):
    """A manipulation of a recording, see `pipelines.editing`."""

    def prepare(self, pipeline: "TextToAudio", duration: float | None) -> Source:
        """Reads and encodes the recording; duration: seconds of the result, None: the recording's."""


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

    @property
    def dtype(self) -> torch.dtype:
        """What latents and conditions are computed in, whatever the networks are: float32 at least."""
        return torch.promote_types(next(self.unet.parameters()).dtype, torch.float32)

    def to(self, device: str | torch.device) -> Self:
        """Moves the networks, in place; returns the pipeline."""
        for network in (self.unet, self.vae, self.vocoder, self.clap):
            network.to(device)
        return self

    def set_precision(self, precision: str) -> Self:
        """`fp32`, or `bf16` for the UNet, the VAE and the vocoder, in place; CLAP and latents stay fp32."""
        if precision not in PRECISIONS:
            raise InputError(f"precision={precision!r}: expected {' or '.join(PRECISIONS)}")
        for network in (self.unet, self.vae, self.vocoder):
            network.to(PRECISIONS[precision])
        return self

    def pack(self) -> Self:
        """Orders the weights of the UNet and the VAE's decoder for the device, in place: they only sample.

        Channels last in all maps; on the CPU, oneDNN's own order for what allows it. The VAE's encoder stays
        as it is, and in its file, for most sounds need none.
        """
        if self.device.type == "cpu":
            pack_unet(self.unet, self.latent_shape(1)[-1])
            pack_linears(self.vae.decoder)
        for network in (self.unet, self.vae.decoder):
            network.to(memory_format=torch.channels_last)
        return self

    def forget_text(self) -> Self:
        """Drops CLAP's text tower, and its memory: from here on conditions are given as embeddings."""
        self.clap.text_tower = self.clap.text_projection = None
        return self

    def compile(self) -> Self:
        """Compiles the UNet, the VAE's decoder and the vocoder, in place: a slow start, then faster."""
        for network in (self.unet, self.vae.decoder, self.vocoder):
            network.compile()
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str] | None = None,
        *,
        duration: float | None,
        num_steps: int,
        guidance_scale: float,
        sampler: Callable[..., Tensor],
        spacing: Spacing,
        seed: int | Sequence[int],
        batch_size: int,
        prompt_embeds: Tensor | None = None,
        negative_prompts: Sequence[str] | None = None,
        negative_embeds: Tensor | None = None,
        num_waveforms_per_prompt: int = 1,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[int, int] | None = None,
        latents: Tensor | None = None,
        edit: Edit | None = None,
        window: float = 10.24,
        overlap: float = 2.56,
        decode_window: float | None = None,
        progress: Progress | None = None,
    ) -> Generated:
        """p prompts, or p embeddings (p, d) instead -> p * num_waveforms_per_prompt sounds.

        duration: seconds, to the nearest sample; None: as long as the sound that is edited.
        sampler: of `diffusion.samplers`, its own settings bound: `functools.partial(ddim, eta=1.0)`.
        batch_size: rows at a time (guidance doubles them in the network).
        negative_prompts: one a prompt, in place of "", or their embeddings (p, d) as negative_embeds.
        seed: of all prompts, or one each; a row's noise depends on it and on the number of the candidate
        alone: prompts of one seed begin with the same noise.
        guidance_*: see `classifier_free`. latents: (b, c, t, f) noise to begin with in place of the seed's.
        edit: changes a recording instead of beginning from nothing, see `pipelines.editing`.
        window, overlap: seconds; what is longer is denoised in windows, see `diffusion.windows`.
        decode_window: seconds that the VAE decodes at a time; None: all, see `pipelines.decoding`.
        progress: called with the sampling steps done and their total.

        Raises InputError for what cannot be sampled; the message names the argument.
        """
        self.check_texts(prompts, prompt_embeds, negative_prompts, negative_embeds)
        self.check_counts(num_waveforms_per_prompt, batch_size)
        timesteps = timestep_grid(num_steps, self.schedule, spacing)
        source = None if edit is None else edit.prepare(self, duration)
        num_samples = self.num_samples(duration) if source is None else source.num_samples
        shape = self.latent_shape(num_samples)
        steps, noise_level = (
            (timesteps, None) if source is None else shortened(timesteps, self.schedule.num_timesteps, source)
        )

        embed = self.embed(prompts, batch_size) if prompt_embeds is None else prompt_embeds
        embed = embed.to(self.device, self.dtype)
        if negative_embeds is None:
            negative_embeds = self.embed(negative_prompts or [""], batch_size)
        negative = negative_embeds.to(embed).expand_as(embed)
        num_prompts, candidates = len(embed), num_waveforms_per_prompt
        embed, negative = (repeat(rows, "p d -> (p k) d", k=candidates) for rows in (embed, negative))
        seeds = [seed] * num_prompts if isinstance(seed, int) else list(seed)
        if len(seeds) != num_prompts:
            raise InputError(f"{len(seeds)} seeds for {num_prompts} prompts")
        keys = [(number, candidate) for number in seeds for candidate in range(candidates)]
        if latents is not None and latents.shape != (len(keys), *shape):
            raise InputError(f"latents {tuple(latents.shape)}: expected {(len(keys), *shape)}")

        per_frame = self.vae.downsample * self.mel.hop_length / self.mel.sample_rate  # seconds
        guide = partial(
            classifier_free,
            windowed(self.predict, window=round(window / per_frame), overlap=round(overlap / per_frame)),
            guidance_scale=guidance_scale,
            rescale=guidance_rescale,
            interval=guidance_interval,
        )
        decode_frames = None if decode_window is None else round(decode_window / per_frame)
        done, total = itertools.count(), len(steps) * math.ceil(len(keys) / batch_size)

        waveforms, mels, scores = [], [], []
        for start in range(0, len(keys), batch_size):
            chunk = slice(start, start + batch_size)
            rows = RowRandom(keys[chunk])
            z = (rows.randn(*shape) if latents is None else latents[chunk]).to(embed)
            hold = None
            if source is not None:
                z, hold = self.begin_edit(source, z, noise_level, rows)

            def before_step(zt: Tensor, timestep: Tensor, hold: Callable | None = hold) -> Tensor:
                if progress is not None:
                    progress(next(done), total)
                return zt if hold is None else hold(zt, timestep)

            denoiser = guide(embed[chunk], negative[chunk])
            z0 = sampler(denoiser, z, steps, self.schedule, rows.randn, before_step)
            if source is not None and source.keep_mask is not None:
                z0 = torch.where(source.keep_mask, source.z0, z0)
            waveform, mel = decode_latents(
                self.vae, self.vocoder, z0, self.latent_scale, num_samples, decode_window=decode_frames
            )
            waveform = waveform.to(self.dtype)
            if source is not None:
                waveform = source.finish(waveform)
                mel = self.mel(waveform)
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
            embeds=embed.float().cpu(),
        )
        return best_first(generated, candidates) if candidates > 1 else generated

    def predict(self, zt: Tensor, timestep: Tensor, embed: Tensor) -> Tensor:
        """The UNet in its own precision, (b, c, t, f) in and out as `zt` is."""
        dtype = next(self.unet.parameters()).dtype
        return self.unet(zt.to(dtype), timestep, embed.to(dtype)).to(zt)

    def begin_edit(
        self, source: Source, noise: Tensor, noise_level: int | None, rows: RowRandom
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor] | None]:
        """(b, c, t, f) the latents an edit starts from, and what holds its mask before each step, if any.

        The held part is the source at the step's own noise, drawn anew each time as in AudioLDM's masked
        sampling. noise_level: the time step to noise the source to; None starts from `noise` alone.
        """
        z0 = source.z0.expand_as(noise)

        def noisy(noise: Tensor, timestep: Tensor) -> Tensor:
            return self.schedule.add_noise(z0, noise, timestep)

        def hold(zt: Tensor, timestep: Tensor) -> Tensor:
            held = noisy(rows.randn(*zt.shape[1:]).to(zt), timestep)
            return torch.where(source.keep_mask, held, zt)

        start = noise if noise_level is None else noisy(noise, torch.full((len(noise),), noise_level))
        return start, None if source.keep_mask is None else hold

    def check_texts(
        self,
        prompts: Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompts: Sequence[str] | None,
        negative_embeds: Tensor | None,
    ) -> None:
        """InputError for texts and embeddings that are none, or do not fit each other."""
        if (prompts is None) == (prompt_embeds is None):
            raise InputError("expected either prompts or prompt_embeds, one of them")
        if negative_prompts is not None and negative_embeds is not None:
            raise InputError("expected either negative_prompts or negative_embeds, not both")
        for name, texts in (("prompts", prompts), ("negative_prompts", negative_prompts)):
            if isinstance(texts, str):
                raise InputError(f"{name}={texts!r}: expected a list of strings")
            for i, text in enumerate(texts or []):
                if not isinstance(text, str):
                    raise InputError(f"{name}[{i}]={text!r}: expected a string")
        given = prompts if prompt_embeds is None else prompt_embeds
        if len(given) == 0:
            raise InputError("prompts is empty: expected at least one")
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_embeds", negative_embeds)):
            if embeds is not None and embeds.shape[1:] != (self.clap.joint_dim,):
                raise InputError(f"{name} {tuple(embeds.shape)}: expected (prompts, {self.clap.joint_dim})")
        for name, negatives in (("negative_prompts", negative_prompts), ("negative_embeds", negative_embeds)):
            if negatives is not None and len(negatives) != len(given):
                raise InputError(f"{len(negatives)} {name} for {len(given)} prompts")

    def check_counts(self, num_waveforms_per_prompt: int, batch_size: int) -> None:
        """InputError for numbers below 1, and for candidates that nothing can rank."""
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

    def num_samples(self, duration: float | None) -> int:
        """Seconds to samples; InputError where that is none."""
        if duration is None or not math.isfinite(duration) or round(duration * self.mel.sample_rate) < 1:
            raise InputError(f"duration={duration}: expected seconds, more than 0")
        return round(duration * self.mel.sample_rate)

    def latent_shape(self, num_samples: int) -> tuple[int, int, int]:
        """(c, t, f) of a waveform's latents: whole mel frames, rounded up to whole latent frames."""
        frames = math.ceil(num_samples / self.mel.hop_length)
        bins = self.mel.n_mels // self.vae.in_channels
        downsample = self.vae.downsample
        return self.vae.latent_channels, math.ceil(frames / downsample), bins // downsample

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """CLAP's text embeddings, (p, d), as `prompt_embeds` takes them."""
        rows = []
        for start in range(0, len(texts), batch_size):
            text_tokens, text_mask = self.tokenizer(texts[start : start + batch_size])
            rows.append(self.clap.embed_text(text_tokens.to(self.device), text_mask.to(self.device)))
        return torch.cat(rows)

    @torch.no_grad()
    def embed_audio(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """(b, s) sounds -> (b, d): CLAP's audio embeddings, which condition like those of texts.

        Of a sound longer than CLAP hears at once, the mean over its pieces, of length 1 again.
        """
        heard = resample_sinc(waveform.to(self.device).float(), sample_rate, self.clap.front_end.sample_rate)
        longest = self.clap.front_end.max_samples
        pieces = [heard] if self.clap.front_end.fusion else heard.split(longest, dim=1)
        pieces = [piece for piece in pieces if piece.shape[1] >= longest // 2 or len(pieces) == 1]
        embeds = torch.stack([self.clap.embed_audio(piece) for piece in pieces])
        return F.normalize(reduce(embeds, "piece b d -> b d", "mean"), dim=-1)

    def similarity(self, waveform: Tensor, embed: Tensor) -> Tensor:
        """(b, s) sounds and their conditions (b, d) -> (b,) cosines in CLAP's joint space."""
        return F.cosine_similarity(self.embed_audio(waveform, self.mel.sample_rate), embed)


def pack_unet(unet: nn.Module, bins: int) -> None:
    """Prepares a UNet for inference on the CPU with latents of `bins` mel bins, in place.

    See `layers.pack_linears`; besides, where the deepest level is one or two bins wide, its convolutions
    become matrix products.
    """
    narrowest = math.ceil(bins / 2 ** (len(unet.down) - 1))
    if narrowest <= 2 and can_pack(unet.conv_in.weight):
        for block in (*unet.down[-1].blocks, *unet.mid, *unet.up[0].blocks):
            block.res.conv1 = PackedNarrowConv(block.res.conv1, narrowest)
            block.res.conv2 = PackedNarrowConv(block.res.conv2, narrowest)
    pack_linears(unet)


def shortened(timesteps: Tensor, num_timesteps: int, source: Source) -> tuple[Tensor, int | None]:
    """The steps of a grid in the last `strength` of the schedule, and the time step to noise the source to.

    One step at least. The source is noised to the first one left; AudioLDM's style transfer noises it to the
    one before that (and fails at strength 1, where there is none: here it is the first).
    """
    if source.strength == 1 and source.keep_mask is not None:
        return timesteps, None
    skipped = min(int((timesteps >= source.strength * num_timesteps).sum()), len(timesteps) - 1)
    level = max(0, skipped - 1) if source.one_step_noisier else skipped
    return timesteps[skipped:], int(timesteps[level])


def interpolate(embeds: Tensor, num: int) -> Tensor:
    """(p, d) embeddings of length 1 -> ((p - 1) (num + 1) + 1, d): `num` more between each and the next.

    Evenly along the great circle. Raises InputError for less than two embeddings.
    """
    if len(embeds) < 2:
        raise InputError(f"{len(embeds)} embeddings: expected two or more to interpolate between")
    share = torch.arange(num + 1, device=embeds.device, dtype=embeds.dtype)[:, None] / (num + 1)
    legs = []
    for start, end in itertools.pairwise(embeds):
        angle = torch.acos((start @ end).clamp(-1, 1))
        if angle.sin() < 1e-6:  # the same, or opposite: a straight line
            legs.append(start + share * (end - start))
        else:
            legs.append((((1 - share) * angle).sin() * start + (share * angle).sin() * end) / angle.sin())
    return torch.cat([*legs, embeds[-1:]])


def best_first(generated: Generated, candidates: int) -> Generated:
    """The same rows, the `candidates` of each prompt by falling score."""
    scores = rearrange(generated.scores, "(p k) -> p k", k=candidates)
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = rearrange(order + candidates * torch.arange(len(scores))[:, None], "p k -> (p k)")
    return replace(
        generated,
        waveforms=generated.waveforms[order],
        mels=generated.mels[order],
        scores=generated.scores[order],
        seeds=[generated.seeds[row] for row in order],
    )
