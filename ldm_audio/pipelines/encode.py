"""Encodes a data set once, so that training reads latents instead of making them at every step.

Item i always goes into shard i // shard_items. So several processes share the work by taking turns at shards,
a killed one goes on at the first shard that is missing, and the same data gives the same files. When the last
shard is there `index.json` says so; without it a folder is not complete.

Axes: b batch, s samples, c channels, t latent frames, f mel bins (of a latent), d width of an embedding.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_audio.audio.io import resample_sinc
from ldm_audio.audio.mel import LogMel
from ldm_audio.audio.mixup import Mixup, mix_posteriors, silence_tail
from ldm_audio.errors import InputError, RunError
from ldm_audio.files import replacing, write_json
from ldm_audio.pipelines.decoding import decode_latents

FORMAT = 2
INDEX = "index.json"
HEADER = "encoding"


class Encoder:
    """Batches of clips to what training needs of them.

    A batch holds `waveform` (b, s) and `caption`, or `captions`, several a clip; of pairs to be mixed as
    latents also `partner` (b, s) and `mix_ratio` (b,), for which a vocoder is needed. Where it holds
    `window`, one dict a clip, these are kept with the clips.

    clap: None makes latents alone, for training with texts that embeds them itself.
    """

    def __init__(
        self,
        *,
        mel: LogMel,
        vae: nn.Module,
        clap: nn.Module | None,
        vocoder: nn.Module | None,
        tokenizer: Callable | None,
        mixup: Mixup,
        device: str,
    ):
        if (clap is None) != (tokenizer is None):
            raise InputError("clap and tokenizer: give both, or leave both out (~clap ~tokenizer)")
        if mixup.prob > 0 and mixup.space == "latent" and clap is not None and vocoder is None:
            raise InputError(
                "mixup.space=latent: CLAP hears mixed latents through a vocoder, and vocoder is null"
            )
        if mixup.prob > 0 and mixup.text == "interpolate":
            raise InputError(
                "mixup.text=interpolate: cannot be encoded beforehand; anchor, louder and both can"
            )
        self.mel = mel
        self.device = torch.device(device)
        self.vae = vae.to(self.device)
        self.clap = None if clap is None else clap.to(self.device)
        self.vocoder = None if vocoder is None else vocoder.to(self.device)
        self.tokenizer = tokenizer
        self.mixup = mixup

    def __call__(self, batch: dict) -> tuple[dict[str, Tensor], list[dict]]:
        """`z_mean`, `z_std` (b, c, t, f) on the CPU, with CLAP `audio_embed` (b, d), and a dict a clip."""
        waveform = batch["waveform"].to(self.device)
        posterior = self.vae.encode(self.mel(waveform))
        mean, std = posterior.mean.float(), posterior.std.float()
        if "partner" in batch and len(rows := (batch["mix_ratio"] < 1).nonzero().squeeze(1)):
            partner = self.vae.encode(self.mel(batch["partner"][rows].to(self.device)))
            rows, ratio = rows.to(self.device), batch["mix_ratio"][rows].to(self.device)
            both = (mean[rows], std[rows]), (partner.mean.float(), partner.std.float())
            mixed = mix_posteriors(*both, ratio, self.mixup)
            mean, std = mean.index_copy(0, rows, mixed[0]), std.index_copy(0, rows, mixed[1])
            if self.clap is not None:
                heard, _ = decode_latents(self.vae, self.vocoder, mixed[0], 1.0, waveform.shape[-1])
                heard = silence_tail(heard) if self.mixup.condition_tail == "silent" else heard
                waveform = waveform.index_copy(0, rows, heard)
        tensors = {"z_mean": mean, "z_std": std}
        if self.clap is not None:
            heard = resample_sinc(waveform, self.mel.sample_rate, self.clap.front_end.sample_rate)
            tensors["audio_embed"] = self.clap.embed_audio(heard).float()
        captions = batch["captions"] if "captions" in batch else [[caption] for caption in batch["caption"]]
        windows = batch.get("window", [{}] * len(waveform))
        clips = [{"captions": list(texts), **window} for texts, window in zip(captions, windows)]
        return {name: tensor.cpu() for name, tensor in tensors.items()}, clips

    def text_embeds(self, captions: list[str]) -> Tensor:
        """(number of captions, d), equal captions embedded once."""
        unique = list(dict.fromkeys(captions))
        parts = []
        for start in range(0, len(unique), 64):
            tokens, mask = self.tokenizer(unique[start : start + 64])
            parts.append(self.clap.embed_text(tokens.to(self.device), mask.to(self.device)).float().cpu())
        place = {caption: row for row, caption in enumerate(unique)}
        return torch.cat(parts)[[place[caption] for caption in captions]]


@torch.inference_mode()
def encode(
    read: Callable[[list[range]], Iterable[dict]],
    count: int,
    folder: Path,
    *,
    encoder: Encoder,
    made_by: dict[str, str],
    batch_size: int,
    shard_items: int,
    part: int,
    parts: int,
    progress: Callable[[int], None],
) -> int:
    """Writes the shards of `count` clips that `folder` lacks and returns how many clips they hold.

    read: gives a batch for each range of item numbers. made_by: hashes of what decides the latents. part:
    which of `parts` processes this is. Calls `progress(clips)` as clips are done.

    Raises InputError where the folder holds latents that were made by something else, RunError for a full
    disk.
    """
    ranges = [range(start, min(start + shard_items, count)) for start in range(0, count, shard_items)]
    names = [f"shard_{number:05d}.safetensors" for number in range(len(ranges))]
    surplus = {path.name for path in folder.glob("shard_*.safetensors")} - set(names)
    if surplus:
        raise InputError(
            f"{folder}: holds {min(surplus)} of a longer encoding; choose another out= or remove it"
        )
    missing = [n for n in range(len(names))[part::parts] if not is_whole(folder / names[n], made_by)]
    progress(sum(len(ranges[n]) for n in range(len(names))[part::parts] if n not in missing))
    batches = iter(
        read([piece for number in missing for piece in split_range(ranges[number], batch_size)])
        if missing
        else []
    )
    for number in missing:
        write_shard(folder / names[number], batches, len(ranges[number]), encoder, made_by, progress)
    if all((folder / name).exists() for name in names):
        write_json(folder / INDEX, {"format": FORMAT, "clips": count, "shards": names, "made_by": made_by})
    return sum(len(ranges[number]) for number in missing)


def split_range(items: range, size: int) -> list[range]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def write_shard(
    path: Path,
    batches: Iterator[dict],
    count: int,
    encoder: Encoder,
    made_by: dict[str, str],
    progress: Callable[[int], None],
) -> None:
    """Encodes `count` clips into one file, which appears when it is whole."""
    parts: dict[str, list[Tensor]] = {}
    clips: list[dict] = []
    while len(clips) < count:
        tensors, described = encoder(next(batches))
        for name, tensor in tensors.items():
            parts.setdefault(name, []).append(tensor)
        clips += described
        progress(len(described))
    tensors = {name: torch.cat(rows).contiguous() for name, rows in parts.items()}
    if encoder.clap is not None:
        tensors["text_embed"] = encoder.text_embeds([text for clip in clips for text in clip["captions"]])
    # one entry: safetensors writes several in an order that changes from run to run
    header = {HEADER: json.dumps({"format": FORMAT, "made_by": made_by, "clips": clips})}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=header)
    except SafetensorError as error:
        raise RunError(f"{path}: not written ({error}); the shards before it are kept") from error


def is_whole(path: Path, made_by: dict[str, str]) -> bool:
    """Whether a shard is there and readable; InputError where it was made by something else."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(HEADER, "{}")).get("made_by", {})
    except SafetensorError:
        return False
    for name in made_by:
        if found.get(name) != made_by[name]:
            raise InputError(
                f"{path}: made with another {name} ({found.get(name)}, now {made_by[name]}); choose another "
                "out= or remove its folder"
            )
    return True


def state_hash(state: Mapping[str, Tensor]) -> str:
    """Hash of a network's parameters and buffers; equal weights give equal hashes on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name]
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_hash(settings: object) -> str:
    """Hash of plain settings (dicts, lists, numbers, strings), whatever their order."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
