"""What a training step costs at quickstart sizes, and which ways of making it cheaper pay.

    python benchmarks/train_step.py [--objectives vae vocoder clap ldm] [--rounds 15] [--no-compile]

Every objective with the parts, batch size and optimiser of its quickstart experiment, on synthetic clips, one
thread. The variants of one objective take a step each in turn, in an order that changes every round, and
medians are compared with the setting as shipped (fused AdamW, float32): a ratio above 1 is faster. Then the
share of its time that a run waits for data, with 0 and 2 workers. The last line is a JSON object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from ldm_audio.config import build_objective, build_trainer, checkout, train_loader
from ldm_audio.objectives.base import to_device
from ldm_audio.training.loggers import read_rows
from ldm_audio.training.trainer import Trainer

UNTRAINED = (
    "allow_random_frozen=true",
    "vae=small",
    "clap=small",
    "tokenizer=bpe",
    "tokenizer.vocab_size=512",
)
SETTINGS = {
    "vae": ("objective.adversarial_start=0",),
    "vocoder": ("objective.adversarial_start=0",),
    "clap": (),
    "ldm": (*UNTRAINED, "data=quickstart"),
}
VARIANTS = {
    "shipped": (),
    "plain_adamw": ("optimizer.fused=false", "+optimizer.foreach=false"),
    "bf16": ("trainer.precision=bf16",),
    "channels_last": (),
    "compiled": ("trainer.compile=true",),
}
WARM_UP = 2  # steps of each variant that are not timed; compilation is in the first


def composed(objective: str, *overrides: str) -> DictConfig:
    """The quickstart's experiment, without files of earlier stages, writing into a temporary folder."""
    with initialize_config_dir(str(checkout() / "configs"), version_base="1.3"):
        folder = tempfile.mkdtemp(prefix="train_step_")
        return compose(
            "train",
            overrides=[
                f"experiment=quickstart/{objective}",
                f"runs={folder}",
                *SETTINGS[objective],
                *overrides,
            ],
        )


class Variant:
    """A trainer that is ready to take steps."""

    def __init__(self, objective: str, name: str):
        self.cfg = composed(objective, *VARIANTS[name])
        torch.manual_seed(0)
        data = instantiate(self.cfg.data.train)
        built = build_objective(self.cfg, data.captions())
        if name == "channels_last":
            built = built.to(memory_format=torch.channels_last)
        self.trainer: Trainer = build_trainer(self.cfg, torch.device("cpu"))
        self.trainer._set_up(built)
        self.batch = to_device(next(iter(train_loader(self.cfg, data)(0))), torch.device("cpu"))
        self.seconds: list[float] = []

    def step(self) -> None:
        began = time.perf_counter()
        self.trainer._train_step([self.batch])
        self.trainer.step += 1
        self.seconds.append(time.perf_counter() - began)


def steps(objective: str, names: list[str], rounds: int) -> dict[str, float]:
    """Items a second as shipped, and how many times as fast each variant is."""
    variants = {name: Variant(objective, name) for name in names}
    for number in range(WARM_UP + rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order:
            variants[name].step()
    medians = {name: median(variant.seconds[WARM_UP:]) for name, variant in variants.items()}
    shipped = medians.pop("shipped")
    rate = variants["shipped"].cfg.batch_size / shipped
    return {"items_per_second": rate} | {name: shipped / seconds for name, seconds in medians.items()}


def waiting(objective: str, num_workers: int, num_steps: int) -> float:
    """The share of a run's time that is spent waiting for data, its first steps left out."""
    cfg = composed(
        objective,
        f"num_workers={num_workers}",
        f"trainer.max_steps={2 * num_steps}",
        f"trainer.log_every={num_steps}",
        "trainer.prepare_batches=1",
        "val_items=1",
    )
    torch.manual_seed(0)
    data = instantiate(cfg.data.train)
    built = build_objective(cfg, data.captions())
    built.preview = lambda batch: {}
    val = [next(iter(train_loader(cfg, data)(0)))]
    build_trainer(cfg, torch.device("cpu")).fit(built, train_loader(cfg, data), val)
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
    results = {}
    for objective in arguments.objectives:
        results[objective] = steps(objective, names, arguments.rounds)
        for workers in (0, 2):
            results[objective][f"waiting_{workers}_workers"] = waiting(objective, workers, arguments.rounds)
        print(objective, {key: round(value, 3) for key, value in results[objective].items()}, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
