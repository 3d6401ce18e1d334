"""Where metrics and previews go: always `metrics.jsonl` and files, on request TensorBoard and W&B.

A logger answers `log(step, metrics)`, `preview(step, previews)` and `close()`.
"""

import json
import math
import os
import re
import time
from pathlib import Path

import numpy as np
from torch import Tensor

from ldm_audio.errors import RunError
from ldm_audio.files import replacing, write_text
from ldm_audio.objectives.base import Preview


class JSONLLogger:
    """One JSON object a line in `path`; of the rows there, the first `num_rows` are kept.

    That number is in the checkpoint, so that a run that was killed after more rows repeats them.
    """

    def __init__(self, path: Path, *, num_rows: int):
        self.path = path
        kept = read_rows(path)[:num_rows]
        self.num_rows = len(kept)
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a row; RunError where the disk takes no more."""
        row = {"step": step, "time": round(time.time(), 3)} | {k: round_to(v) for k, v in metrics.items()}
        line = (json.dumps(row) + "\n").encode()
        try:
            written = self.file.write(line)
        except OSError as error:
            raise RunError(f"{self.path}: not written ({error.strerror})") from error
        if written != len(line):
            raise RunError(f"{self.path}: not written (no space for a row)")
        self.num_rows += 1

    def sync(self) -> None:
        """Returns when the rows are on the disk itself."""
        os.fsync(self.file.fileno())

    def preview(self, step: int, previews: dict[str, Preview]) -> None:
        pass

    def close(self) -> None:
        self.file.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics file; a last line that a killed run left half-written is skipped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def round_to(value: float, digits: int = 7) -> float | None:
    """The value with so many digits; None for what JSON has no number for."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


class PreviewFiles:
    """A picture and wav files of every preview in one folder, named by its step."""

    def __init__(self, folder: Path):
        self.folder = folder

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def preview(self, step: int, previews: dict[str, Preview]) -> None:
        from ldm_audio.audio.io import write_wav

        names = list(previews)
        figure = mel_figure([previews[n].mel for n in names], names)
        with replacing(self.folder / f"{step:07d}.png") as temporary:
            figure.savefig(temporary, dpi=80, format="png")
        for name, preview in previews.items():
            if preview.waveform is not None:
                slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:60]
                write_wav(
                    self.folder / f"{step:07d}_{slug}.wav", preview.waveform.clamp(-1, 1), preview.sample_rate
                )

    def close(self) -> None:
        pass


class TensorBoardLogger:
    """Scalars, mel pictures and audio for TensorBoard; needs the package `tensorboard`."""

    def __init__(self, *, folder: str):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def preview(self, step: int, previews: dict[str, Preview]) -> None:
        for name, preview in previews.items():
            self.writer.add_image(f"mel/{name}", mel_picture(preview.mel), step, dataformats="HWC")
            if preview.waveform is not None:
                self.writer.add_audio(f"audio/{name}", preview.waveform, step, preview.sample_rate)

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """The same for Weights & Biases; offline unless WANDB_MODE says otherwise."""

    def __init__(self, *, project: str, name: str, folder: str):
        os.environ.setdefault("WANDB_MODE", "offline")
        import wandb

        Path(folder).mkdir(parents=True, exist_ok=True)
        run_id = re.sub(r"[^A-Za-z0-9_-]", "-", name)
        self.run = wandb.init(project=project, name=name, id=run_id, resume="allow", dir=folder)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def preview(self, step: int, previews: dict[str, Preview]) -> None:
        import wandb

        media: dict[str, object] = {f"mel/{n}": wandb.Image(mel_picture(p.mel)) for n, p in previews.items()}
        for name, preview in previews.items():
            if preview.waveform is not None:
                samples = preview.waveform.numpy()
                media[f"audio/{name}"] = wandb.Audio(samples, sample_rate=preview.sample_rate)
        self.run.log(media, step=step)

    def close(self) -> None:
        self.run.finish()


def mel_picture(mel: Tensor) -> np.ndarray:
    """(f, n) log-mel -> (f, n, 3) uint8, low bins at the bottom, brightest = loudest."""
    from matplotlib import colormaps

    values = mel.flip(0).numpy()
    values = (values - values.min()) / max(float(np.ptp(values)), 1e-6)
    return (colormaps["magma"](values)[..., :3] * 255).astype(np.uint8)


def mel_figure(mels: list[Tensor], titles: list[str]):
    """A column of log-mel pictures on one colour scale."""
    from matplotlib.figure import Figure

    low, high = min(m.min().item() for m in mels), max(m.max().item() for m in mels)
    figure = Figure(figsize=(6, 1.5 * len(mels)), layout="constrained")
    for axes, mel, title in zip(figure.subplots(len(mels), 1, squeeze=False)[:, 0], mels, titles):
        axes.imshow(mel.numpy(), origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high)
        axes.set_title(title, fontsize=8, parse_math=False)
        axes.set_axis_off()
    return figure
