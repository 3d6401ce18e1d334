"""A checkpoint is the old one or the new one, whatever happens while it is written."""

import resource

import pytest
import torch

from ldm_audio.errors import InputError, RunError
from ldm_audio.training.checkpoint import load_checkpoint, save_checkpoint

STATE = {
    "step": 3,
    "best": float("inf"),
    "objective": {"weight": torch.tensor([1.5, -2.0])},
    "rng": torch.get_rng_state(),
}


def test_what_was_saved_comes_back(tmp_path):
    path = tmp_path / "new folder" / "last.pt"
    save_checkpoint(path, STATE)
    loaded = load_checkpoint(path)
    assert loaded["step"] == 3 and loaded["best"] == float("inf")
    assert torch.equal(loaded["objective"]["weight"], STATE["objective"]["weight"])
    assert torch.equal(loaded["rng"], STATE["rng"])


@pytest.mark.parametrize("room", [0, 1000, 5000])
def test_a_full_disk_keeps_the_previous_checkpoint_and_is_told(room, tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(RunError, match=r"last\.pt: not written \(File too large\)"):
            save_checkpoint(path, STATE | {"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_damaged_checkpoint_is_named(kept, tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(
        InputError, match=r"last\.pt: not a readable checkpoint \(.+\); remove it to start afresh"
    ) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return print, ("the trap snapped",)

    torch.save({"step": Trap()}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
