"""Weights files that rebuild their network, and folders that rebuild a whole system.

A network file is safetensors whose header says how to build it: `recipe` (a `_target_` config), `provenance`
and `licence`, as JSON. A system is a folder: `system.json`, one network file a part, `tokenizer.json`.
"""

import json
from pathlib import Path

import hydra
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ldm_audio.audio.mel import LogMel
from ldm_audio.data.tokenizers import load_tokenizer
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.errors import InputError
from ldm_audio.files import replacing, write_json
from ldm_audio.objectives.base import Objective
from ldm_audio.pipelines.text_to_audio import TextToAudio

FORMAT = "ldm_audio.network/1"
SYSTEM_FORMAT = "ldm_audio.system/1"
ALLOWED_TARGETS = ("ldm_audio.models.", "ldm_audio.audio.", "ldm_audio.diffusion.")
PARTS = ("unet", "vae", "vocoder", "clap")


def load(path: str, *, device: str = "cpu") -> nn.Module | TextToAudio:
    """A pipeline for a system's folder, a frozen network in eval mode for a weights file."""
    return load_system(path, device=device) if Path(path).is_dir() else load_network(path).to(device)


def save_network(
    network: nn.Module, path: Path, *, recipe: dict, provenance: dict, licence: str = "unspecified"
) -> None:
    """Writes `network` with the `recipe` that rebuilds it to `path`, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    header = {
        "format": FORMAT,
        "recipe": json.dumps(recipe),
        "provenance": json.dumps(provenance),
        "licence": licence,
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_network(path: str) -> nn.Module:
    """The network of a weights file: built from its recipe, loaded strictly, frozen, in eval mode.

    It carries `recipe` and `provenance`. InputError for a file of another kind, a recipe that names something
    outside this package's networks, or tensors that do not fit.
    """
    path = Path(path)
    header, tensors = read_file(path)
    recipe = json.loads(header["recipe"])
    network = build(recipe, source=str(path))
    expected = network.state_dict()
    odd = sorted(expected.keys() ^ tensors.keys())
    odd += [k for k in expected.keys() & tensors.keys() if expected[k].shape != tensors[k].shape]
    if odd:
        raise InputError(f"{path}: {len(odd)} tensors are missing, extra or of another shape, first {odd[0]}")
    network.load_state_dict(tensors, assign=True)
    network.provenance = json.loads(header["provenance"])
    return network.requires_grad_(False).eval()


def build(recipe: dict, *, source: str) -> nn.Module:
    """Instantiates a recipe on the meta device after checking every `_target_` in it."""
    check_targets(recipe, source)
    with torch.device("meta"):
        network = hydra.utils.instantiate(recipe, _convert_="all")
    network.recipe = recipe
    return network


def check_targets(node: object, source: str) -> None:
    """InputError for a `_target_` outside `ALLOWED_TARGETS`: a file must not choose what code runs."""
    if isinstance(node, list):
        for child in node:
            check_targets(child, source)
    if isinstance(node, dict):
        target = node.get("_target_", ALLOWED_TARGETS[0])
        if not str(target).startswith(ALLOWED_TARGETS):
            raise InputError(
                f"{source}: its recipe names {target}, which is not one of this package's networks"
            )
        for child in node.values():
            check_targets(child, source)


def read_file(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Header and tensors of a network file; InputError if it is missing, damaged or not ours."""
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        raise InputError(f"{path}: its header has no format {FORMAT}; it was not written by ldm_audio")
    return header, tensors


def save_weights(objective: Objective, folder: Path, *, system: dict | None, provenance: dict) -> None:
    """What a training run leaves to be used: its networks, its tokenizer, and the system where it is one.

    The frozen parts of a system are written once; `system.json` comes last, so that it never names a part
    that is not there.
    """
    for name, network in objective.weights().items():
        recipe = getattr(objective, name).recipe
        save_network(network, folder / f"{name}.safetensors", recipe=recipe, provenance=provenance)
    tokenizer = getattr(objective, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
    if system is None:
        return
    for name in objective.frozen:
        part, path = getattr(objective, name), folder / f"{name}.safetensors"
        if part is not None and not path.exists():
            save_network(part, path, recipe=part.recipe, provenance=part.provenance)
    scale = {"latent_scale": float(objective.latent_scale)}
    write_json(
        folder / "system.json", {"format": SYSTEM_FORMAT, "pipeline": "text_to_audio"} | system | scale
    )


def load_system(folder: str, *, vocoder: str | None = None, device: str = "cpu") -> TextToAudio:
    """The pipeline of a system's folder, with the vocoder of another file where one is named."""
    folder = Path(folder)
    if not (folder / "system.json").is_file():
        raise InputError(f"{folder}: holds no system.json, so it is not a system")
    system = json.loads((folder / "system.json").read_text())
    if system.get("format") != SYSTEM_FORMAT:
        raise InputError(f"{folder / 'system.json'}: format {system.get('format')}, expected {SYSTEM_FORMAT}")
    files = {name: folder / f"{name}.safetensors" for name in PARTS}
    if vocoder is not None:
        files["vocoder"] = Path(vocoder)
    parts = {name: load_network(file) for name, file in files.items()}
    pipeline = TextToAudio(
        **parts,
        tokenizer=load_tokenizer(folder / "tokenizer.json"),
        schedule=Schedule(**system["schedule"]),
        mel=LogMel(**system["mel"]),
        latent_scale=system["latent_scale"],
    )
    return pipeline.to(device)
