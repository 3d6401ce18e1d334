"""Many sounds to make, each with its own settings: read from text files and tables, made in batches.

Axes: d width, p prompts, s samples.
"""

import csv
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_audio.audio.io import read_audio
from ldm_audio.errors import InputError
from ldm_audio.pipelines.memory import peak_growth
from ldm_audio.pipelines.samples import SampleFolder
from ldm_audio.pipelines.text_to_audio import Progress, TextToAudio, interpolate

NUMBERS: dict[str, type] = {
    "seed": int, "duration": float, "num_steps": int, "guidance_scale": float,
    "num_waveforms_per_prompt": int,
}  # fmt: skip
PACKING_PAYS = 30.0  # seconds of sound times steps from which on packed weights save more than packing takes


@dataclass(frozen=True)
class Request:
    """One prompt with its settings, as `TextToAudio` takes them.

    audio_prompt: an audio file whose CLAP embedding is the condition in place of the prompt's.
    """

    prompt: str
    negative_prompt: str
    audio_prompt: str | None
    seed: int
    duration: float | None
    num_steps: int
    guidance_scale: float
    num_waveforms_per_prompt: int

    def batches_with(self, other: "Request") -> bool:
        """Whether both can be in one call of the pipeline."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("duration", "num_steps", "guidance_scale", "num_waveforms_per_prompt")
        )


def packing_pays(requests: Sequence[Request]) -> bool:
    """Whether these are enough for `TextToAudio.pack`: not for one step of 2.56 s, which it makes wait.

    With AudioLDM-S on two cores packing takes 1 to 4 s and saves 0.4 s in a step of 10.24 s, 0.15 in one of
    2.56 s. A length that a recording will tell counts as enough.
    """
    work = (
        (math.inf if request.duration is None else request.duration)
        * request.num_steps
        * request.num_waveforms_per_prompt
        for request in requests
    )
    return sum(work) > PACKING_PAYS


def read_requests(path: str | Path, default: Request) -> list[Request]:
    """A text file with one prompt a line, or a `.csv` whose columns are fields of `Request`.

    Of a row's empty cells, and of columns that are not there, the `default` holds. Blank lines are skipped.
    Raises InputError for a file without prompts and for columns or numbers that are none, by line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"prompts={path}: no such file")
    if path.suffix.lower() != ".csv":
        lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
        requests = [replace(default, prompt=line) for line in lines if line]
    else:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            known = [field.name for field in fields(Request)]
            unknown = [name for name in reader.fieldnames or [] if name not in known]
            if unknown:
                raise InputError(f"{path}: column {unknown[0]!r}, expected some of {', '.join(known)}")
            requests = [read_row(row, default, f"{path}:{reader.line_num}") for row in reader]
    if not requests:
        raise InputError(f"prompts={path}: expected one prompt a line, found none")
    return requests


def read_row(row: dict[str, str], default: Request, place: str) -> Request:
    """A table's row as a request; `place` is named in errors."""
    if None in row or None in row.values():
        raise InputError(f"{place}: more or fewer cells than columns; quote cells that hold a comma")
    values: dict[str, Any] = {name: cell.strip() for name, cell in row.items() if cell.strip()}
    for name, cell in values.items():
        if name in NUMBERS:
            try:
                values[name] = NUMBERS[name](cell)
            except ValueError:
                raise InputError(f"{place}: {name}={cell!r}, expected a number") from None
    if not values.keys() & {"prompt", "audio_prompt"}:
        raise InputError(f"{place}: neither prompt nor audio_prompt")
    return replace(default, **values)


def conditions(pipeline: TextToAudio, requests: Sequence[Request], batch_size: int) -> Tensor:
    """(p, d) on the CPU: the embedding of each request's prompt, or of its audio prompt."""
    embeds = text_embeds(pipeline, [request.prompt for request in requests], batch_size)
    for row, request in enumerate(requests):
        if request.audio_prompt is not None:
            waveform, rate = read_audio(request.audio_prompt)
            embeds[row] = pipeline.embed_audio(torch.from_numpy(waveform.mean(0))[None], rate)[0].float()
    return embeds


def text_embeds(pipeline: TextToAudio, texts: Sequence[str], batch_size: int) -> Tensor:
    """(p, d) on the CPU; what several have in common is embedded once."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return pipeline.embed(list(rows), batch_size).float().cpu()[[rows[text] for text in texts]]


def between(requests: Sequence[Request], embeds: Tensor, num: int) -> tuple[list[Request], Tensor]:
    """`num` more requests between each and the next, whose embeddings lie evenly on the way."""
    names = [
        replace(start, prompt=f"{start.prompt} ({num + 1 - i}/{num + 1}), {end.prompt} ({i}/{num + 1})")
        if i
        else start
        for start, end in itertools.pairwise(requests)
        for i in range(num + 1)
    ]
    return [*names, requests[-1]], interpolate(embeds, num)


def read_embeds(path: str | Path) -> Tensor:
    """(p, d) float32 of a `.npy`; InputError for anything else."""
    try:
        embeds = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"prompt_embeds={path}: not a .npy file ({error})") from error
    if embeds.ndim != 2 or embeds.dtype.kind != "f" or not np.isfinite(embeds).all():
        raise InputError(f"prompt_embeds={path}: {embeds.dtype} {embeds.shape}, expected floats (prompts, d)")
    return torch.from_numpy(embeds.astype(np.float32))


def sample_requests(
    pipeline: TextToAudio,
    requests: Sequence[Request],
    embeds: Tensor,
    negatives: Tensor,
    folder: SampleFolder,
    *,
    batch_size: int,
    settings: dict[str, Any],
    record: dict[str, Any],
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Makes the folder's share of the requests, writing each batch's sounds as they come.

    embeds, negatives: (p, d) conditions of all requests, and those of their negative prompts.
    settings: other arguments of the pipeline's call.
    record: what each sound's entry in `samples.jsonl` says besides its request's settings.
    progress: called with the sampling steps done, their total, and the sounds written.
    """
    batches = list(in_batches(requests, batch_size, range(folder.rank, len(requests), folder.world_size)))
    steps = [steps_of(requests, batch, batch_size) for batch in batches]
    for number, batch in enumerate(batches):
        first = requests[batch[0]]
        generated = pipeline(
            prompt_embeds=embeds[batch],
            negative_embeds=negatives[batch],
            seed=[requests[i].seed for i in batch],
            duration=first.duration,
            num_steps=first.num_steps,
            guidance_scale=first.guidance_scale,
            num_waveforms_per_prompt=first.num_waveforms_per_prompt,
            batch_size=batch_size,
            progress=reporter(progress, sum(steps[:number]), steps[number], sum(steps), folder),
            **settings,
        )
        candidates = first.num_waveforms_per_prompt
        records = []
        for row, (seed, candidate) in enumerate(generated.seeds):
            index = batch[row // candidates]
            entry = {"index": index, "rank": row % candidates, **dataclasses.asdict(requests[index])}
            entry |= {"seed": seed, "candidate": candidate}
            entry["duration"] = generated.waveforms.shape[1] / pipeline.mel.sample_rate
            if generated.scores is not None:
                entry["score"] = round(generated.scores[row].item(), 6)
            records.append(entry | record)
        folder.add(records, generated.waveforms, generated.mels)


def rows_within(
    pipeline: TextToAudio,
    requests: Sequence[Request],
    embeds: Tensor,
    negatives: Tensor,
    *,
    limit: float,
    batch_size: int,
    settings: dict[str, Any],
) -> int:
    """How many rows at a time, `batch_size` at most, take no more than `limit` GB beyond the networks.

    Counted as so many times what one step, decoder and vocoder take for one row of the longest request,
    measured the second time, for the first reads the networks themselves. Arguments as for `sample_requests`.
    Raises InputError where not even one row fits.
    """
    longest = max(range(len(requests)), key=lambda i: requests[i].duration or 0)
    request = requests[longest]

    def one_row() -> None:
        pipeline(
            prompt_embeds=embeds[[longest]],
            negative_embeds=negatives[[longest]],
            seed=request.seed,
            duration=request.duration,
            num_steps=1,
            guidance_scale=request.guidance_scale,
            batch_size=1,
            **settings,
        )

    one_row()
    taken = max(peak_growth(one_row, pipeline.device), 1) / 1e9
    if taken > limit:
        raise InputError(f"memory_limit={limit}: one sound takes {taken:.2f} GB beyond the networks")
    return min(batch_size, int(limit / taken))


def in_batches(requests: Sequence[Request], batch_size: int, indices: Sequence[int]) -> Iterator[list[int]]:
    """The indices in lists whose requests go into one call: as many as fit `batch_size`, one at least."""
    left = list(indices)
    while left:
        first = requests[left[0]]
        alike = [i for i in left if first.batches_with(requests[i])]
        batch = alike[: max(1, batch_size // max(1, first.num_waveforms_per_prompt))]
        yield batch
        left = [i for i in left if i not in batch]


def steps_of(requests: Sequence[Request], batch: Sequence[int], batch_size: int) -> int:
    """Sampling steps of a batch's call, all its chunks together."""
    first = requests[batch[0]]
    return first.num_steps * -(-len(batch) * first.num_waveforms_per_prompt // batch_size)


def reporter(
    progress: Callable[[int, int, int], None] | None, before: int, own: int, total: int, folder: SampleFolder
) -> Progress | None:
    """What the pipeline calls during one batch, told as progress of all of them."""
    if progress is None:
        return None

    def report(done: int, expected: int) -> None:
        progress(before + done * own // max(expected, 1), total, folder.written)

    return report
