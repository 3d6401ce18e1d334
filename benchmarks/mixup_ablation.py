"""Mixup at small size: none, plain, BAM and BLM, each over several seeds, on the synthetic drums.

    python benchmarks/mixup_ablation.py --parts runs/quickstart --out runs/mixup [--steps 240] [--processes 2]
    ldm-audio report runs/mixup

Takes the quickstart's CLAP, VAE and vocoder. Each arm's training clips are mixed and encoded once
(`ldm-audio encode`), each seed trains from them (`train.py`) and samples (`sample.py`); what was asked for is
then measured in the sounds, and how near they are to the unmixed training clips. Each process has one thread.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

from ldm_audio.audio.io import read_audio
from ldm_audio.config import checkout
from ldm_audio.data.measure import score
from ldm_audio.data.synthetic import canonical_caption, split_combinations
from ldm_audio.evaluation.attributes import shares
from ldm_audio.evaluation.novelty import nearest_similarity, novelty
from ldm_audio.files import write_json, write_text
from ldm_audio.pretrained import load

ARMS = ("none", "plain", "bam", "blm")


def call(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--clips", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    paths = {
        name: args.parts / name / "weights" / f"{name}.safetensors" for name in ("vae", "clap", "vocoder")
    }
    drums = [row for row in split_combinations("all") if row["kind"] == "beat"]
    write_text(args.out / "prompts.txt", "".join(f"{canonical_caption(row)}\n" for row in drums))

    def encode(arm: str) -> None:
        given = [
            f"vae.path={paths['vae']}",
            f"clap.path={paths['clap']}",
            f"out={args.out / 'latents' / arm}",
        ]
        if arm == "blm":
            given += ["vocoder=file", f"vocoder.path={paths['vocoder']}"]
        size = [f"data.train.size={args.clips}", "data.train.kinds=[beat]", "data.val.kinds=[beat]"]
        call("-m", "ldm_audio.cli", "encode", "data=synthetic_tracks", f"mixup={arm}", *size, *given)

    def train_and_sample(arm: str, seed: int) -> None:
        name = f"{arm}/seed{seed}"
        root, folder = checkout(), args.out / name
        size = ["experiment=quickstart/ldm", "conditioning=audio", f"trainer.max_steps={args.steps}"]
        given = [
            f"vae.path={paths['vae']}",
            f"clap.path={paths['clap']}",
            f"data.path={args.out / 'latents' / arm}",
            "objective.latent_scale=1",  # of unmixed latents; measured in each arm, losses would not compare
        ]
        call(str(root / "train.py"), *size, *given, f"runs={args.out}", f"run={name}", f"seed={seed}")
        sampling = ["duration=2.56", "num_steps=12", "guidance_scale=2", "batch_size=24", "overwrite=true"]
        call(
            str(root / "sample.py"), f"weights={folder / 'weights'}", f"prompts={args.out / 'prompts.txt'}",
            f"vocoder.path={paths['vocoder']}", f"out={folder / 'samples'}", f"seed={seed}", *sampling,
        )  # fmt: skip
        write_json(
            folder / "evaluation.json",
            evaluate(folder, args.out / "latents" / "none" / "train", paths["clap"]),
        )

    with ThreadPoolExecutor(max_workers=args.processes) as pool:
        list(pool.map(encode, ARMS))
        list(
            pool.map(lambda pair: train_and_sample(*pair), [(a, s) for s in range(args.seeds) for a in ARMS])
        )


def evaluate(folder: Path, training: Path, clap_path: Path) -> dict[str, float]:
    """Shares of attributes that are right in the sounds, and their nearness to the training clips."""
    asked = {canonical_caption(row): row for row in split_combinations("all")}
    rows = [json.loads(line) for line in (folder / "samples" / "samples.jsonl").read_text().splitlines()]
    sounds, outcomes = [], []
    for row in rows:
        (sound,), rate = read_audio(folder / "samples" / row["file"])
        sounds.append(torch.from_numpy(sound))
        outcomes += score(asked[row["prompt"]], sound, rate).items()
    right = shares(outcomes)
    clap = load(str(clap_path))
    with torch.inference_mode():
        embeds = torch.cat([clap.embed_audio(sound[None]) for sound in sounds])
    shards = sorted(training.glob("shard_*.safetensors"))
    chunks = (safe_open(shard, framework="pt").get_tensor("audio_embed") for shard in shards)
    found = {"attributes": right["overall"], **{name: right[name] for name in ("tempo", "metre", "drum")}}
    return found | novelty(nearest_similarity(embeds, chunks))


if __name__ == "__main__":
    main()
