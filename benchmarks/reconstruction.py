"""How near VAE and vocoder bring recordings back: log-mel L1 (nepers) on the validation split of a folder.

    python benchmarks/reconstruction.py FOLDER --vae vae.safetensors --vocoder vocoder.safetensors

Beside each number stands what predicting the mean of each bin, over the same frames, costs. Recordings that
are shorter than a clip leave silence, which everything gets right; so both are given once more over sounding
frames alone, whose loudest bin is within 40 dB of the clip's loudest. The last line is a JSON object.
"""

import argparse
import json
import math

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from ldm_audio.config import checkout
from ldm_audio.data.clips import folder
from ldm_audio.pretrained import load_network

SOUNDING = math.log(10 ** (40 / 20))  # nepers of amplitude in 40 dB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--vae", required=True)
    parser.add_argument("--vocoder", required=True)
    parser.add_argument("--csv", default="val.csv")
    parser.add_argument("--num-samples", type=int, default=40960)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    to_mel = instantiate(OmegaConf.load(checkout() / "configs" / "audio" / "mel16k_64.yaml"))
    vae, vocoder = load_network(arguments.vae), load_network(arguments.vocoder)
    clips = folder(
        arguments.folder, csv=arguments.csv, sample_rate=to_mel.sample_rate,
        num_samples=arguments.num_samples, seed=0, random_crop=False, caption="first",
    )  # fmt: skip
    made: dict[str, list[Tensor]] = {name: [] for name in ("real", "vae", "vocoder", "vae_and_vocoder")}
    with torch.inference_mode():
        for index in range(len(clips)):
            mel = to_mel(clips[index]["waveform"][None])  # (1, f, n)
            decoded = vae.decode(vae.encode(mel).mean)[..., : mel.shape[-1]]
            made["real"].append(mel)
            made["vae"].append(decoded)
            for name, source in (("vocoder", mel), ("vae_and_vocoder", decoded)):
                made[name].append(to_mel(vocoder(source)[:, 0, : arguments.num_samples]))
    mels = {name: torch.cat(rows) for name, rows in made.items()}  # (b, f, n)
    real = mels.pop("real")
    loudest = real.amax(dim=1)  # (b, n)
    sounding = loudest > loudest.amax(dim=1, keepdim=True) - SOUNDING
    found = {"clips": len(clips), "sounding_share": sounding.float().mean().item()}
    for frames, prefix in ((torch.ones_like(sounding), ""), (sounding, "sounding_")):
        kept = real.mT[frames]  # (frames, f)
        found[f"{prefix}bin_mean"] = (kept - kept.mean(dim=0)).abs().mean().item()
        for name, mel in mels.items():
            found[f"{prefix}{name}"] = (mel.mT[frames] - kept).abs().mean().item()
    for name, value in found.items():
        print(f"{name:28s} {value:.3f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
