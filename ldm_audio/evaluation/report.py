"""Runs of several arms and seeds in one table and one picture: mean and confidence interval of each number.

A run is a folder with `metrics.jsonl`; its name below the folder of all runs says its arm and its seed, such
as `bam/seed2` or `bam-seed2`. Its numbers are the last validation loss and whatever `evaluation.json`, a flat
object, holds.
"""

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm_audio.errors import InputError
from ldm_audio.files import replacing, write_text

T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; 1.96 beyond."""

SEED = re.compile(r"[-_/]?seed(\d+)$")


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` runs and half the width of its 95 % confidence interval; None for a single run."""

    mean: float
    half_width: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.half_width:.3f}" if self.half_width is not None else "")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval by Student's t, which takes the values for independent and normal."""
    mean, count = sum(values) / len(values), len(values)
    if count == 1:
        return Estimate(mean, None, 1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    t = T_95[count - 2] if count - 2 < len(T_95) else 1.96
    return Estimate(mean, t * deviation / math.sqrt(count), count)


def collect(folder: str | Path) -> dict[str, dict[str, list[float]]]:
    """Arm -> number's name -> its value in each of the arm's runs, in the order of their names.

    Raises InputError where there are no runs, one of them has no numbers, or arms hold different ones.
    """
    root = Path(folder)
    runs = sorted(path.parent for path in root.rglob("metrics.jsonl"))
    if not runs:
        raise InputError(f"{root}: no runs (folders with metrics.jsonl) below it")
    arms: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        name = run.relative_to(root).as_posix()
        arms.setdefault(SEED.sub("", name) or ".", []).append(numbers_of(run))
    first = next(iter(arms.values()))[0].keys()
    for arm, rows in arms.items():
        for row in rows:
            if row.keys() != first:
                odd = min(row.keys() ^ first)
                raise InputError(
                    f"{root / arm}: its runs and the other arms' do not all have the number {odd}"
                )
    return {arm: {name: [row[name] for row in rows] for name in first} for arm, rows in arms.items()}


def numbers_of(run: Path) -> dict[str, float]:
    """The numbers of one run; InputError where there are none or a file is damaged."""
    found: dict[str, float] = {}
    losses = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            losses.append(json.loads(line).get("val/loss"))
        except json.JSONDecodeError:
            continue  # the last line of a killed run
    losses = [loss for loss in losses if loss is not None]
    if losses:
        found["val_loss"] = losses[-1]
    path = run / "evaluation.json"
    if path.is_file():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            found |= {name: float(value) for name, value in held.items()}
        except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{path}: expected one flat JSON object of numbers ({error})") from error
    if not found:
        raise InputError(f"{run}: neither a validation loss nor evaluation.json; did it finish?")
    return found


def write_report(folder: str | Path, out: str | Path) -> str:
    """Writes `report.md`, `report.csv` and `report.png` to `out`; returns the table in Markdown."""
    arms = {
        arm: {name: estimate(values) for name, values in numbers.items()}
        for arm, numbers in collect(folder).items()
    }
    table = markdown(arms)
    write_text(Path(out) / "report.md", table)
    write_text(Path(out) / "report.csv", comma_separated(arms))
    draw(arms, Path(out) / "report.png")
    return table


def markdown(arms: Mapping[str, Mapping[str, Estimate]]) -> str:
    names = list(next(iter(arms.values())))
    lines = [f"| arm | runs | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for arm, numbers in arms.items():
        count = next(iter(numbers.values())).count
        lines.append(f"| {arm} | {count} | {' | '.join(str(numbers[name]) for name in names)} |")
    return "\n".join([*lines, "", "Mean over runs ± half of the 95 % confidence interval (Student's t).", ""])


def comma_separated(arms: Mapping[str, Mapping[str, Estimate]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "number", "mean", "half_width_95", "runs"])
    for arm, numbers in arms.items():
        for name, found in numbers.items():
            writer.writerow([arm, name, found.mean, found.half_width, found.count])
    return text.getvalue()


def draw(arms: Mapping[str, Mapping[str, Estimate]], path: Path) -> None:
    """A panel for each number, a dot with its interval for each arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(next(iter(arms.values())))
    figure = Figure(figsize=(2.4 * len(names), 0.5 * len(arms) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    rows = range(len(arms))
    for panel, name in zip(panels, names):
        found = [numbers[name] for numbers in arms.values()]
        panel.errorbar(
            [e.mean for e in found], rows, xerr=[e.half_width or 0.0 for e in found], fmt="o", capsize=3
        )
        panel.set_title(name)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(list(rows), list(arms))
    panels[0].invert_yaxis()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
