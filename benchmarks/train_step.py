"""What a training step costs at quickstart sizes, and which ways of making it cheaper pay.

    python benchmarks/train_step.py [--objectives vae vocoder clap ldm] [--rounds 15] [--no-compile]

Every objective with the parts, batch size and optimiser of its quickstart experiment, on synthetic clips, one
thread; diffusion on latents that untrained parts encoded, as the quickstart's, and `ldm_from_sound` on clips
that are encoded in every step. The variants of one objective take a step each in turn, in an order that
changes every round, and medians of processor time and of wall time are compared with the setting as shipped
(fused AdamW, float32): a ratio above 1 is faster. `loss` is how far, relative to the shipped one, the mean
loss of all steps is off. Then the processor time of making a batch as a share of a step's, and the share of
its time that a run waits for data with 0 and 2 workers. The last line is a JSON object.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from ldm_audio.config import build_objective, build_trainer, checkout, read_ranges, train_loader
from ldm_audio.objectives.base import to_device
from ldm_audio.pipelines.encode import Encoder, encode
from ldm_audio.training.loggers import read_rows
from ldm_audio.training.trainer import Trainer

CPU = torch.device("cpu")
UNTRAINED = (
    "experiment=quickstart/ldm",
    "allow_random_frozen=true",
    "vae=small",
    "vae.latent_channels=4",
    "~vae.path",
    "clap=small",
    "~clap.path",
    "tokenizer=bpe",
    "tokenizer.vocab_size=512",
)
SETTINGS = {
    "vae": ("experiment=quickstart/vae", "objective.adversarial_start=0"),
    "vocoder": ("experiment=quickstart/vocoder", "objective.adversarial_start=0"),
    "vocoder_mel_alone": ("experiment=quickstart/vocoder",),
    "clap": ("experiment=quickstart/clap",),
    "ldm": UNTRAINED,
    "ldm_from_sound": (*UNTRAINED, "data=quickstart"),
}
VARIANTS = {
    "shipped": (),
    "plain_adamw": ("optimizer.fused=false", "+optimizer.foreach=false"),
    "bf16": ("trainer.precision=bf16",),
    "channels_last": (),
    "compiled": ("trainer.compile=true",),
}
WARM_UP = 2  # steps of each variant that are not timed; compilation is in the first


def composed(*overrides: str) -> DictConfig:
    """A run's config that writes into a temporary folder."""
    with initialize_config_dir(str(checkout() / "configs"), version_base="1.3"):
        return compose("train", overrides=[*overrides, f"runs={tempfile.mkdtemp(prefix='train_step_')}"])


def encoded_clips(num_items: int = 128) -> str:
    """A folder of latents of synthetic clips; overrides name it as the data of a run."""
    folder = Path(tempfile.mkdtemp(prefix="train_step_"))
    cfg = composed(*SETTINGS["ldm_from_sound"])
    data = instantiate(cfg.data.train)
    objective = build_objective(cfg, data.captions())
    encoder = Encoder(
        mel=objective.mel, vae=objective.vae, clap=objective.clap, tokenizer=objective.tokenizer,
        vocoder=None, mixup=objective.mixup, device="cpu",
    )  # fmt: skip
    for split in ("train", "val"):
        encode(
            partial(read_ranges, data, 0), num_items, folder / split, encoder=encoder, made_by={},
            batch_size=16, shard_items=num_items, part=0, parts=1, progress=lambda count: None,
        )  # fmt: skip
    return f"data.path={folder}"


class Variant:
    """A trainer that is ready to take steps."""

    def __init__(self, settings: tuple[str, ...], name: str):
        self.cfg = composed(*settings, *VARIANTS[name])
        torch.manual_seed(0)
        data = instantiate(self.cfg.data.train)
        objective = build_objective(self.cfg, data.captions())
        if name == "channels_last":
            objective = objective.to(memory_format=torch.channels_last)
        self.trainer: Trainer = build_trainer(self.cfg, CPU)
        self.trainer._set_up(objective)
        self.batch = to_device(next(iter(train_loader(self.cfg, data)(0))), CPU)
        self.processor: list[float] = []
        self.wall: list[float] = []
        self.losses: list[float] = []

    def step(self) -> None:
        processor, wall = time.process_time(), time.perf_counter()
        logs = self.trainer._train_step([self.batch])
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)
        self.trainer.step += 1
        self.losses.append(float(next(v for name, v in logs.items() if name.startswith("train/"))))


def steps(settings: tuple[str, ...], names: list[str], rounds: int) -> dict[str, float]:
    """Items a second as shipped, how many times as fast each variant is, and how far off its losses are."""
    variants = {name: Variant(settings, name) for name in names}
    for number in range(WARM_UP + rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order:
            variants[name].step()
    shipped = variants.pop("shipped")
    processor, wall = median(shipped.processor[WARM_UP:]), median(shipped.wall[WARM_UP:])
    batch_size = shipped.cfg.batch_size
    found = {
        "items_per_second": batch_size / wall,
        "items_per_processor_second": batch_size / processor,
        "batch_over_step": batch_seconds(shipped.cfg, rounds) / processor,
    }
    for name, variant in variants.items():
        found[name] = processor / median(variant.processor[WARM_UP:])
        found[f"{name}_wall"] = wall / median(variant.wall[WARM_UP:])
        found[f"{name}_loss"] = mean(variant.losses) / mean(shipped.losses) - 1
    return found


def batch_seconds(cfg: DictConfig, rounds: int) -> float:
    """Processor time of making one batch."""
    cfg.num_workers = 0
    batches = iter(train_loader(cfg, instantiate(cfg.data.train))(0))
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        next(batches)
        seconds.append(time.process_time() - began)
    return median(seconds)


def waiting(settings: tuple[str, ...], num_workers: int, num_steps: int) -> float:
    """The share of a run's time that is spent waiting for data, its first steps left out."""
    cfg = composed(
        *settings,
        f"num_workers={num_workers}",
        f"trainer.max_steps={2 * num_steps}",
        f"trainer.log_every={num_steps}",
        "trainer.prepare_batches=1",
    )
    torch.manual_seed(0)
    data = instantiate(cfg.data.train)
    objective = build_objective(cfg, data.captions())
    objective.preview = lambda batch: {}
    val = [next(iter(train_loader(cfg, data)(0)))]
    build_trainer(cfg, CPU).fit(objective, train_loader(cfg, data), val)
    rows = [row for row in read_rows(Path(cfg.folder) / "metrics.jsonl") if "waiting_share" in row]
    return rows[-1]["waiting_share"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in VARIANTS if not (arguments.no_compile and name == "compiled")]
    latents = encoded_clips() if "ldm" in arguments.objectives else ""
    results = {}
    for objective in arguments.objectives:
        settings = SETTINGS[objective] + ((latents,) if objective == "ldm" else ())
        results[objective] = steps(settings, names, arguments.rounds)
        for workers in (0, 2):
            results[objective][f"waiting_{workers}_workers"] = waiting(settings, workers, arguments.rounds)
        print(objective, {key: round(value, 4) for key, value in results[objective].items()}, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
