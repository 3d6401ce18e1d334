"""Whatever ends a run, the same command continues it to the same bits, without a doubled or missing row."""

from pathlib import Path

import crashes
import pytest
import toys
from runs import assert_same_runs, rows, state

FAST = {
    ("vae", "step"),
    ("vocoder", "checkpoint"),
    ("contrastive", "validation"),
    ("contrastive", "full_disk"),
    ("latent_diffusion", "preview_terminated"),
}
NO_PREVIEW = ("contrastive", "preview_terminated")
CASES = [
    pytest.param(name, place, marks=[] if (name, place) in FAST else pytest.mark.slow)
    for name in sorted(toys.OBJECTIVES)
    for place in crashes.PLACES
    if (name, place) != NO_PREVIEW
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, processes):
    """`straight(name)`: the folder of a run that nothing ended."""
    folder = tmp_path_factory.mktemp("straight")

    def trained(name: str) -> Path:
        if not (folder / name).exists():
            assert ended(processes, folder / name, name, None) == 0
        return folder / name

    return trained


def ended(processes, folder: Path, name: str, place: str | None) -> int:
    """The exit code of a process that trains there."""
    process = processes.Process(target=crashes.train, args=(folder, name, place))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("name, place", CASES)
def test_the_same_command_continues_to_the_same_bits(name, place, processes, straight, tmp_path):
    folder = tmp_path / "run"
    assert ended(processes, folder, name, place) == crashes.PLACES[place][1]
    last = folder / "checkpoints" / "last.pt"
    kept = state(folder)["step"] if last.exists() else 0
    assert kept == {"validation": 3, "validation_terminated": 4, "preview_terminated": 4}.get(place, 3)
    if place == "full_disk":
        said = folder.with_suffix(".txt").read_text()
        assert said.endswith("not written (File too large)") and "\n" not in said
    assert ended(processes, folder, name, None) == 0
    assert_same_runs(straight(name), folder)
    steps = [row["step"] for row in rows(folder)]
    assert steps == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7]
    assert not list(folder.rglob(".*.tmp"))
