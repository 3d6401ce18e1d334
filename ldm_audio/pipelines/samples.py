"""A folder of samples that grows: sounds and pictures one by one, `samples.jsonl`, a page with players.

Every file appears whole or not at all, and the list and the page name only what is there: whoever stops a
long run keeps what was finished. Several processes may fill one folder, each with its own share of the
prompts.

Axes: f mel bins, n mel frames, s samples.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ldm_audio.audio.io import write_wav
from ldm_audio.audio.mel import LogMel
from ldm_audio.errors import InputError
from ldm_audio.files import write_text
from ldm_audio.pipelines.gallery import Clip, mel_sheet, write_page

SHOWN = ("score", "seed", "candidate", "duration", "num_steps", "guidance_scale", "negative_prompt")


class SampleFolder:
    """`folder`, to be filled with the sounds of `total` prompts, of which this process makes its share.

    The share of process `rank` of `world_size` is every prompt whose index leaves `rank` when divided by it.
    Raises InputError where samples of that share are there already and `overwrite` is false; if it is true,
    they go when the first new one comes.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        mel: LogMel,
        total: int,
        rank: int = 0,
        world_size: int = 1,
        overwrite: bool = False,
    ):
        self.folder = Path(folder)
        self.mel = mel
        self.total = total
        self.rank = rank
        self.world_size = world_size
        self.overwrite = overwrite
        self.is_cleared = False
        self.written = 0
        if not overwrite and any(self.is_own(record) for record in self.records()):
            raise InputError(f"{folder} holds samples already: choose out=FOLDER or overwrite=true")

    def is_own(self, record: dict) -> bool:
        """Whether a record is of this process's share, or of none."""
        index = record.get("index", self.total)
        return index >= self.total or index % self.world_size == self.rank

    def records(self) -> list[dict]:
        """What `samples.jsonl` lists."""
        path = self.folder / "samples.jsonl"
        if not path.exists():
            return []
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        except ValueError as error:
            raise InputError(f"{path}: not one JSON object a line ({error})") from error

    def add(self, records: Sequence[dict], waveforms: Tensor, mels: Tensor) -> None:
        """Writes rows of sounds (b, s) with mels (b, f, n) and lists them.

        Each record has `index`, `rank` (0 is its prompt's best) and `prompt`, besides what else is known; it
        is listed with the names of its files, `<index>_<prompt>_<rank>.wav` and `.png`.
        """
        self.clear()
        listed = []
        for record, waveform, mel in zip(records, waveforms, mels, strict=True):
            name = "_".join((f"{record['index']:04d}", *slug(record["prompt"]), str(record["rank"])))
            files = {"file": f"{name}.wav", "picture": f"{name}.png"}
            if not self.overwrite and (self.folder / files["file"]).exists():
                raise InputError(f"{self.folder / files['file']} is there already: overwrite=true")
            write_wav(self.folder / files["file"], waveform, self.mel.sample_rate)
            mel_sheet(self.folder / files["picture"], [mel], [""], mel=self.mel)
            listed.append(files | record)
        with self.locked():
            self.write([*self.records(), *listed])
        self.written += len(listed)

    def clear(self) -> None:
        """Removes the share's earlier samples, once."""
        if self.is_cleared:
            return
        with self.locked():
            kept = []
            for record in self.records():
                if not self.is_own(record):
                    kept.append(record)
                    continue
                for name in (record.get("file"), record.get("picture")):
                    if name:
                        (self.folder / Path(name).name).unlink(missing_ok=True)
            self.write(kept)
        self.is_cleared = True

    def write(self, records: list[dict]) -> None:
        """The list and the page, in the order of the prompts, the best of each first."""
        records.sort(key=lambda record: (record["index"], record["rank"]))
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        write_text(self.folder / "samples.jsonl", "".join(lines))
        clips = [
            Clip(title=record["prompt"], audio=record["file"], picture=record["picture"], note=note(record))
            for record in records
        ]
        write_page(self.folder, clips, "Samples")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time, where there are several."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.world_size == 1:
            yield
            return
        import fcntl

        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def note(record: dict) -> str:
    """What a page says below a sound."""
    shown = ((name, record.get(name)) for name in SHOWN)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown if value not in (None, ""))


def slug(prompt: str) -> list[str]:
    """One word for a file's name of a prompt's letters and digits, or none of a prompt without any."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return ["-".join(words)[:48].rstrip("-")] if words else []
