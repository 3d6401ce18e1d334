"""What mixing costs: BAM in a data worker, BLM's decoding, vocoding and CLAP in the step.

    python benchmarks/mixup_cost.py [--size small|full] [--batch 16] [--repeats 5]

BAM: seconds to make a batch of mixed items of 2.56 s (10.24 s at full size) from recordings of 30 s at
44.1 kHz, over those for the same batch unmixed, and what it adds as a share of the training step, which makes
latents from sound. BLM: a step half of whose items are pairs to be mixed, from waveforms and from the cache,
over the same step without. Random weights, interleaved, medians of the process's own seconds on one thread,
so that others on the machine do not count. The last line is a JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
from cached_step import SIZES, objective, part
from omegaconf import OmegaConf

from ldm_audio.audio.beats import Beats
from ldm_audio.audio.io import probe
from ldm_audio.audio.mixup import Mixup
from ldm_audio.config import checkout
from ldm_audio.data.clips import Clips
from ldm_audio.data.loader import ItemKey
from ldm_audio.data.manifest import Clip
from ldm_audio.data.mixing import Mixed

SOURCE_RATE, SECONDS, TRACKS = 44100, 30, 8


def mixup(prob: float) -> Mixup:
    settings = OmegaConf.to_container(OmegaConf.load(checkout() / "configs" / "mixup" / "none.yaml"))
    return Mixup(**{k: v for k, v in settings.items() if k != "_target_"} | {"prob": prob})


def recordings(folder: Path, num_samples: int) -> Clips:
    rng = np.random.default_rng(0)
    beats = np.arange(0.3, SECONDS, 0.5)
    known = Beats(tuple(beats), tuple(beats[::4]), SECONDS)
    for number in range(TRACKS):
        sound = 0.1 * rng.standard_normal((SECONDS * SOURCE_RATE, 2))
        soundfile.write(folder / f"{number}.flac", sound, SOURCE_RATE)
    paths = sorted(folder.glob("*.flac"))
    return Clips(
        [Clip(path, ("music",), probe(path)) for path in paths], sample_rate=16000, num_samples=num_samples,
        seed=0, normalise="peak_half", random_crop=True, caption="first", channel="mix",
        beats=[known] * TRACKS,
    )  # fmt: skip


def seconds_of(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    size, count = SIZES[args.size], args.batch
    made = objective(size, torch.device("cpu"))
    made.vocoder = (
        part("vocoder", "small" if args.size == "small" else "hifigan_16k").eval().requires_grad_(False)
    )

    def step(batch: dict) -> None:
        for _, loss, _ in made.losses(batch, 0):
            loss.backward()

    sound = 0.1 * torch.randn(count, size["samples"], generator=torch.Generator().manual_seed(0))
    named = {"caption": ["music"] * count, "item": torch.arange(count)}
    ratio = torch.tensor([0.4 if i % 2 else 1.0 for i in range(count)])
    with torch.no_grad():
        mean, std = made.posterior(named | {"waveform": sound})
        embed = made.audio_embed(named | {"waveform": sound}, mean)
    cached = named | {"z_mean": mean, "z_std": std, "audio_embed": embed}
    pair = {"mix_ratio": ratio}
    with tempfile.TemporaryDirectory() as folder:
        clips = recordings(Path(folder), size["samples"])
        mixed = Mixed(clips, mixup(1.0))
        calls = {
            "items": lambda: [clips[ItemKey(0, i % TRACKS, i)] for i in range(count)],
            "items_bam": lambda: [mixed[ItemKey(0, i % TRACKS, i)] for i in range(count)],
            "step_cached": lambda: step(cached),
            "step_cached_blm": lambda: step(cached | pair | {"partner_z_mean": mean, "partner_z_std": std}),
            "step": lambda: step(named | {"waveform": sound}),
            "step_blm": lambda: step(named | pair | {"waveform": sound, "partner": sound}),
        }
        seconds = {name: [] for name in calls}
        for number in range(args.repeats + 1):
            for name, call in calls.items():
                spent = seconds_of(call)
                if number:  # the first round warms up
                    seconds[name].append(spent)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "size": args.size,
                "batch": count,
                "threads": torch.get_num_threads(),
                "seconds": {name: round(value, 4) for name, value in median.items()},
                "ratios": {
                    "bam_over_plain_items": round(median["items_bam"] / median["items"], 2),
                    "bam_adds_to_step": round((median["items_bam"] - median["items"]) / median["step"], 3),
                    "blm_over_plain_step": round(median["step_blm"] / median["step"], 2),
                    "blm_over_plain_cached_step": round(median["step_cached_blm"] / median["step_cached"], 2),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
