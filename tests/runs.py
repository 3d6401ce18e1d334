"""Training runs of toy objectives for the tests: made, read and compared bit for bit."""

import json
from functools import partial
from pathlib import Path

import torch
import toys
from safetensors.torch import load_file

from ldm_audio.models.unet import UNet
from ldm_audio.models.vae import VAE
from ldm_audio.objectives.base import Objective
from ldm_audio.pretrained import save_weights
from ldm_audio.training.checkpoint import load_checkpoint
from ldm_audio.training.optim import warmup
from ldm_audio.training.trainer import Trainer

DROPOUT = 0.1  # so that the state of the global generator matters
VALIDATION = [toys.batch(100, 101)]
NO_TIME = ("time", "items_per_second", "waiting_share", "peak_memory_gb")


def trainer(folder: Path, **changes) -> Trainer:
    settings = {
        "folder": str(folder), "max_steps": 6, "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "lr_schedule": partial(warmup, warmup_steps=4),
        "save_weights": partial(save_weights, system=None, provenance={}), "loggers": [],
        "device": "cpu", "strategy": "none", "precision": "fp32", "compile": False,
        "activation_checkpointing": False, "accumulate": 1,
        "clip_norm": None, "ema_decay": 0.9, "log_every": 1, "validate_every": 3, "save_every": 3,
        "prepare_batches": 2, "max_bad_steps": 3, "bar_position": 0,
    }  # fmt: skip
    return Trainer(**settings | changes)


def objective(name: str, *, seed: int = 0) -> Objective:
    """With dropout where there is any, and an adversary that joins in the middle."""
    changes = {}
    torch.manual_seed(seed)
    if name == "latent_diffusion":
        unet = UNet(**toys.arguments(toys.UNET_RECIPE) | {"dropout": DROPOUT})
        changes["unet"] = toys.with_recipe(unet, toys.UNET_RECIPE)
    if name == "vae":
        vae = VAE(**toys.arguments(toys.VAE_RECIPE) | {"dropout": DROPOUT})
        changes |= {"vae": toys.with_recipe(vae, toys.VAE_RECIPE), "adversarial_start": 2}
    if name == "vocoder":
        changes["adversarial_start"] = 2
    return toys.OBJECTIVES[name](**changes)


def rows(folder: Path) -> list[dict]:
    """The metrics without what the clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: v for key, v in json.loads(line).items() if key not in NO_TIME} for line in lines]


def state(folder: Path) -> dict:
    return load_checkpoint(folder / "checkpoints" / "last.pt")


def assert_same(one, other, key=""):
    """Bit for bit."""
    assert type(one) is type(other), key
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), key
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), key
        for name in one:
            assert_same(one[name], other[name], f"{key}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), key
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{key}[{i}]")
    else:
        assert one == other, key


def assert_same_runs(one: Path, other: Path) -> None:
    assert_same(state(one), state(other))
    assert rows(one) == rows(other)
    for file in sorted(one.rglob("*.safetensors")):
        assert_same(load_file(file), load_file(other / file.relative_to(one)), str(file))
