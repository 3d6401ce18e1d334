"""Published weights into files of ours and back: what `ldm-audio convert`, `inspect` and `export` do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_audio import speech_system
from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.convert import exports
from ldm_audio.convert.describe import describe_names, describe_own, describe_source
from ldm_audio.convert.parts import Source
from ldm_audio.convert.sources import local, open_source
from ldm_audio.convert.stored import open_file, open_safetensors, write_safetensors
from ldm_audio.data.speech_tokenizer import load_speech_tokenizer
from ldm_audio.data.tokenizers import load_tokenizer
from ldm_audio.errors import InputError
from ldm_audio.files import replacing
from ldm_audio.pretrained import (
    PART_OF,
    PARTS,
    SYSTEM_FORMAT,
    build_part,
    find_tokenizer,
    header_of,
    is_own,
    load_network,
    own_network,
    provenance_of,
    read_system,
    save_network,
    speech_pipeline,
    state_of,
    warn_if_collapsed,
    write_system,
)


def convert(
    path: str | Path,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    ema: bool = True,
    heads: str = "config",
    licence: str = "unspecified",
) -> Source:
    """Writes published weights as ours: a system's folder, or a network's file, `out` or in the folder `out`.

    Everything is checked before anything is written, and tensors pass through memory one at a time.
    """
    path, out = local(path), Path(out)
    if is_own(path):
        raise InputError(f"{path}: is ours already")
    source = open_source(path, ema=ema, heads=heads)
    states = {name: state_of(part) for name, part in source.parts.items()}
    for name, part in source.parts.items():
        part.check(states[name])
    words = find_tokenizer(source, path, tokenizer)

    is_file = out.suffix == ".safetensors"
    if is_file and len(source.parts) > 1:
        raise InputError(f"{out}: {path} holds {', '.join(source.parts)}; give the name of a folder")
    folder = out.parent if is_file else out
    files = {name: out if is_file else out / f"{name.split('.')[-1]}.safetensors" for name in source.parts}
    taken = [*files.values(), *([folder / "tokenizer.json"] if words else []), folder / "system.json"]
    if existing := [file for file in taken if file.exists() and not (is_file and file.name == "system.json")]:
        raise InputError(f"{existing[0]}: exists already; choose another place")

    for name, part in source.parts.items():
        header = header_of(part.recipe, provenance_of(source, path), licence)
        with replacing(files[name]) as temporary:
            write_safetensors(temporary, states[name], part.convert(states[name]), header=header)
    if words is not None:
        words.save(folder / "tokenizer.json")
        if "clap" in source.parts:
            warn_if_collapsed(build_part(source.parts["clap"]), words, path)  # its pages are in memory
    if source.system is not None:
        write_system(out, source.system | {"licence": licence})
    return source


def inspect(path: str | Path, *, ema: bool = True, heads: str = "config", rules: bool = False) -> list[str]:
    """What is at a path and how it would be taken, in lines; `rules` lists every rule of the tables."""
    path = local(path)
    if path.is_dir() and (path / "system.json").is_file():
        lines = [f"kind: {SYSTEM_FORMAT}", *(f"{key}: {value}" for key, value in read_system(path).items())]
        files = [path / f"{name}.safetensors" for name in parts_of(read_system(path))]
        return lines + [line for file in files for line in ("", f"{file.name}:", *inspect(file))]
    if path.is_file() and is_own(path):
        return describe_own(*open_safetensors(path))
    try:
        source = open_source(path, ema=ema, heads=heads)
    except InputError as error:
        if not path.is_file():
            raise
        return [*describe_names(open_file(path)), f"cannot be loaded: {error}"]
    return describe_source(source, state_of, rules=rules)


def export(path: str | Path, out: str | Path, *, to: str) -> None:
    """Writes a system of ours as a folder of `diffusers` or `transformers`, or one network of it."""
    path, out = local(path), Path(out)
    if not is_own(path):
        raise InputError(f"{path}: is not ours; convert it first")
    refuse_existing(out)
    if path.is_dir():
        export_system(path, out, to=to)
    else:
        export_network(path, out, to=to)


def export_system(path: Path, out: Path, *, to: str) -> None:
    """A speech system goes to transformers, the others become a diffusers pipeline."""
    system = read_system(path)
    networks = {name: opened(path / f"{name}.safetensors") for name in parts_of(system)}
    if system["pipeline"] == speech_system.PIPELINE:
        if to != "transformers":
            raise InputError(f"{path}: a {system['pipeline']} system goes to transformers")
        exports.export_clvp(out, system, networks, load_speech_tokenizer(path / "tokenizer.json"))
        return
    if to != "diffusers":
        raise InputError(f"{path}: a system goes to diffusers; give its clap or vocoder file for {to}")
    exports.export_pipeline(out, system, networks, load_tokenizer(path / "tokenizer.json"))


def export_network(path: Path, out: Path, *, to: str) -> None:
    """UNet and VAE go to diffusers, CLAP (with the tokenizer beside it) and vocoder to transformers."""
    recipe, state = opened(path)
    part = PART_OF.get(recipe["_target_"], recipe["_target_"])
    if part not in ({"unet", "vae"} if to == "diffusers" else {"clap", "vocoder"}):
        raise InputError(f"{path}: {to} has no place for a {part}")
    if part == "clap":
        has_words = (path.parent / "tokenizer.json").is_file()
        exports.export_clap(out, recipe, state, tokenizer=load_tokenizer(path) if has_words else None)
        return
    write = {"unet": exports.export_unet, "vae": exports.export_vae, "vocoder": exports.export_vocoder}[part]
    write(out, recipe, state)


def refuse_existing(out: Path) -> None:
    """InputError for a folder with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; choose another place")


def parts_of(system: dict) -> tuple[str, ...]:
    """The names of a system's networks."""
    return speech_system.PARTS if system["pipeline"] == speech_system.PIPELINE else PARTS


def join_speech(
    out: str | Path,
    *,
    speech_lm: str | Path,
    clvp: str | Path,
    tokenizer: str | Path,
    mel: SpeechMel,
    ending: Sequence[int] | None,
    cleaner: str = "english",
    licence: str = "unspecified",
) -> None:
    """Writes a system of networks from files, ours or TorToise's `autoregressive.pth` and `clvp2.pth`.

    mel: the front end of the voice, with the norms that speech_lm was trained with. ending:
    `convert.clvp.RELEASED_ENDING` for released weights, None for our own.
    """
    out = Path(out)
    refuse_existing(out)
    networks = {
        name: load_network(path, part=name) for name, path in (("speech_lm", speech_lm), ("clvp", clvp))
    }
    system = {"mel": mel.settings(), "ending": ending and list(ending), "cleaner": cleaner}
    pipeline = speech_pipeline(networks, system, local(tokenizer), out)  # refuses what does not fit
    for name, network in networks.items():
        save_network(
            network,
            out / f"{name}.safetensors",
            recipe=network.recipe,
            provenance=network.provenance,
            licence=licence,
        )
    pipeline.tokenizer.save(out / "tokenizer.json")
    write_system(out, {"pipeline": speech_system.PIPELINE, **system, "licence": licence})


def opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Recipe and state of a network file of ours, checked."""
    network = own_network(path)
    return network.recipe, network.state_dict()
