"""Pictures and pages of sounds: log-mel spectrograms in one sheet, a page with players.

Axes: f mel bins, n mel frames.
"""

import html
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict
from urllib.parse import quote

import numpy as np
from torch import Tensor

from ldm_audio.audio.mel import LogMel, hz_to_mel
from ldm_audio.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECIBELS = 20 / math.log(10)  # of a natural logarithm of magnitude
RANGE = 80.0  # decibels shown below the loudest
TICKS = (250, 500, 1000, 2000, 4000, 8000, 16000)  # Hz
PANEL = (3.6, 2.1)  # inches
TITLE_WIDTH = 46  # characters


class Clip(TypedDict):
    """One entry of a page; files are named relative to the page's folder."""

    title: str
    audio: str
    picture: NotRequired[str]
    note: NotRequired[str]


def mel_sheet(path: str | Path, mels: Sequence[Tensor], titles: Sequence[str], *, mel: LogMel) -> None:
    """One PNG with all log-mel spectrograms (f, n), low frequencies at the bottom, on one scale of loudness.

    mel: how they were made; it gives the seconds and the hertz of the axes. The file appears whole or not at
    all. Raises InputError for no spectrograms or another number of titles.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not mels or len(mels) != len(titles):
        raise InputError(
            f"{path}: {len(mels)} spectrograms and {len(titles)} titles, expected as many and 1 or more"
        )
    pictures = [DECIBELS * picture.detach().float().cpu().numpy() for picture in mels]
    loudest = max(np.nanmax(picture) for picture in pictures)
    columns = min(len(pictures), 1 if len(pictures) == 1 else 2 if len(pictures) <= 4 else 4)
    rows = math.ceil(len(pictures) / columns)

    figure = Figure(figsize=(PANEL[0] * columns + 0.8, PANEL[1] * rows + 0.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for number, panel in enumerate(panels.flat):
        if number >= len(pictures):
            panel.set_axis_off()
            continue
        picture = pictures[number]
        seconds = picture.shape[1] * mel.hop_length / mel.sample_rate
        image = panel.imshow(
            picture,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            vmin=loudest - RANGE,
            vmax=loudest,
            extent=(0, seconds, -0.5, mel.n_mels - 0.5),
        )
        panel.set_title(shorten(titles[number]), fontsize=8.5, loc="left", parse_math=False)
        hertz_axis(panel, mel)
        panel.tick_params(labelsize=7, length=2.5)
        if number % columns == 0:
            panel.set_ylabel("Hz", fontsize=8)
        if number + columns >= len(pictures):
            panel.set_xlabel("seconds", fontsize=8)
    bar = figure.colorbar(
        image, ax=panels, fraction=0.05, aspect=15, pad=0.01, shrink=0.8 / rows, anchor=(0, 1)
    )
    bar.ax.tick_params(labelsize=7)
    bar.set_label("dB", fontsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)  # scripts the font lacks
        write_atomically(Path(path), lambda partial: figure.savefig(partial, format="png"))


def hertz_axis(panel: "Axes", mel: LogMel) -> None:
    """Labels an axis of mel bins with round frequencies, at the bins whose triangles peak there."""
    lowest, highest = hz_to_mel(mel.fmin, "slaney"), hz_to_mel(mel.fmax, "slaney")
    spacing = (highest - lowest) / (mel.n_mels + 1)
    ticks = [hertz for hertz in TICKS if mel.fmin < hertz < mel.fmax]
    bins = [(hz_to_mel(hertz, "slaney") - lowest) / spacing - 1 for hertz in ticks]
    labels = [f"{hertz // 1000}k" if hertz >= 1000 else str(hertz) for hertz in ticks]
    panel.set_yticks(bins, labels)
    panel.set_ylim(-0.5, mel.n_mels - 0.5)


def shorten(title: str) -> str:
    """A title in at most two lines, whatever white space it came with."""
    lines = textwrap.wrap(title, TITLE_WIDTH, max_lines=2, placeholder=" …")
    return "\n".join(lines)


def write_page(folder: str | Path, clips: Iterable[Clip], title: str) -> Path:
    """`index.html` in `folder`: a player, the prompt, a note and a picture for each clip; returns its path.

    The page needs nothing but the files it names, and no network. Every text is escaped.
    """
    path = Path(folder) / "index.html"
    cards = "\n".join(card(clip) for clip in clips)
    page = PAGE.format(title=html.escape(title), cards=cards)
    write_atomically(path, lambda partial: partial.write_text(page, encoding="utf-8"))
    return path


def card(clip: Clip) -> str:
    """The HTML of one clip."""
    parts = [f"<figcaption>{html.escape(clip['title'])}</figcaption>"]
    if "picture" in clip:
        parts.append(f'<img src="{quote(clip["picture"])}" alt="log-mel spectrogram" loading="lazy">')
    parts.append(f'<audio controls preload="none" src="{quote(clip["audio"])}"></audio>')
    if "note" in clip:
        parts.append(f"<p>{html.escape(clip['note'])}</p>")
    return f"<figure>{''.join(parts)}</figure>"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }}
body {{ max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }}
figure {{ margin: 0; padding: .8rem; border: 1px solid #8884; border-radius: .5rem; }}
figcaption {{ font-weight: 600; overflow-wrap: anywhere; }}
img, audio {{ width: 100%; margin-top: .6rem; }}
p {{ margin: .4rem 0 0; opacity: .75; font-size: .9em; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<main>
{cards}
</main>
</body>
</html>
"""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(partial)` under another name in the same folder, which is made, and then the rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
