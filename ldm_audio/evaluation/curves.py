"""The metrics of a run over its steps, as one picture."""

import json
from collections import defaultdict
from pathlib import Path

from ldm_audio.errors import InputError
from ldm_audio.files import replacing

Points = list[tuple[int, float]]

PICTURE = "curves.png"
COLUMNS = 3


def curves_of(run: str | Path) -> dict[str, dict[str, Points]]:
    """Metric -> `train` or `val` -> its (step, value) pairs; what is of neither is under its own name.

    A half-written last row, and what was not finite, is left out. InputError where there is no row.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    found: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(list))
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that goes on, or was killed, is in the middle of it
        for key, value in row.items():
            kind, _, name = key.partition("/") if key.startswith(("train/", "val/")) else (key, "", key)
            if value is not None and key not in ("step", "time"):
                found[name][kind].append((row["step"], value))
    if not found:
        raise InputError(f"{path}: no rows")
    return {name: dict(kinds) for name, kinds in found.items()}


def draw_curves(run: str | Path) -> Path:
    """Writes `curves.png` into the run's folder, a panel for each metric, and returns its path."""
    from matplotlib.figure import Figure

    curves = curves_of(run)
    rows = -(-len(curves) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.2 * rows), layout="constrained")
    panels = iter(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for (name, kinds), panel in zip(curves.items(), panels):
        for kind, points in kinds.items():
            panel.plot(*zip(*points), label=kind, linewidth=1, marker="." if len(points) < 20 else None)
        panel.set_title(name, fontsize=8, parse_math=False)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        if "val" in kinds:
            panel.legend(fontsize=7, loc="upper right")
    for panel in panels:  # the rest of the last row
        panel.set_axis_off()
    path = Path(run) / PICTURE
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    return path
