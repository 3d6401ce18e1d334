"""From nothing to sounds from text: every stage in a row on synthetic sounds, by the public path.

Each stage is one call of `train.py`, `ldm-audio encode` or `sample.py` with the configs of
`experiment/quickstart`, one thread each, two side by side. Then what was asked for is measured in the sounds.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_audio.audio.io import read_audio
from ldm_audio.audio.mel import LogMel
from ldm_audio.config import checkout
from ldm_audio.data.measure import measure
from ldm_audio.data.synthetic import VALUES, Attributes, caption, fits, render, split_combinations
from ldm_audio.evaluation.attributes import accuracy, chance, shuffled_accuracy
from ldm_audio.files import write_json, write_text
from ldm_audio.pipelines.gallery import mel_sheet, write_page
from ldm_audio.pretrained import load_system

NUM_PROMPTS = 48
SAMPLE_SEEDS = (0, 1, 2)
DURATION = 2.56  # seconds
ENCODED = 4096  # clips that the UNet is trained on
SAMPLING = ("num_steps=12", "guidance_scale=2.5", "batch_size=24", "overwrite=true")
COLUMNS = ("chance", "shuffled", "right", "ceiling", "trained", "unseen")


@dataclass(frozen=True)
class Prompt:
    """A caption, what it asks for, and whether its combination of attributes was in the training data."""

    caption: str
    attributes: Attributes
    trained: bool


def quickstart(folder: str, *, seed: int, overrides: Sequence[str]) -> dict:
    """Trains, samples, measures; returns what it writes to `summary.json`. Called again, it continues."""
    run = Path(folder)
    stages = Stages(run, seed=seed, overrides=overrides)
    prompts = choose_prompts(seed)
    for sample_seed in SAMPLE_SEEDS:
        write_prompts(run / f"prompts_seed{sample_seed}.csv", prompts, sample_seed)

    with ThreadPoolExecutor(max_workers=2) as pool:
        encoded = pool.submit(lambda: (stages.train("vae"), stages.encode()))
        ldm = pool.submit(lambda: (stages.train("clap"), encoded.result(), stages.train("ldm")))
        vocoder = pool.submit(stages.train, "vocoder")
        for stage in (encoded, ldm, vocoder):
            stage.result()
        shutil.copy(stages.weights("vocoder"), run / "ldm" / "weights")  # the last part of the system
        samples = [pool.submit(stages.sample, sample_seed) for sample_seed in SAMPLE_SEEDS]
        for stage in samples:
            stage.result()

    started = time.perf_counter()
    summary = evaluate(run, prompts)
    stages.seconds["evaluate"] = time.perf_counter() - started
    summary["seconds"] = {name: round(seconds, 1) for name, seconds in stages.seconds.items()}
    write_json(run / "summary.json", summary)
    collect_metrics(run)
    print(f"\n{(run / 'results.md').read_text()}\nopen {run / 'index.html'}")
    return summary


class Stages:
    """Runs the stages as processes of their own, one thread each, and notes the seconds."""

    def __init__(self, run: Path, *, seed: int, overrides: Sequence[str]):
        self.run = run
        self.root = checkout()
        self.common = [f"runs={run.parent.as_posix()}", f"seed={seed}", *overrides]
        self.seconds: dict[str, float] = {}

    def train(self, name: str) -> None:
        bar = 0 if name in ("clap", "ldm") else 1  # those two follow each other
        arguments = [
            f"experiment=quickstart/{name}",
            f"run={self.run.name}/{name}",
            f"trainer.bar_position={bar}",
        ]
        if name == "clap" and torch.cpu.get_capabilities().get("avx512_bf16", False):
            arguments.append("trainer.precision=bf16")  # a quarter faster there, slower on other processors
        arguments += [*self.paths(name), *self.common]
        self._call(name, [str(self.root / "train.py"), *arguments])

    def paths(self, name: str) -> list[str]:
        """Where a stage finds what the earlier ones left."""
        if name != "ldm":
            return []
        return [
            f"vae.path={self.weights('vae')}",
            f"clap.path={self.weights('clap')}",
            f"data.path={self.run}/latents",
        ]

    def weights(self, name: str) -> Path:
        return self.run / name / "weights" / f"{name}.safetensors"

    def encode(self) -> None:
        arguments = [
            "data=quickstart",
            f"data.train.size={ENCODED}",
            "data.train.kinds=[sound,beat,beat]",  # the UNet finds time harder than colour
            f"vae.path={self.weights('vae')}",
            "~clap",  # still in training; texts are embedded when the UNet learns
            "~tokenizer",
            f"out={self.run / 'latents'}",
            self.common[1],
        ]
        self._call("encode", ["-m", "ldm_audio.cli", "encode", *arguments])

    def sample(self, seed: int) -> None:
        arguments = [
            f"weights={self.run / 'ldm' / 'weights'}",
            f"prompts={self.run / f'prompts_seed{seed}.csv'}",
            f"out={self.run / 'samples' / f'seed{seed}'}",
            f"duration={DURATION}",
            *SAMPLING,
        ]
        self._call(f"sample_{seed}", [str(self.root / "sample.py"), *arguments])

    def _call(self, name: str, arguments: list[str]) -> None:
        started = time.perf_counter()
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment["TQDM_POSITION"] = "1"  # below the bar of CLAP, where a stage chooses no line itself
        done = subprocess.run([sys.executable, *arguments], env=environment)
        if done.returncode:
            sys.exit(
                f"quickstart: {name} failed; `ldm-audio quickstart` again continues from where it stopped"
            )
        self.seconds[name] = time.perf_counter() - started


def choose_prompts(seed: int) -> list[Prompt]:
    """`NUM_PROMPTS` captions, every second one of a combination that training never saw."""
    rng = np.random.default_rng([seed, NUM_PROMPTS])
    trained, held_out = split_combinations("train"), split_combinations("held_out")
    picks = []
    for rows in (trained, held_out):
        order = [row for _ in range(NUM_PROMPTS) for row in rng.permutation(np.array(rows, dtype=object))]
        picks.append(order[: NUM_PROMPTS // 2])
    return [
        Prompt(caption(row, rng), row, number == 0) for pair in zip(*picks) for number, row in enumerate(pair)
    ]


def write_prompts(path: Path, prompts: list[Prompt], seed: int) -> None:
    """What `sample.py` reads: every prompt with a seed of its own, lest all begin with the same noise."""
    rows = [f'"{prompt.caption}",{seed * len(prompts) + i}\n' for i, prompt in enumerate(prompts)]
    write_text(path, "".join(["prompt,seed\n", *rows]))


def evaluate(run: Path, prompts: list[Prompt]) -> dict:
    """Measures the samples and a VAE + vocoder round trip of real clips; writes tables, sheet and page."""
    system = load_system(run / "ldm" / "weights")
    rate = system.mel.sample_rate
    files = [sorted((run / "samples" / f"seed{seed}").glob("*.wav")) for seed in SAMPLE_SEEDS]
    waveforms = [torch.from_numpy(read_audio(path)[0][0]) for paths in files for path in paths]
    expected = [prompt.attributes for prompt in prompts] * len(SAMPLE_SEEDS)
    found = [measure(waveform.numpy(), rate) for waveform in waveforms]
    ceiling = [measure(waveform, rate) for waveform in round_trip(system, expected)]

    columns = {
        "chance": chance(expected, VALUES, fits),
        "shuffled": shuffled_accuracy(expected, found, fits),
        "right": accuracy(expected, found, fits),
        "ceiling": accuracy(expected, ceiling, fits),
    }
    for name, trained in (("trained", True), ("unseen", False)):  # right, by whether training had the like
        chosen = [i for i in range(len(expected)) if prompts[i % len(prompts)].trained == trained]
        columns[name] = accuracy([expected[i] for i in chosen], [found[i] for i in chosen], fits)
    write_results(run, prompts, columns, found)
    draw(run, prompts, files[0], waveforms[: len(prompts)], system.mel, found)
    return {
        "attributes_right": columns["right"]["overall"],
        **{name: columns[name]["overall"] for name in COLUMNS if name != "right"},
        "by_attribute": {name: {c: columns[c][name] for c in COLUMNS} for name in columns["right"]},
    }


@torch.inference_mode()
def round_trip(system, expected: list[Attributes]) -> list[np.ndarray]:
    """Freshly rendered clips with these attributes after VAE and vocoder: the best that sampling could do."""
    rate, size = system.mel.sample_rate, round(DURATION * system.mel.sample_rate)
    clips = []
    for number, attributes in enumerate(expected):
        real = render(attributes, np.random.default_rng([number, 1]), sample_rate=rate, num_samples=size)
        latent = system.vae.encode(system.mel(torch.from_numpy(real)[None])).mean
        clips.append(system.vocoder(system.vae.decode(latent))[0, 0, :size].numpy())
    return clips


def write_results(run: Path, prompts: list[Prompt], columns: dict, found: list[Attributes]) -> None:
    """`results.md`: accuracy by attribute; `table.md`: prompt by attribute, right clips out of the seeds."""
    lines = [f"| attribute | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name in columns["right"]:
        lines.append(f"| {name} | {' | '.join(f'{columns[c][name]:.2f}' for c in COLUMNS)} |")
    write_text(run / "results.md", "\n".join(lines) + "\n")

    names = [name for name in columns["right"] if name != "overall"]
    lines = [f"| prompt | seen | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for row, prompt in enumerate(prompts):
        clips = found[row :: len(prompts)]
        cells = []
        for name in names:
            want = prompt.attributes.get(name, "")
            right = sum(fits(want, clip.get(name)) for clip in clips)
            cells.append(f"{want} {right}/{len(clips)}" if want else "")
        lines.append(f"| {prompt.caption} | {'yes' if prompt.trained else 'no'} | {' | '.join(cells)} |")
    write_text(run / "table.md", "\n".join(lines) + "\n")


def draw(
    run: Path,
    prompts: list[Prompt],
    files: list[Path],
    waveforms: list[Tensor],
    mel: LogMel,
    found: list[Attributes],
) -> None:
    """The sheet of mel spectrograms and the page with players, of the first seed."""
    mels = [mel(waveform[None])[0] for waveform in waveforms]
    mel_sheet(run / "mels.png", mels, [prompt.caption for prompt in prompts], mel=mel)
    rows = []
    for prompt, file, measured in zip(prompts, files, found):
        heard = [(name, value, measured.get(name)) for name, value in prompt.attributes.items()]
        wrong = [f"{name}: {got}" for name, value, got in heard if not fits(value, got)]
        note = f"measured otherwise: {', '.join(wrong)}" if wrong else "all attributes right"
        rows.append({"title": prompt.caption, "audio": file.relative_to(run).as_posix(), "note": note})
    write_page(run, rows, "Quickstart: sounds from text")


def collect_metrics(run: Path) -> None:
    """All stages' metrics in one `metrics.jsonl`, each row with its stage."""
    with (run / "metrics.jsonl").open("w") as file:
        for path in sorted(run.glob("*/metrics.jsonl")):
            for line in path.read_text().splitlines():
                file.write(json.dumps({"stage": path.parent.name} | json.loads(line)) + "\n")
