"""Every shipped config composes, names what exists with exactly the arguments that it takes, and builds."""

import inspect
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

import ldm_audio
from ldm_audio.config import build_objective, missing_keys, plain, require
from ldm_audio.objectives.base import check_players

CONFIGS = Path(ldm_audio.__file__).parents[1] / "configs"
TOP = ("train", "sample", "encode", "retrieve")
EXTRAS = ("experiment", "debug", "sweep")  # chosen on top of everything else
INSTEAD_OF_FILES = {
    "vae": "vae/mel64",
    "clap": "clap/htsat_tiny",
    "vocoder": "vocoder/hifigan_16k",
    "tokenizer": "tokenizer/bpe",
    "dvae": "dvae/tortoise",
}
SPEECH = ("dvae", "speech_lm", "clvp")  # objectives that take speech, its front end and its tokenizer
GIVEN_LATER = {"trainer": {"save_weights"}, "objective": {"tokenizer"}}  # by train.py, as ready-made objects


def options(group: str) -> list[str]:
    """The names of a group's files."""
    folder = CONFIGS / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


@lru_cache
def composed(top: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(top, overrides=list(overrides), return_hydra_config=True)


def combinations(top: str, *overrides: str) -> list[tuple[str, ...]]:
    """As few overrides as choose every file of every group that this config uses at least once."""
    choices = composed(top, *overrides).hydra.runtime.choices
    groups = [name for name in choices if not name.startswith(("hydra/", "objective", *EXTRAS))]
    files = {group: options(group) for group in groups}
    rows = []
    for number in range(max(map(len, files.values()))):
        row = {group: names[number % len(names)] for group, names in files.items()}
        if "objective=contrastive" in overrides and row["clap"] == "file":
            row["clap"] = "small"  # a file's front end is not known before it is read
        if "clap" in row and "tokenizer" in row:
            row["tokenizer"] = "file" if row["clap"] == "file" else "bpe"
        elif "tokenizer" in row:  # of speech
            row["tokenizer"] = "speech_file" if number % 2 else "speech_bpe"
        if any(f"objective={name}" in overrides for name in SPEECH):
            row |= {"audio": "speech22k_80", "data": "speech"}
        if row.get("data") == "latents" and "unet" not in row:
            row["data"] = "synthetic"  # latents train nothing but a latent network
        if top == "encode":
            row |= {"vae": "file", "clap": "file", "tokenizer": "file"}  # encoding takes trained networks
        if top == "retrieve":
            row["clap"] = "file"
        rows.append((top, *overrides, *(f"{group}={name}" for group, name in row.items())))
    return rows


COMBINATIONS = [row for name in options("objective") for row in combinations("train", f"objective={name}")]
COMBINATIONS += [row for top in TOP[1:] for row in combinations(top)]
COMBINATIONS += [("train", f"{group}={name}") for group in EXTRAS for name in options(group)]
TRAINING = [("train", f"objective={name}") for name in options("objective")]
TRAINING += [("train", f"experiment={name}") for name in options("experiment")]


def name_of(row: tuple[str, ...]) -> str:
    return "-".join(row)


def targets(node: object, key: str = "") -> list[tuple[str, dict]]:
    """Every (key, node with a `_target_`) of a plain config."""
    if isinstance(node, list):
        return [found for i, child in enumerate(node) for found in targets(child, f"{key}.{i}")]
    if not isinstance(node, dict):
        return []
    own = [(key, node)] if "_target_" in node else []
    return own + [t for name, child in node.items() for t in targets(child, f"{key}.{name}".lstrip("."))]


def test_every_config_file_is_tried_below():
    chosen = {file.replace("=", "/", 1) for row in COMBINATIONS for file in row[1:]}
    shipped = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert shipped - set(TOP) - chosen == set()


@pytest.mark.parametrize("row", COMBINATIONS, ids=name_of)
def test_a_config_composes_and_every_value_resolves(row):
    cfg = composed(*row).copy()
    with open_dict(cfg):
        del cfg["hydra"]
    for key in missing_keys(OmegaConf.to_container(cfg, resolve=False)):
        OmegaConf.update(cfg, key, 1)  # given by the user
    require(cfg)


@pytest.mark.parametrize("row", COMBINATIONS, ids=name_of)
def test_every_target_takes_exactly_the_keys_given(row):
    for key, node in targets(OmegaConf.to_container(composed(*row), resolve=False)):
        if key.startswith("hydra"):
            continue
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        given = {name for name in node if not name.startswith("_")}
        assert given <= parameters.keys(), f"{key}: unknown {given - parameters.keys()}"
        needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        if not node.get("_partial_"):
            lacking = needed - given - GIVEN_LATER.get(key, set())
            assert not lacking, f"{key}: lacks {lacking}"


@pytest.mark.parametrize("row", TRAINING, ids=name_of)
def test_what_trains_can_be_built(row):
    cfg = composed(*row).copy()
    with open_dict(cfg):
        del cfg["hydra"]
        for part, file in INSTEAD_OF_FILES.items():
            if cfg.get(part) is not None and ".load_" in cfg[part]._target_:
                cfg[part] = OmegaConf.load(CONFIGS / f"{file}.yaml")
        if cfg.objective_name in SPEECH and "tokenizer" in cfg:
            learner = cfg.get("speech_lm") or cfg.clvp.speech_tower
            cfg.dvae.num_tokens = learner.get("num_tokens") or learner.vocab_size
            cfg.tokenizer = OmegaConf.load(CONFIGS / "tokenizer/speech_bpe.yaml")
        if "norms" in cfg.audio:
            cfg.audio.norms = None  # the user's file
        cfg.allow_random_frozen = True
    with torch.device("meta"):
        objective = build_objective(cfg, ["a low hum"])
        check_players(objective)
        trainer = instantiate(cfg.trainer, save_weights=print, _convert_="all")
        for parameters in objective.players().values():
            trainer.optimizer(parameters)
    for name in objective.networks():
        assert getattr(objective, name).recipe == plain(cfg[name])


def test_the_config_of_a_job_can_be_shown(command, capsys):
    assert command("train.py", "--cfg", "job") == 0
    assert "objective_name: latent_diffusion" in capsys.readouterr().out
