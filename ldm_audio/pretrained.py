"""Weights files that rebuild their network, folders that rebuild a whole system, and everyone else's weights.

A network file is safetensors whose header says how to build it: `recipe` (a `_target_` config), `provenance`
and `licence`, as JSON. A system is a folder: `system.json`, one network file a part, `tokenizer.json`.
Published weights (see `convert.sources`) load through the same functions; `exchange` writes them as ours.
"""

import json
import warnings
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm_audio import speech_system
from ldm_audio.audio.mel import LogMel
from ldm_audio.convert.parts import Part, Source, located
from ldm_audio.convert.rules import Rule
from ldm_audio.convert.sources import local, open_source
from ldm_audio.convert.stored import open_safetensors, read_json, write_safetensors
from ldm_audio.data.speech_tokenizer import SpeechTokenizer
from ldm_audio.data.tokenizers import Tokenizer, load_tokenizer
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.distributed import is_main, whole
from ldm_audio.errors import InputError
from ldm_audio.files import replacing, write_json
from ldm_audio.models.clap import CLAP
from ldm_audio.objectives.base import Objective
from ldm_audio.pipelines.text_to_audio import TextToAudio
from ldm_audio.pipelines.text_to_speech_tokens import TextToSpeechTokens

FORMAT = "ldm_audio.network/1"
SYSTEM_FORMAT = "ldm_audio.system/1"
ALLOWED_TARGETS = ("ldm_audio.models.", "ldm_audio.audio.", "ldm_audio.diffusion.")
PARTS = ("unet", "vae", "vocoder", "clap")
KEYS = {  # of `system.json`, by pipeline
    "text_to_audio": ("mel", "schedule", "latent_scale"),
    speech_system.PIPELINE: ("mel", "ending", "cleaner"),
}
PART_OF = {
    "ldm_audio.models.unet.UNet": "unet",
    "ldm_audio.models.vae.VAE": "vae",
    "ldm_audio.models.hifigan.HiFiGAN": "vocoder",
    "ldm_audio.models.clap.CLAP": "clap",
    "ldm_audio.models.htsat.HTSAT": "clap.audio_tower",
    "ldm_audio.models.roberta.Roberta": "clap.text_tower",
    "ldm_audio.models.speech_lm.SpeechLM": "speech_lm",
    "ldm_audio.models.clvp.CLVP": "clvp",
    "ldm_audio.models.dvae.DVAE": "dvae",
}
CAPTIONS = ("a dog barks", "a slow piano melody", "heavy rain on a tin roof", "a crowd cheers and claps")
COLLAPSED = 0.99  # cosine of the two least alike of these captions


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    tokenizer: str | None = None,
    ema: bool = True,
    heads: str = "config",
) -> nn.Module | TextToAudio | TextToSpeechTokens:
    """A pipeline for a system, a frozen network in eval mode for one network, our own or published.

    path: a file or folder, or `hf://owner/name[@revision][/file]`.
    tokenizer: file or folder with the vocabulary, which original checkpoints do not hold.
    ema, heads: see `convert.sources.open_source`.
    """
    path = local(path)
    source = None if is_own(path) else open_source(path, ema=ema, heads=heads)
    if path.is_dir() if source is None else source.system is not None:
        return load_system(path, tokenizer=tokenizer, ema=ema, heads=heads, device=device)
    return load_network(path, ema=ema, heads=heads).to(device)


def is_own(path: Path) -> bool:
    """Whether `path` is a system's folder or a network file that this package wrote."""
    if path.is_dir():
        return (path / "system.json").is_file()
    if path.suffix != ".safetensors":
        return False
    written = open_safetensors(path)[0].get("format", "")
    if written != FORMAT and written.startswith("ldm_audio.network/"):
        raise InputError(f"{path}: format {written}, expected {FORMAT}")
    return written == FORMAT


def load_network(
    path: str | Path, *, part: str | None = None, ema: bool = True, heads: str = "config"
) -> nn.Module:
    """One network, loaded strictly, frozen, in eval mode; it carries `recipe` and `provenance`.

    part: `unet`, `vae`, `vocoder`, `clap`, `speech_lm` or `clvp`, where a folder or a file holds several.

    InputError for what is not known, does not hold that part, or names something outside this package's
    networks, and for tensors that do not fit.
    """
    path = local(path)
    if is_own(path):
        network = own_network(path / f"{part}.safetensors" if path.is_dir() else path)
        held = PART_OF.get(network.recipe.get("_target_"))
        if part and held not in (part, None):
            raise InputError(f"{path}: holds a {held}, expected a {part}")
        return network
    source = open_source(path, ema=ema, heads=heads)
    tell(source)
    name = part or next(iter(source.parts))
    if name not in source.parts or (part is None and len(source.parts) > 1):
        raise InputError(f"{path}: holds {', '.join(source.parts)}, expected {part or 'one network alone'}")
    network = build_part(source.parts[name])
    network.provenance = provenance_of(source, path)
    if isinstance(network, CLAP) and network.text_tower is not None:
        warn_if_collapsed(network, source.tokenizer and load_tokenizer(source.tokenizer), path)
    return network


def load_parts(path: str | Path, names: tuple[str, ...]) -> tuple[dict[str, nn.Module], float | None]:
    """Of what is at `path`, the networks in or below `names` (`clap.audio_tower`), and its `latent_scale`.

    InputError where there is none of them.
    """
    path = local(path)
    scale = None
    if is_own(path):
        files = [path / f"{name}.safetensors" for name in names] if path.is_dir() else [path]
        scale = read_system(path).get("latent_scale") if path.is_dir() else None
        networks = [own_network(file) for file in files if file.exists()]
        found = {PART_OF.get(network.recipe["_target_"], ""): network for network in networks}
    else:
        source = open_source(path)
        tell(source)
        scale = source.system and source.system.get("latent_scale")
        found = {name: build_part(p) for name, p in source.parts.items() if name.split(".")[0] in names}
    found = {name: network for name, network in found.items() if name.split(".")[0] in names}
    if not found:
        raise InputError(f"{path}: holds no weights of {', '.join(names)}, which is to begin with them")
    return found, scale


def own_network(path: Path) -> nn.Module:
    """The network of a file that this package wrote."""
    header, tensors = open_safetensors(path)
    if header.get("format") != FORMAT:
        raise InputError(f"{path}: its header has no format {FORMAT}; it was not written by ldm_audio")
    try:
        recipe, provenance = (json.loads(header[key]) for key in ("recipe", "provenance"))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: its header holds no recipe and provenance in JSON") from error
    network = build_part(Part(recipe, [Rule("{name:*}", "{name}")], tensors, str(path)))
    network.provenance = provenance
    return network


def build_part(part: Part) -> nn.Module:
    """The network of a part with its weights, frozen, in eval mode."""
    network = build(part.recipe, source=part.origin)
    network.load_state_dict(dict(part.convert(network.state_dict())), assign=True)
    return network.requires_grad_(False).eval()


def state_of(part: Part) -> dict[str, Tensor]:
    """The state that a part's network has, on the meta device."""
    return build(part.recipe, source=part.origin).state_dict()


class WithoutInit(TorchFunctionMode):
    """Skips what fills new parameters: on the meta device there is nothing to fill, and it takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build(recipe: dict, *, source: str) -> nn.Module:
    """Builds a recipe on the meta device; InputError where it makes no network, or names other than ours."""
    if not isinstance(recipe, dict) or "_target_" not in recipe:
        raise InputError(f"{source}: its recipe names no network")
    try:
        with torch.device("meta"), WithoutInit():
            network = instantiate(recipe)
    except Exception as error:  # whatever a class says of arguments that may be anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{source}: its config makes no network ({reason})") from error
    network.recipe = recipe
    return network


def instantiate(node: object) -> object:
    """A node of a recipe, built: what has a `_target_` becomes that class's instance, from the inside out.

    InputError for what is no class of `ALLOWED_TARGETS`: a file must not choose what code runs.
    """
    if isinstance(node, list):
        return [instantiate(child) for child in node]
    if not isinstance(node, dict):
        return node
    target = own_class(str(node["_target_"])) if "_target_" in node else dict
    return target(**{name: instantiate(child) for name, child in node.items() if name != "_target_"})


def own_class(target: str) -> type:
    """The class of that name, defined in one of our modules (and not imported there, like `os`)."""
    module, _, name = target.rpartition(".")
    found = None
    if module.startswith(ALLOWED_TARGETS):
        with suppress(ImportError):
            found = getattr(import_module(module), name, None)
    if not isinstance(found, type) or found.__module__ != module:
        raise InputError(f"{target} is not one of this package's networks")
    return found


def save_network(
    network: nn.Module,
    path: Path,
    *,
    recipe: dict,
    provenance: dict | None,
    licence: str = "unspecified",
) -> None:
    """Writes `network` with the `recipe` that rebuilds it to `path`, atomically.

    Of several processes every one calls it, for the network may be split over them, and the main one writes.
    """
    state = {name: whole(tensor).detach() for name, tensor in network.state_dict().items()}
    if is_main():
        with replacing(path) as temporary:
            write_safetensors(temporary, state, state.items(), header=header_of(recipe, provenance, licence))


def header_of(recipe: dict, provenance: dict | None, licence: str) -> dict[str, str]:
    """A network file's header."""
    return {
        "format": FORMAT,
        "recipe": json.dumps(recipe),
        "provenance": json.dumps(provenance),
        "licence": licence,
    }


def save_weights(objective: Objective, folder: Path, *, system: dict | None, provenance: dict) -> None:
    """What a training run leaves to be used: its networks, its tokenizer, and the system where it is one.

    The frozen parts of a system are written once; `system.json` comes last, so that it never names a part
    that is not there. Every process calls it, the main one writes.
    """
    for name, network in objective.weights().items():
        recipe = getattr(objective, name).recipe
        save_network(network, folder / f"{name}.safetensors", recipe=recipe, provenance=provenance)
    if not is_main():
        return
    tokenizer = getattr(objective, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
    if system is None:
        return
    for name in objective.frozen:
        part, path = getattr(objective, name), folder / f"{name}.safetensors"
        if part is not None and not path.exists():
            save_network(part, path, recipe=part.recipe, provenance=getattr(part, "provenance", None))
    write_system(folder, system | {"latent_scale": float(objective.latent_scale)})


def write_system(folder: Path, system: dict) -> None:
    """`system.json`."""
    write_json(folder / "system.json", {"format": SYSTEM_FORMAT, "pipeline": "text_to_audio"} | system)


def read_system(folder: Path) -> dict[str, Any]:
    """`system.json`; InputError where it is another's or lacks something."""
    path = folder / "system.json"
    system = read_json(path)
    if system.get("format") != SYSTEM_FORMAT:
        raise InputError(f"{path}: format {system.get('format')}, expected {SYSTEM_FORMAT}")
    if system.get("pipeline") not in KEYS:
        raise InputError(f"{path}: pipeline {system.get('pipeline')}, expected {' or '.join(KEYS)}")
    if missing := [key for key in KEYS[system["pipeline"]] if key not in system]:
        raise InputError(f"{path}: lacks {', '.join(missing)}")
    return system


def load_system(
    folder: str | Path,
    *,
    vocoder: str | None = None,
    tokenizer: str | None = None,
    ema: bool = True,
    heads: str = "config",
    device: str = "cpu",
) -> TextToAudio | TextToSpeechTokens:
    """The pipeline of a system, our own or published, with the vocoder of another file where one is named."""
    path = local(folder)
    if is_own(path):
        system = read_system(path)
        if system["pipeline"] == speech_system.PIPELINE:
            parts = {name: own_network(path / f"{name}.safetensors") for name in speech_system.PARTS}
            place = local(tokenizer) if tokenizer else path / "tokenizer.json"
            return speech_pipeline(parts, system, place, path).to(device)
        words = load_tokenizer(local(tokenizer, settings_only=True) if tokenizer else path / "tokenizer.json")
        names = [name for name in PARTS if name != "vocoder" or vocoder is None]
        parts = {name: own_network(path / f"{name}.safetensors") for name in names}
    else:
        source = open_source(path, ema=ema, heads=heads)
        if source.system is None:
            raise InputError(f"{path}: a {source.kind}, which is no system")
        tell(source)
        if source.system.get("pipeline") == speech_system.PIPELINE:
            parts = {name: build_part(part) for name, part in source.parts.items()}
            place = local(tokenizer) if tokenizer else source.tokenizer
            return speech_pipeline(parts, source.system, place, path).to(device)
        system, words = source.system, find_tokenizer(source, path, tokenizer)
        parts = {name: build_part(part) for name, part in source.parts.items()}
    if vocoder is not None:
        parts["vocoder"] = load_network(vocoder, part="vocoder")
    warn_if_collapsed(parts["clap"], words, path)
    with located(path):
        pipeline = TextToAudio(
            **parts,
            tokenizer=words,
            schedule=Schedule(**system["schedule"]),
            mel=LogMel(**system["mel"]),
            latent_scale=float(system["latent_scale"]),
        )
    return pipeline.to(device)


def speech_pipeline(
    networks: dict[str, nn.Module], system: dict, place: Path | None, path: Path
) -> TextToSpeechTokens:
    """The pipeline of speech networks at `path`, with the tokenizer at `place`."""
    recipe = networks["speech_lm"].recipe
    words = speech_system.speech_words(place, path, cleaner=system["cleaner"], recipe=recipe)
    with located(path):
        return speech_system.speech_pipeline(networks, system, words)


def find_tokenizer(source: Source, path: Path, given: str | None) -> Tokenizer | SpeechTokenizer | None:
    """The tokenizer given, else the source's own; None for networks without text.

    InputError where a text tower lacks one or has another.
    """
    if "clap" not in source.parts and source.system is not None:
        place = local(given) if given else source.tokenizer
        recipe = source.parts["speech_lm"].recipe
        return speech_system.speech_words(place, path, cleaner=source.system["cleaner"], recipe=recipe)
    if "clap" not in source.parts or source.parts["clap"].recipe["text_tower"] is None:
        return None
    place = local(given, settings_only=True) if given else source.tokenizer
    if place is None:
        raise InputError(
            f"{path}: holds no vocabulary; give tokenizer=FOLDER with RoBERTa's (tokenizer.json, or "
            "vocab.json and merges.txt) or tokenizer=hf://FacebookAI/roberta-base"
        )
    tokenizer = load_tokenizer(place)
    known = source.parts["clap"].recipe["text_tower"]["vocab_size"]
    if tokenizer.vocab_size > known:
        raise InputError(f"{place}: {tokenizer.vocab_size} tokens, the text tower of {path} knows {known}")
    return tokenizer


@torch.no_grad()
def warn_if_collapsed(clap: CLAP, tokenizer: Tokenizer | None, path: Path) -> None:
    """Warns about a text tower that hardly tells captions apart; without a tokenizer, random tokens."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(clap.text_tower.vocab_size, (len(CAPTIONS), 8), generator=generator)
        embed = clap.embed_text(tokens, torch.ones_like(tokens, dtype=torch.bool))
    else:
        embed = clap.embed_text(*tokenizer(CAPTIONS))
    least = (embed @ embed.T).min().item()
    if not least < COLLAPSED:
        warnings.warn(
            f"{path}: CLAP's text tower gives nearly the same embedding for all captions "
            f"(smallest cosine {least:.4f})",
            stacklevel=3,
        )


def tell(source: Source) -> None:
    """Warns of what a user should know about a source."""
    for caution in source.cautions:
        warnings.warn(caution, stacklevel=3)


def provenance_of(source: Source, path: Path) -> dict[str, Any]:
    """Where converted weights come from."""
    return {
        "source": path.name,
        "kind": source.kind,
        "taken": source.notes,
        "versions": {name: version(name) for name in ("ldm_audio", "torch")},
    }
