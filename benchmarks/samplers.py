"""Quality per step: each sampler on a trained system against many steps, and what is heard of the prompts.

    python benchmarks/samplers.py WEIGHTS [--count 48] [--steps 5 10 20 50 200] [--plot FILE.png]

On the quickstart's system, `runs/quickstart/ldm/weights`, and its prompts: the
distance of the latents from DDIM's with `--reference` steps, relative, for samplers without noise; the share
of prompts whose attributes are all measured in the sound, and of attributes that are; network calls a sound.
The last line is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm_audio.data.measure import measure
from ldm_audio.data.synthetic import fits
from ldm_audio.diffusion.guidance import classifier_free
from ldm_audio.diffusion.samplers import ddim, ddpm, dpm_solver, pndm, timestep_grid, unipc
from ldm_audio.evaluation.attributes import accuracy
from ldm_audio.pipelines.decoding import decode_latents
from ldm_audio.pipelines.text_to_audio import TextToAudio
from ldm_audio.pretrained import load_system
from ldm_audio.quickstart import choose_prompts
from ldm_audio.randomness import RowRandom

SAMPLERS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "ddim, leading": (partial(ddim, eta=0.0), "leading"),
    "ddim, log_snr": (partial(ddim, eta=0.0), "log_snr"),
    "pndm, leading": (partial(pndm, runge_kutta=False), "leading"),
    "pndm, log_snr": (partial(pndm, runge_kutta=False), "log_snr"),
    "dpm_solver, log_snr": (dpm_solver, "log_snr"),
    "unipc, log_snr": (unipc, "log_snr"),
    "dpm_solver_sde, log_snr": (partial(dpm_solver, stochastic=True), "log_snr"),
    "ddpm, trailing": (partial(ddpm, variance="small"), "trailing"),
}
NOISY = ("dpm_solver_sde", "ddpm")


def sample(
    system: TextToAudio, embed: Tensor, negative: Tensor, shape: tuple[int, ...], guidance: float, **how
) -> tuple[Tensor, int]:
    """(b, c, t, f) latents, and how often the network was called."""
    rows = RowRandom([(0, row) for row in range(len(embed))])
    calls = 0

    def predict(zt: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return system.predict(zt, timestep, condition)

    denoiser = classifier_free(predict, embed, negative, guidance)
    grid = timestep_grid(how["steps"], system.schedule, how["spacing"])
    return how["sampler"](denoiser, rows.randn(*shape), grid, system.schedule, rows.randn), calls


@torch.no_grad()
def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights")
    parser.add_argument("--count", type=int, default=48, help="prompts, of the quickstart's 48")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 200])
    parser.add_argument("--reference", type=int, default=1000)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--duration", type=float, default=2.56)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    system = load_system(arguments.weights).pack()
    prompts = choose_prompts(0)[: arguments.count]
    expected = [prompt.attributes for prompt in prompts]
    embed = system.embed([prompt.caption for prompt in prompts], len(prompts))
    negative = system.embed([""], 1)
    num_samples = system.num_samples(arguments.duration)
    run = partial(sample, system, embed, negative, system.latent_shape(num_samples), arguments.guidance)
    reference, _ = run(steps=arguments.reference, sampler=partial(ddim, eta=0.0), spacing="linspace")

    def heard(z0: Tensor) -> float:
        waveform, _ = decode_latents(system.vae, system.vocoder, z0, system.latent_scale, num_samples)
        found = [measure(row.numpy(), system.mel.sample_rate) for row in waveform]
        return accuracy(expected, found, fits)["overall"]

    rows = [{"sampler": "reference", "steps": arguments.reference, "accuracy": round(heard(reference), 3)}]
    print(json.dumps(rows[0]), flush=True)
    for name, (sampler, spacing) in SAMPLERS.items():
        for steps in arguments.steps:
            z0, calls = run(steps=steps, sampler=sampler, spacing=spacing)
            distance = None if name.startswith(NOISY) else ((z0 - reference).norm() / reference.norm()).item()
            row = {"sampler": name, "steps": steps, "calls": calls, "accuracy": round(heard(z0), 3)}
            rows.append(row | {"distance": None if distance is None else round(distance, 4)})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.plot is not None:
        plot(arguments.plot, rows)
    print(json.dumps({"prompts": len(prompts), "rows": rows}))


def plot(path: Path, rows: list[dict]) -> None:
    """Distance and accuracy over network calls."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name in SAMPLERS:
        own = [row for row in rows if row["sampler"] == name]
        if own and own[0]["distance"] is not None:
            left.loglog([row["calls"] for row in own], [row["distance"] for row in own], "o-", label=name)
        right.semilogx([row["calls"] for row in own], [row["accuracy"] for row in own], "o-", label=name)
    left.set(xlabel="network calls", ylabel="distance from the reference, relative")
    right.set(xlabel="network calls", ylabel="attributes heard")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
