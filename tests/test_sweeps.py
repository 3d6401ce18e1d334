"""Every shipped sweep runs all its arms, two steps each, and the report tells them apart."""

import csv
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_train_cli import BRIEF, CHECKOUT, TINY_CLAP, TINY_UNET, TINY_VAE, TINY_VOCODER

SWEEPS = sorted(path.stem for path in (CHECKOUT / "configs" / "sweep").glob("*.yaml"))
FAST = "film"
DRUMS = (
    "data=synthetic_tracks", "data.num_samples=10240", "data.train.track_samples=81920",
    "data.train.size=6", "data.val.size=2", "data.train.kinds=[beat]", "data.val.kinds=[beat]",
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*CLAP's text tower")  # it is as it began


def arms(sweep: str) -> list[str]:
    """The values of its one axis beside the seed."""
    params = OmegaConf.load(CHECKOUT / "configs" / "sweep" / f"{sweep}.yaml").hydra.sweeper.params
    (axis,) = (values for name, values in params.items() if name != "seed")
    return ["None" if value == "null" else value for value in str(axis).split(",")]


@pytest.mark.parametrize(
    "sweep", [pytest.param(name, marks=[] if name == FAST else pytest.mark.slow) for name in SWEEPS]
)
def test_every_arm_of_a_sweep_trains_two_steps(sweep, command, tmp_path):
    tiny = (*TINY_UNET, *TINY_VAE, *TINY_CLAP, *TINY_VOCODER, "tokenizer=bpe", *BRIEF, *DRUMS)
    chosen = (f"sweep={sweep}", "objective=latent_diffusion", "allow_random_frozen=true", "seed=0")
    assert command("train.py", *chosen, *tiny, f"runs={tmp_path}") == 0
    folders = {path.parent.parent.name: path.parent for path in tmp_path.rglob("metrics.jsonl")}
    assert folders.keys() == set(arms(sweep)) and len(folders) >= 2
    configs = {(folder / "config.yaml").read_text() for folder in folders.values()}
    assert len(configs) == len(folders)
    weights = {(folder / "weights" / "unet.safetensors").read_bytes() for folder in folders.values()}
    assert len(weights) == len(folders)  # the axis reaches what is trained
    assert command("ldm_audio.cli", "report", tmp_path / sweep) == 0
    with Path(tmp_path / sweep / "report.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == set(arms(sweep))
