"""Encodes a data set once, so that training reads latents instead of making them at every step."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_audio.audio.io import resample_sinc
from ldm_audio.audio.mel import LogMel
from ldm_audio.files import replacing


@torch.inference_mode()
def encode(
    batches: Iterable[dict],
    folder: Path,
    *,
    mel: LogMel,
    vae: nn.Module,
    clap: nn.Module,
    shard_items: int,
    progress: Callable[[int], None],
) -> int:
    """Writes `folder/shard_00000.safetensors` and so on from batches of `waveform` and `caption`.

    Returns the number of clips; calls `progress(clips)` after each batch. A shard is written to a temporary
    name and renamed; those of an earlier encoding into the same folder are removed.
    """
    for earlier in folder.glob("shard_*.safetensors"):
        earlier.unlink()
    encoders = {"vae": state_hash(vae), "clap": state_hash(clap)}
    rows: dict[str, list[Tensor]] = {"z_mean": [], "z_std": [], "audio_embed": []}
    captions: list[str] = []
    shards = count = 0

    def flush() -> None:
        nonlocal shards
        tensors = {name: torch.cat(parts).contiguous() for name, parts in rows.items()}
        header = {"captions": json.dumps(captions), "encoders": json.dumps(encoders)}
        with replacing(folder / f"shard_{shards:05d}.safetensors") as temporary:
            save_file(tensors, temporary, metadata=header)
        shards += 1
        captions.clear()
        for parts in rows.values():
            parts.clear()

    for batch in batches:
        waveform = batch["waveform"]
        posterior = vae.encode(mel(waveform))
        heard = resample_sinc(waveform, mel.sample_rate, clap.front_end.sample_rate)
        rows["z_mean"].append(posterior.mean.float().cpu())
        rows["z_std"].append(posterior.std.float().cpu())
        rows["audio_embed"].append(clap.embed_audio(heard).float().cpu())
        captions += batch["caption"]
        count += len(waveform)
        progress(len(waveform))
        if len(captions) >= shard_items:
            flush()
    if captions:
        flush()
    return count


def state_hash(network: nn.Module) -> str:
    """Hash of a network's parameters and buffers; equal weights give equal hashes on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
