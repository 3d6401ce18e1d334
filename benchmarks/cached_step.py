"""Training from cached latents against making them in every step, and what a step spends outside the UNet.

    python benchmarks/cached_step.py [--size full|small] [--batch 4] [--steps 5] [--device cpu|cuda]
        [--clock wall|cpu]

Random weights at AudioLDM-S's size (or the quickstart's) and random sound of 10.24 s (2.56 s). Both variants
run one full step each in turn: on the fly mel, VAE and CLAP come first, as in the original; cached has their
results. `--clock cpu` counts the processor's seconds of all threads, for a machine that others use too.
"Outside" is all of a cached step but the UNet's forward, its backward and the optimiser's step, all
measured in the same step. One step of each warms up; medians; the last line is a JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldm_audio.audio.mixup import Mixup
from ldm_audio.config import checkout
from ldm_audio.data.tokenizers import train_bpe
from ldm_audio.objectives.latent_diffusion import LatentDiffusionObjective

SIZES = {
    "full": {"unet": "audioldm_s", "vae": "mel64", "clap": "htsat_tiny", "samples": 163840},
    "small": {"unet": "small", "vae": "small", "clap": "small", "samples": 40960},
}


class Watch:
    """Adds up the seconds of calls; waits for the device at both ends of each."""

    def __init__(self, device: torch.device, clock: Callable[[], float]):
        self.device = device
        self.clock = clock
        self.seconds = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def around(self, call: Callable) -> Callable:
        def timed(*arguments, **settings):
            started = self.now()
            result = call(*arguments, **settings)
            self.seconds += self.now() - started
            return result

        return timed


def part(group: str, name: str, **extra):
    config = OmegaConf.create(
        {"audio": OmegaConf.load(checkout() / "configs" / "audio" / "mel16k_64.yaml")} | extra
    )
    config.part = OmegaConf.load(Path(checkout(), "configs", group, f"{name}.yaml"))
    return instantiate(config.part, _convert_="all")


def objective(size: dict, device: torch.device) -> LatentDiffusionObjective:
    tokenizer = train_bpe(["rain on a roof", "a dog barks"], vocab_size=300, max_length=77)
    mixup = OmegaConf.to_container(OmegaConf.load(checkout() / "configs" / "mixup" / "none.yaml"))
    mixup.pop("_target_")
    made = LatentDiffusionObjective(
        mel=part("audio", "mel16k_64"), unet=part("unet", size["unet"]), vae=part("vae", size["vae"]),
        clap=part("clap", size["clap"], tokenizer={"vocab_size": 300}), vocoder=None, tokenizer=tokenizer,
        schedule=part("schedule", "audioldm"), seed=0, text_probability=0.0, condition_dropout=0.1,
        mixup=Mixup(**mixup), latent_scale=1.0, allow_random_frozen=True,
    )  # fmt: skip
    return made.to(device).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    device, size = torch.device(args.device), SIZES[args.size]
    made = objective(size, device)
    optimizer = torch.optim.AdamW(made.players()["unet"], lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(0)
    sound = 0.1 * torch.randn(args.batch, size["samples"], generator=generator).to(device)
    named = {"caption": ["rain on a roof"] * args.batch, "item": torch.arange(args.batch)}
    on_the_fly = named | {"waveform": sound}
    with torch.no_grad():
        mean, std = made.posterior(on_the_fly)
        cached = named | {"z_mean": mean, "z_std": std, "audio_embed": made.audio_embed(on_the_fly, mean)}

    inside = Watch(device, time.process_time if args.clock == "cpu" else time.perf_counter)
    made.unet.forward = inside.around(made.unet.forward)
    stepped = inside.around(optimizer.step)

    def step(batch: dict, number: int) -> tuple[float, float]:
        """Seconds of a step, and the share of it outside the UNet and its optimiser."""
        inside.seconds, started = 0.0, inside.now()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            turns = list(made.losses(batch, number))
        ((_, loss, _),) = turns
        inside.around(loss.backward)()
        stepped()
        optimizer.zero_grad(set_to_none=True)
        whole = inside.now() - started
        return whole, 1 - inside.seconds / whole

    seconds: dict[str, list[float]] = {"on_the_fly": [], "cached": []}
    outside = []
    for number in range(args.steps + 1):
        whole, (cached_whole, share) = step(on_the_fly, number)[0], step(cached, number)
        uncounted = "" if number else ", to warm up"
        print(f"step {number}{uncounted}: on_the_fly {whole:.3f} s, cached {cached_whole:.3f} s", flush=True)
        if number:
            seconds["on_the_fly"].append(whole)
            seconds["cached"].append(cached_whole)
            outside.append(share)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "size": args.size,
                "batch": args.batch,
                "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
                "precision": args.precision,
                "clock": args.clock,
                "threads": torch.get_num_threads(),
                "seconds": {name: round(value, 4) for name, value in medians.items()},
                "ratios": {"cached_over_onthefly": round(medians["on_the_fly"] / medians["cached"], 3)},
                "share_outside_unet": round(statistics.median(outside), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
