"""The Hydra glue: a run's folder, its config on disk, and the parts that a config names, built and joined."""

import functools
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, OverrideParseException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from tqdm import tqdm

from ldm_audio import pretrained
from ldm_audio.audio.io import resample_sinc
from ldm_audio.data.loader import ItemKey, StepBatches, Unreadable, make_loader, sequential_batches, share_of
from ldm_audio.data.tokenizers import load_tokenizer
from ldm_audio.distributed import barrier, is_main, process_group, rank, world_size
from ldm_audio.errors import InputError, RunError
from ldm_audio.evaluation.retrieval import retrieval
from ldm_audio.files import only_one_in, write_json, write_text
from ldm_audio.objectives.base import Objective
from ldm_audio.pipelines.encode import Encoder, encode, settings_hash, state_hash
from ldm_audio.pipelines.memory import keep_freed_memory
from ldm_audio.training.trainer import Trainer

FREE_ON_RESUME = {
    "trainer.max_steps", "lr_schedule.max_steps", "trainer.lr_schedule.max_steps", "trainer.bar_position",
    "trainer.log_every", "trainer.device", "trainer.loggers", "logger", "num_workers", "trainer.strategy",
}  # fmt: skip
"""Keys that may differ when a run is continued: how long it goes on, where, and what it tells."""

NUMBERS = {"seed", "batch_size", "val_batch_size", "val_items", "num_workers"}
"""Keys of the first level that are whole numbers; the others go to functions that say what they take."""

TRAINING_ONLY = {"dropout", "drop_path", "spec_augment"}
"""Arguments of networks that change how they train and not what they are."""

NEVER_STOPS = 2**40


def one_line_errors(main: Callable) -> Callable:
    """Prints an InputError, and what Hydra finds wrong in the overrides, as one line on stderr and exits with
    2, a RunError with 1, Ctrl-C with 130; a UserWarning is one line too.

    Other errors keep their traceback. Hydra wraps what the parts that it builds raise, so the causes of an
    error are looked at too.
    """

    @functools.wraps(main)
    def wrapped(*args):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print in several lines
        warnings.formatwarning = format_warning
        try:
            check_groups(sys.argv[1:])
            return main(*args)
        except KeyboardInterrupt:
            sys.exit(130)
        except (ConfigCompositionException, OverrideParseException) as error:
            print(f"error: {overrides_error(error)}", file=sys.stderr)
            sys.exit(2)
        except Exception as error:
            cause = error
            while cause is not None and not isinstance(cause, InputError | RunError):
                cause = cause.__cause__
            if cause is None:
                raise
            print(f"error: {cause}", file=sys.stderr)
            sys.exit(2 if isinstance(cause, InputError) else 1)

    return wrapped


def check_groups(overrides: Sequence[str]) -> None:
    """InputError for a config group set to null, of which Hydra does not say which it is."""
    for name in (override.removesuffix("=null") for override in overrides if override.endswith("=null")):
        if name and (checkout() / "configs" / name).is_dir():
            raise InputError(f"{name}=null: a config group is left out by ~{name}")


def overrides_error(error: Exception) -> str:
    """What Hydra says of a wrong override, in one line, without its search path and its types."""
    text = str(error).partition("Config search path")[0].partition("full_key")[0]
    return " ".join(text.split())


def format_warning(message: str, category: type[Warning], filename: str, lineno: int, line=None) -> str:
    """A UserWarning is for who gave the command; of others the place matters."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def checkout() -> Path:
    """The folder with `train.py`, `sample.py` and `configs/`: the checkout, or their copies in the wheel."""
    package = Path(__file__).parent
    return package.parent if (package.parent / "configs").is_dir() else package / "checkout"


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """`configs/<name>.yaml` with these overrides; InputError for a value that was not given."""
    with initialize_config_dir(str(checkout() / "configs"), version_base="1.3"):
        cfg = compose(name, overrides=list(overrides))
    require(cfg)
    return cfg


def plain(node: DictConfig) -> dict:
    """A config node as plain, resolved Python values."""
    return OmegaConf.to_container(node, resolve=True)


@contextmanager
def opened_run(cfg: DictConfig) -> Iterator[torch.device]:
    """Inside, the run's folder is this run's alone and its processes know each other; yields one's device."""
    require(cfg)
    check_mixup(cfg)
    with (
        process_group(cfg.trainer.strategy, cfg.trainer.device) as device,
        only_one_in(Path(cfg.folder)) if is_main() else nullcontext(),
    ):
        if device.type == "cpu":
            keep_freed_memory()
        open_folder(Path(cfg.folder), plain(cfg) | {"processes": world_size()})
        torch.manual_seed(cfg.seed)
        yield device


def open_folder(folder: Path, config: dict) -> None:
    """Makes the run's folder and writes its config, or checks that a run to continue has the same one.

    A run that never came to its first step has nothing to continue. One of n processes may go on in m where
    a step takes as many items as before.
    """
    path = folder / "config.yaml"
    if path.exists() and (folder / "metrics.jsonl").exists():
        old = plain(OmegaConf.load(path))
        lines = differences(old, config)
        is_same_step = items_of_a_step(old) == items_of_a_step(config)
        free = FREE_ON_RESUME | ({"batch_size", "processes"} if is_same_step else set())
        differing = [line for line in lines if not is_below(line.partition(":")[0], free)]
        if differing:
            raise InputError(
                f"{folder} holds a run with another config ({'; '.join(differing)}): choose run=NAME"
            )
    barrier()  # all have read it
    if is_main():
        write_text(path, OmegaConf.to_yaml(OmegaConf.create(config)))


def items_of_a_step(config: dict) -> int:
    """How many items all processes take together between two positions of the data."""
    return config["batch_size"] * config.get("processes", 1)


def is_below(key: str, keys: Iterable[str]) -> bool:
    """Whether this key, or one that holds it, is among `keys`."""
    return any(key == above or key.startswith(f"{above}.") for above in keys)


def require(cfg: DictConfig) -> None:
    """InputError that names the keys without a value, the key whose value refers to none, or the key of a
    word where a number belongs."""
    missing = missing_keys(OmegaConf.to_container(cfg, resolve=False))
    if missing:
        raise InputError(f"no value for {', '.join(missing)}: give {missing[0]}=VALUE")
    try:
        values = plain(cfg)
    except InterpolationResolutionError as error:
        raise InputError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    for name in NUMBERS & values.keys():
        if not isinstance(values[name], int):
            raise InputError(f"{name}={values[name]}: expected a whole number")
    check_numbers(values)


def check_numbers(node: object, key: str = "") -> None:
    """InputError for a word where the function or class that a node names takes a number."""
    if not isinstance(node, dict):
        return
    target = get_object(node["_target_"]) if "_target_" in node else None
    parameters = inspect.signature(target).parameters if target else {}
    for name, value in node.items():
        path = f"{key}.{name}" if key else str(name)
        check_numbers(value, path)
        if isinstance(value, str) and name in parameters:
            kinds = {parameters[name].annotation, *get_args(parameters[name].annotation)}
            if kinds & {int, float} and str not in kinds:
                raise InputError(f"{path}={value}: expected a number")


def check_mixup(cfg: DictConfig) -> None:
    """InputError where a mixup was chosen that data or objective cannot do; none is left out silently."""
    if cfg.mixup.prob == 0:
        return
    if "mixup" not in cfg.data.train:
        raise InputError(
            "mixup: this data cannot be mixed; folder, audiocaps, synthetic_tracks and latents can"
        )
    if cfg.mixup.space == "latent" and "mixup" not in cfg.objective:
        raise InputError("mixup.space=latent: only objective=latent_diffusion mixes latents; use audio")


def missing_keys(node: object, key: str = "") -> list[str]:
    """The keys of `???` in a config whose interpolations are not resolved, sorted."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        inner = (missing_keys(child, f"{key}.{name}" if key else str(name)) for name, child in node.items())
        return sorted(name for names in inner for name in names)
    return [key] if node == "???" else []


def differences(old: object, new: object, key: str = "") -> list[str]:
    """`key: old -> new` of every leaf in which two plain configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        inner = (differences(old.get(n), new.get(n), f"{key}.{n}" if key else n) for n in names)
        return [line for lines in inner for line in lines]
    return [] if old == new else [f"{key}: {old} -> {new}"]


def build_objective(cfg: DictConfig, captions: list[str]) -> Objective:
    """The objective with its parts; a tokenizer to be trained is trained on `captions`.

    Each new part remembers its `recipe`, so that its weights file can rebuild it.
    """
    parts = {}
    if "tokenizer" in cfg:
        tokenizer = instantiate(cfg.tokenizer)
        parts["tokenizer"] = tokenizer(captions) if isinstance(tokenizer, functools.partial) else tokenizer
    objective = instantiate(cfg.objective, **parts, _convert_="all")
    for name, part in objective.named_children():
        if not hasattr(part, "recipe"):
            part.recipe = plain(cfg.objective[name])
    check_front_ends({name: getattr(objective, name) for name in objective.frozen}, cfg)
    start_from_weights(objective, cfg)
    return objective


def start_from_weights(objective: Objective, cfg: DictConfig) -> None:
    """`init=PATH`, or a list of them: what learns begins with the weights there, the EMA with the same.

    InputError where none of its networks is there, or one of another architecture.
    """
    init = cfg.get("init")
    for path in [init] if isinstance(init, str) else init or []:
        networks, latent_scale = pretrained.load_parts(path, tuple(objective.networks()))
        for name, network in networks.items():
            top, *below = name.split(".")
            recipe = getattr(objective, top).recipe
            for key in below:
                recipe = recipe[key]
            differing = [d for d in differences(network.recipe, recipe) if not TRAINING_ONLY & words(d)]
            if differing:
                raise InputError(f"init={path}: its {name} is another network ({'; '.join(differing)})")
        objective.start_from(networks, latent_scale=latent_scale)


def words(difference: str) -> set[str]:
    """The parts of the key in a line of `differences`."""
    return set(difference.partition(":")[0].split("."))


def check_front_ends(parts: Mapping[str, torch.nn.Module | None], cfg: DictConfig) -> None:
    """InputError where a trained part knows mels of another front end than the run's."""
    for name in parts.keys() & {"vae", "vocoder", "dvae"}:
        trained = (getattr(parts[name], "provenance", None) or {}).get("audio")
        differing = differences(trained, plain(cfg.audio)) if trained else []
        if differing:
            raise InputError(f"{name} was trained on another audio front end ({'; '.join(differing)})")


def check_frozen(objective: Objective, folder: Path) -> None:
    """InputError where a run would go on with other frozen weights than it began with.

    Their hashes lie in `frozen.json`; so the copies in the run's system are never stale.
    """
    parts = {name: getattr(objective, name) for name in objective.frozen}
    hashes = {name: state_hash(part.state_dict()) for name, part in parts.items() if part is not None}
    path = folder / "frozen.json"
    if path.exists() and (folder / "checkpoints" / "last.pt").exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(
            name for name in hashes.keys() | before.keys() if hashes.get(name) != before.get(name)
        )
        if changed:
            raise InputError(f"{folder}: began with other weights of {', '.join(changed)}: choose run=NAME")
    barrier()
    if is_main():
        write_json(path, hashes)


def check_latents(objective: Objective, data_sets: Sequence, cfg: DictConfig) -> None:
    """InputError where cached latents were made by other networks or another front end than this run's."""
    cached = [data.encoders for data in data_sets if hasattr(data, "encoders")]
    if not cached:
        return
    if not {"vae", "clap"} <= set(objective.frozen):
        raise InputError(
            f"data=latents: {type(objective).__name__} learns from sound, not from cached latents"
        )
    ours = latents_made_by(cfg, {"vae": objective.vae, "clap": objective.clap})
    for encoders in cached:
        has_embeds = "clap" in encoders
        if not has_embeds and objective.text_probability < 1:
            raise InputError(
                "data.path: encoded without CLAP (~clap), its latents have no audio embeddings; "
                "conditioning=text needs none, or encode with clap.path"
            )
        for name, digest in ours.items():
            if encoders.get(name) != digest and (has_embeds or name != "clap"):
                raise InputError(
                    f"the latents at data.path were made by another {name} than this run's "
                    f"(hash {encoders.get(name)}, here {digest}): encode again"
                )


def build_trainer(cfg: DictConfig, device: torch.device) -> Trainer:
    """The trainer; the loggers of the config belong to the main process."""
    loggers = {} if is_main() else {"loggers": []}
    return instantiate(
        cfg.trainer, device=str(device), save_weights=weights_writer(cfg), _convert_="all", **loggers
    )


def weights_writer(cfg: DictConfig) -> Callable[[Objective, Path], None]:
    """Writes an objective's weights with the provenance of this run."""
    provenance = {
        "run": cfg.run,
        "audio": plain(cfg.audio),
        "seed": cfg.seed,
        "commit": git_commit(),
        "versions": {name: version(name) for name in ("ldm_audio", "torch")},
    }
    system = (
        {"mel": without_target(cfg.audio), "schedule": without_target(cfg.schedule)}
        if "schedule" in cfg
        else None
    )
    return functools.partial(pretrained.save_weights, system=system, provenance=provenance)


def without_target(node: DictConfig) -> dict:
    return {key: value for key, value in plain(node).items() if key != "_target_"}


def git_commit() -> str:
    """The checkout's commit, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def train_loader(cfg: DictConfig, data) -> Callable[[int], Iterable[dict]]:
    """`loader(step)`: the training batches from that step on, without end."""

    def from_step(step: int) -> Iterable[dict]:
        batches = StepBatches(
            len(data), batch_size=cfg.batch_size, seed=cfg.seed, start_step=step, num_steps=NEVER_STOPS,
            rank=rank(), world_size=world_size(),
        )  # fmt: skip
        return make_loader(data, batches, num_workers=cfg.num_workers, unreadable=unreadable)

    unreadable = Unreadable(unreadable_clips(cfg, "train"))
    return from_step


def val_loader(cfg: DictConfig, data) -> Iterable[dict]:
    """The same validation batches every time, of which each process has its share."""
    batches = sequential_batches(len(data), cfg.val_batch_size, cfg.val_items)
    return make_loader(
        data,
        share_of(batches, rank=rank(), world_size=world_size()),
        num_workers=0,
        unreadable=Unreadable(unreadable_clips(cfg, "val")),
    )


def unreadable_clips(cfg: DictConfig, split: str) -> Path:
    """The file that lists what could not be read; other ranks than the first have one of their own."""
    return Path(cfg.folder) / f"unreadable_{split}{f'_rank{rank()}' if rank() else ''}.json"


def encode_data(overrides: Sequence[str]) -> None:
    """`ldm-audio encode`: writes the latents of data.train and data.val."""
    cfg = composed("encode", overrides)
    if cfg.device == "cpu":
        keep_freed_memory()
    if cfg.mixup.prob > 0 and "mixup" not in cfg.data.train:
        raise InputError("mixup: this data cannot be mixed; folder, audiocaps and synthetic_tracks can")
    if not 0 <= cfg.part < cfg.parts:
        raise InputError(f"part={cfg.part} parts={cfg.parts}: expected part from 0 to parts - 1")
    names = ("vae", "clap", "tokenizer", "vocoder", "mixup")
    parts = {name: instantiate(cfg[name]) if name in cfg else None for name in names}
    networks = {name: parts[name] for name in ("vae", "clap", "vocoder") if parts[name] is not None}
    check_front_ends(networks, cfg)
    encoder = Encoder(mel=instantiate(cfg.audio), device=cfg.device, **parts)
    made_by = latents_made_by(cfg, networks)
    for split in ("train", "val"):
        data = instantiate(cfg.data[split])
        count = len(data) * (cfg.epochs if split == "train" else 1)
        settings = [plain(cfg.data)[split], plain(cfg.mixup), cfg.seed, count, cfg.shard_items]
        with tqdm(
            total=-(-count // cfg.parts), desc=f"encode {split}", unit="clip", dynamic_ncols=True
        ) as bar:
            encode(
                functools.partial(read_ranges, data, cfg.num_workers), count, Path(cfg.out) / split,
                encoder=encoder, made_by=made_by | {"data": settings_hash(settings)},
                batch_size=cfg.batch_size, shard_items=cfg.shard_items, part=cfg.part, parts=cfg.parts,
                progress=bar.update,
            )  # fmt: skip


def latents_made_by(cfg: DictConfig, networks: Mapping[str, torch.nn.Module]) -> dict[str, str]:
    """Hashes of what decides a clip's latents: the networks and the front end."""
    hashes = {name: state_hash(network.state_dict()) for name, network in networks.items()}
    return hashes | {"audio": settings_hash(without_target(cfg.audio))}


def read_ranges(data, num_workers: int, ranges: Sequence[range]) -> Iterable[dict]:
    """A batch of items for each range of item numbers, counted over all passes over the data."""
    keys = [[ItemKey(*divmod(item, len(data)), item) for item in items] for items in ranges]
    return make_loader(data, keys, num_workers=num_workers)


@torch.inference_mode()
def retrieve(overrides: Sequence[str]) -> None:
    """`ldm-audio retrieve`: prints the retrieval numbers of one split."""
    cfg = composed("retrieve", overrides)
    if cfg.split not in ("train", "val"):
        raise InputError(f"split={cfg.split}: expected train or val")
    clap, tokenizer = instantiate(cfg.clap), load_tokenizer(cfg.clap.path)
    data = instantiate(cfg.data[cfg.split])
    audio, text = [], []
    for batch in make_loader(data, sequential_batches(len(data), cfg.batch_size, len(data)), num_workers=0):
        waveform = resample_sinc(batch["waveform"], cfg.audio.sample_rate, clap.front_end.sample_rate)
        audio.append(clap.embed_audio(waveform))
        text.append(clap.embed_text(*tokenizer(batch["caption"])))
    found = retrieval(torch.cat(audio), torch.cat(text), permutations=cfg.permutations, seed=cfg.seed)
    print("\n".join([f"pairs {len(data)}", *(f"{name} {value:.4g}" for name, value in found.items())]))
    if cfg.out:
        write_json(cfg.out, {"pairs": len(data)} | found)
