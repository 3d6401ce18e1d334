"""Tables over seeds: what is averaged, how sure the mean is, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from ldm_audio.errors import InputError
from ldm_audio.evaluation.report import collect, estimate


def write_run(path: Path, loss: float | None, **numbers: float) -> None:
    path.mkdir(parents=True)
    rows = [{"step": 1, "train/diffusion": 9.0}, {"step": 2, "val/loss": 8.0}]
    if loss is not None:
        rows.append({"step": 3, "val/loss": loss})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "val')
    if numbers:
        (path / "evaluation.json").write_text(json.dumps(numbers))


@pytest.mark.parametrize("count", [2, 3, 10, 31])
def test_the_interval_is_students(count):
    values = np.random.default_rng(count).normal(3.0, 2.0, count)
    low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    found = estimate(values.tolist())
    assert (found.mean, found.half_width) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=1e-3)


def test_one_run_has_no_interval():
    assert estimate([0.5]).half_width is None and str(estimate([0.5])) == "0.500"


def test_runs_are_grouped_by_arm_over_seeds(tmp_path):
    write_run(tmp_path / "bam" / "seed0", 1.0, tempo=0.5)
    write_run(tmp_path / "bam" / "seed1", 3.0, tempo=0.7)
    write_run(tmp_path / "none-seed0", 2.0, tempo=0.1)
    assert collect(tmp_path) == {
        "bam": {"val_loss": [1.0, 3.0], "tempo": [0.5, 0.7]},
        "none": {"val_loss": [2.0], "tempo": [0.1]},
    }


def test_the_command_writes_table_numbers_and_picture(tmp_path, command, capsys):
    for seed, value in enumerate((1.0, 2.0, 3.0)):
        write_run(tmp_path / "plain" / f"seed{seed}", value)
        write_run(tmp_path / "blm" / f"seed{seed}", 5.0)
    assert command("ldm_audio.cli", "report", tmp_path) == 0
    assert "| plain | 3 | 2.000 ± 2.484 |" in capsys.readouterr().out
    assert "| blm | 3 | 5.000 ± 0.000 |" in (tmp_path / "report.md").read_text()
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [(row["arm"], row["number"], float(row["mean"]), row["runs"]) for row in rows] == [
        ("blm", "val_loss", 5.0, "3"),
        ("plain", "val_loss", 2.0, "3"),
    ]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compared_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="no runs"):
        collect(tmp_path)
    write_run(tmp_path / "a" / "seed0", 1.0, tempo=0.5)
    write_run(tmp_path / "b" / "seed0", 1.0)
    with pytest.raises(InputError, match=r"b: its runs and the other arms' do not all have the number tempo"):
        collect(tmp_path)
    (tmp_path / "b" / "seed0" / "evaluation.json").write_text('{"tempo": "fast"}')
    with pytest.raises(InputError, match=r"evaluation\.json: expected one flat JSON object of numbers"):
        collect(tmp_path)
    (tmp_path / "b" / "seed0" / "evaluation.json").unlink()
    (tmp_path / "b" / "seed0" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match=r"b/seed0: neither a validation loss nor evaluation\.json"):
        collect(tmp_path)
