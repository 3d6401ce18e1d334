"""What one process, or each of two, does in the tests of distributed training.

Toy objectives are trained in float64, each in a folder of its own.
"""

import os
from functools import partial
from pathlib import Path

import torch
import toys

from ldm_audio.data.loader import sequential_batches, share_of
from ldm_audio.distributed import process_group, rank, world_size
from ldm_audio.objectives.base import Objective
from ldm_audio.pretrained import save_weights
from ldm_audio.training.optim import warmup
from ldm_audio.training.trainer import Trainer

GLOBAL_BATCH = 4
DDP = ("clvp", "contrastive", "dvae", "latent_diffusion", "speech_lm", "vae", "vocoder")
FSDP2 = ("latent_diffusion", "contrastive")


def double(batch: dict) -> dict:
    return {k: v.double() if k in ("waveform", "references") else v for k, v in batch.items()}


def training_batches(name: str, *, size: int = GLOBAL_BATCH):
    """This rank's part of batches of `size`."""
    own = toys.Batches(size // world_size(), rank=rank(), world_size=world_size())
    if name == "latent_diffusion":
        return toys.cached(own)
    return lambda step: (double(batch) for batch in own(step))


def validation_batches(name: str) -> list[dict]:
    """Five clips in batches of two, so that the last is smaller and one rank has a batch less."""
    batches = []
    for keys in share_of(sequential_batches(5, 2, None), rank=rank(), world_size=world_size()):
        batch = toys.batch(*[100 + key.index for key in keys])
        batch = toys.latents_of(batch) if name == "latent_diffusion" else double(batch)
        batches.append(batch | {"item": torch.tensor([key.item for key in keys])})
    return batches


def train(folder: Path, name: str, *, strategy: str, max_steps: int, **changes) -> Objective:
    """Trains, or continues, a toy objective there."""
    torch.manual_seed(0)
    objective = toys.objective(name).double()
    objective.preview = lambda batch: {}  # its noise is float32
    settings = {
        "folder": str(folder), "max_steps": max_steps,
        "optimizer": partial(torch.optim.AdamW, lr=1e-3, fused=True),
        "lr_schedule": partial(warmup, warmup_steps=2),
        "save_weights": partial(save_weights, system=None, provenance={}), "loggers": [], "device": "cpu",
        "strategy": strategy, "precision": "fp32", "compile": False, "activation_checkpointing": False,
        "accumulate": 1, "clip_norm": 0.5, "ema_decay": 0.9, "log_every": 1, "validate_every": 2,
        "save_every": 3, "prepare_batches": 2, "max_bad_steps": 3, "bar_position": 0,
    }  # fmt: skip
    trainer = Trainer(**settings | changes)
    batches = training_batches(name, size=GLOBAL_BATCH // trainer.accumulate)
    trainer.fit(objective, batches, validation_batches(name))
    return objective


def train_by_ddp(folder: Path) -> None:
    for name in DDP:
        train(folder / name, name, strategy="ddp", max_steps=5)


def train_the_rest(folder: Path) -> None:
    """What takes longer: sharded networks, resuming, accumulation."""
    for name in FSDP2:
        train(folder / name, name, strategy="fsdp2", max_steps=5)
    for strategy in ("ddp", "fsdp2"):
        for max_steps in (3, 5):
            place = folder / f"{strategy}_resumed"
            train(place, "contrastive", strategy=strategy, max_steps=max_steps)
        accumulated = {"accumulate": 2, "prepare_batches": 4, "activation_checkpointing": True}
        place = folder / f"{strategy}_accumulated"
        train(place, "latent_diffusion", strategy=strategy, max_steps=5, **accumulated)
    train(folder / "begun", "latent_diffusion", strategy="fsdp2", max_steps=3)


def run(own_rank: int, port: int, what: str, folder: Path) -> None:
    """One of two processes, in the environment that torchrun gives; its store is at `port`."""
    os.environ |= {
        "RANK": str(own_rank), "LOCAL_RANK": str(own_rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    with process_group("ddp", "cpu"):
        {"ddp": train_by_ddp, "rest": train_the_rest}[what](folder)
