"""What `sample.py` does with its config: reads the prompts, loads the system, fills the folder."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from ldm_audio.config import plain, require
from ldm_audio.convert.sources import local
from ldm_audio.convert.stored import open_safetensors
from ldm_audio.errors import InputError
from ldm_audio.files import replacing
from ldm_audio.pipelines.encode import state_hash
from ldm_audio.pipelines.requests import (
    Request,
    between,
    conditions,
    packing_pays,
    read_embeds,
    read_requests,
    rows_within,
    sample_requests,
    text_embeds,
)
from ldm_audio.pipelines.samples import SampleFolder
from ldm_audio.pipelines.text_to_audio import Edit, TextToAudio
from ldm_audio.pretrained import PARTS, is_own, load_system

PIECE = 10.24  # seconds, where neither the prompt nor a recording says how long
SETTINGS = ("spacing", "guidance_rescale", "guidance_interval", "window", "overlap", "decode_window")


def sample(cfg: DictConfig) -> None:
    """Writes the sounds that a config asks for. Ctrl-C leaves those that are finished, and says how many.

    Under torchrun each process makes its share of the prompts.
    """
    require(cfg)
    if cfg.batch_size < 1:
        raise InputError(f"batch_size={cfg.batch_size}: expected 1 or more")
    if cfg.memory_limit is not None and not (
        isinstance(cfg.memory_limit, int | float) and cfg.memory_limit > 0
    ):
        raise InputError(f"memory_limit={cfg.memory_limit}: expected GB, more than 0")
    edit = None if cfg.get("edit") is None else instantiate(cfg.edit, _convert_="all")
    requests = requests_of(cfg, edit)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in SHARE)
    total = len(requests) + (len(requests) - 1) * cfg.interpolate
    share = {"total": total, "rank": rank, "world_size": world_size, "overwrite": cfg.overwrite}
    SampleFolder(cfg.out, mel=None, **share)  # refuses a full one before anything is loaded
    system = load_system(
        cfg.weights,
        vocoder=cfg.vocoder.path,
        tokenizer=cfg.tokenizer.path,
        ema=cfg.ema,
        heads=cfg.heads,
        device=local_device(cfg.device),
    )
    record = record_of(cfg, system)
    requests, embeds, negatives = prepared(cfg, system, requests)
    system.forget_text().set_precision(cfg.precision)
    if cfg.compile:
        system.compile()
    elif packing_pays(requests):
        system.pack()

    settings = {name: plain(cfg)[name] for name in SETTINGS}
    settings |= {"sampler": instantiate(cfg.sampler), "edit": edit}
    batch_size = cfg.batch_size
    if cfg.memory_limit is not None:
        batch_size = rows_within(
            system,
            requests,
            embeds,
            negatives,
            limit=cfg.memory_limit,
            batch_size=batch_size,
            settings=settings,
        )
        print(f"memory_limit={cfg.memory_limit}: {batch_size} at a time", file=sys.stderr)

    folder = SampleFolder(cfg.out, mel=system.mel, **share)
    # The delay keeps an empty bar from standing before the line that refuses a request.
    with tqdm(unit="step", dynamic_ncols=True, position=rank, desc="sample", delay=0.5) as bar:

        def progress(done: int, total_steps: int, written: int) -> None:
            bar.total = total_steps
            bar.set_postfix_str(f"{written} written", refresh=False)
            bar.update(done - bar.n)

        try:
            sample_requests(
                system,
                requests,
                embeds,
                negatives,
                folder,
                batch_size=batch_size,
                settings=settings,
                record=record,
                progress=progress,
            )
        except KeyboardInterrupt:
            bar.close()
            print(f"stopped: {folder.written} sounds are in {folder.folder}", file=sys.stderr)
            sys.exit(130)


SHARE = (("RANK", "0"), ("WORLD_SIZE", "1"))  # what torchrun tells each process


def requests_of(cfg: DictConfig, edit: Edit | None) -> list[Request]:
    """The prompts of `prompt` (one or a list), `prompts` (a file) or `audio_prompt`, with their settings.

    An edit without any takes its own recording for an audio prompt: a variation of it.
    """
    given = [key for key in ("prompt", "prompts", "audio_prompt", "prompt_embeds") if cfg[key] is not None]
    if len(given) > 1 or (not given and edit is None):
        raise InputError(
            'give either prompt="..." or prompts=FILE with one prompt a line, audio_prompt=FILE or '
            "prompt_embeds=FILE"
        )
    default = Request(
        prompt="",
        negative_prompt=cfg.negative_prompt or "",
        audio_prompt=None if given else str(edit.path),
        seed=cfg.seed,
        duration=PIECE if cfg.duration is None and edit is None else cfg.duration,
        num_steps=cfg.num_steps,
        guidance_scale=cfg.guidance_scale,
        num_waveforms_per_prompt=cfg.num_waveforms_per_prompt,
    )
    if given == ["prompts"]:
        return read_requests(cfg.prompts, default)
    if given == ["prompt_embeds"]:
        return [default] * len(read_embeds(cfg.prompt_embeds))
    values = plain(cfg)[given[0]] if given else default.audio_prompt
    values = [values] if isinstance(values, str) else values
    if not values or not all(isinstance(value, str) for value in values):
        raise InputError(f"{given[0]}={values}: expected a text, or a list of at least one")
    name = "prompt" if given == ["prompt"] else "audio_prompt"
    return [replace(default, **{name: value}) for value in values]


def prepared(
    cfg: DictConfig, system: TextToAudio, requests: Sequence[Request]
) -> tuple[list[Request], Tensor, Tensor]:
    """The requests, those in between included, with the embeddings of prompts and of negative prompts.

    The former are saved where asked for.
    """
    if cfg.prompt_embeds is not None:
        embeds = read_embeds(cfg.prompt_embeds)
    else:
        embeds = conditions(system, requests, cfg.batch_size)
    requests = list(requests)
    if cfg.interpolate:
        requests, embeds = between(requests, embeds, cfg.interpolate)
    if cfg.save_embeds is not None:
        with replacing(cfg.save_embeds) as temporary, temporary.open("wb") as file:
            np.save(file, embeds.numpy())
    negatives = text_embeds(system, [request.negative_prompt for request in requests], cfg.batch_size)
    return requests, embeds, negatives


def record_of(cfg: DictConfig, system: TextToAudio) -> dict[str, Any]:
    """What every sound's entry says of how it was made, the weights' hashes included."""
    settings = plain(cfg)
    names = (*SETTINGS, "sampler", "precision", "interpolate")
    return {
        **{name: settings[name] for name in names},
        "edit": settings.get("edit"),
        "weights": {"path": cfg.weights} | {name: part_hash(cfg, system, name) for name in PARTS},
    }


def part_hash(cfg: DictConfig, system: TextToAudio, name: str) -> str:
    """Of a file of ours, read once more for it: the network's own pages would all be in memory afterwards."""
    path = local(cfg.weights)
    if is_own(path) and (name != "vocoder" or cfg.vocoder.path is None):
        return state_hash(open_safetensors(path / f"{name}.safetensors")[1])
    return state_hash(getattr(system, name).state_dict())


def local_device(device: str) -> str:
    """`cuda` under torchrun: this process's own."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device={device}: expected cpu, cuda or mps, as far as there is one ({reason})"
        ) from error
    return device
