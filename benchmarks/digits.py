"""Spoken digits as speech tokens: what dVAE, CLVP and the speech model reached, in numbers and as sound.

    python train.py experiment=speech_digits/{dvae,clvp,speech_lm} data.path=DATA      # one after the other
    python benchmarks/digits.py DATA [--runs runs/speech_digits] [--speaker theo] [--out digits]

Of the speaker that training never heard: how well the dVAE gives a mel back, which text CLVP finds for a
recording and which recording for a text, and what the speech model writes in that voice. The best candidate
of each digit is decoded to a mel and by Griffin-Lim to sound; wav files and `digits.png` beside the real
recordings lie in `out`. Two judges hear the candidates: CLVP, which also ranked them, and the nearest
recording of the other speakers by dynamic time warping, which knows nothing of tokens. The last line is one
JSON object.

Axes: b batch, f mel bins, k frequencies, n mel frames, r recordings, s samples, t speech tokens.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_audio.audio.io import write_wav
from ldm_audio.audio.mel import hann_window, mel_matrix
from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.data.speech import Speech, folder
from ldm_audio.data.speech_tokenizer import load_speech_tokenizer
from ldm_audio.objectives.speech import lengths_mask, speech_tokens
from ldm_audio.pipelines.text_to_speech_tokens import TextToSpeechTokens
from ldm_audio.pipelines.token_generation import Sampling
from ldm_audio.pretrained import load_network

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 22050
LONGEST = 24576  # samples
REFERENCE = 22050  # samples
CANDIDATES = 8
SAMPLING = Sampling(temperature=0.8, top_k=50, top_p=0.8, repetition_penalty=1.0)
SPEECH_MEL = {
    "sample_rate": RATE, "n_fft": 1024, "hop_length": 256, "n_mels": 80, "fmin": 0, "fmax": 8000,
    "reference_samples": REFERENCE, "norms": None,
}  # fmt: skip
ITERATIONS = 60
QUIET = 35.0  # dB below the loudest frame


def recordings(path: Path, speaker: str, *, others: bool) -> Speech:
    """Those of one speaker, or those of all others."""
    who = {"without_speakers": [speaker]} if others else {"speakers": [speaker]}
    sizes = {"num_samples": LONGEST, "num_references": 2, "reference_samples": REFERENCE}
    return folder(path, sample_rate=RATE, seed=0, **sizes, **who)


def batch_of(data: Speech) -> dict:
    items = [data[i] for i in range(len(data))]
    return {key: torch.stack([item[key] for item in items]) for key in ("waveform", "num_samples")} | {
        "caption": [item["caption"] for item in items]
    }


def told(row: np.ndarray | Tensor) -> float:
    return round(float(row), 3)


def reconstruction(dvae, mel: SpeechMel, batch: dict) -> dict:
    """Squared error of the log-mels within the recordings, beside that of each bin's mean."""
    mels = mel(batch["waveform"])
    mask = lengths_mask(batch["num_samples"] // mel.hop_length + 1, mels.shape[-1])
    made, quantised = dvae(mels)
    frames = mels.transpose(1, 2)[mask]
    tokens = quantised.tokens[mask[:, :: dvae.frames_per_token]]
    share = torch.bincount(tokens, minlength=dvae.num_tokens) / len(tokens)
    return {
        "dvae_error": told((made - mels).square().transpose(1, 2)[mask].mean()),
        "dvae_error_of_bin_mean": told((frames - frames.mean(dim=0)).square().mean()),
        "dvae_perplexity": told(torch.special.entr(share).sum().exp()),
    }


class Judge:
    """CLVP's scores of every digit's text against speech tokens."""

    def __init__(self, clvp, tokenizer):
        text, mask = tokenizer(DIGITS)
        self.clvp = clvp
        self.text, self.mask = F.pad(text, (0, 1)), F.pad(mask, (1, 0), value=True)

    def scores(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, t) -> (10 texts, b)."""
        return self.clvp.scores(self.text, tokens, self.mask, mask)

    def hears(self, row: Tensor) -> str:
        """(t,) -> the digit; of no token the first, at worst."""
        heard = row if len(row) else row.new_zeros(1)
        return DIGITS[int(self.scores(heard[None])[:, 0].argmax())]


def ranking(judge: Judge, tokens: Tensor, mask: Tensor, said: Sequence[str]) -> dict:
    """Text by recording, and recording by text among ten recordings, one a digit."""
    scores = judge.scores(tokens, mask)  # (10, r)
    right = torch.tensor([DIGITS.index(digit) for digit in said])
    columns = [[i for i, digit in enumerate(said) if digit == name] for name in DIGITS]
    rounds = min(map(len, columns))
    sets = [torch.tensor([column[number] for column in columns]) for number in range(rounds)]
    found = sum(int((scores[:, chosen].argmax(dim=1) == torch.arange(10)).sum()) for chosen in sets)
    return {
        "text_of_recording": int((scores.argmax(dim=0) == right).sum()),
        "recordings": len(said),
        "recording_of_text": found,
        "texts": 10 * rounds,
    }


# --- a judge that knows no tokens --------------------------------------------------------------------------


def features(mel: Tensor) -> Tensor:
    """(f, n) log-mel -> (n / 2, 20), each bin without its mean: what is said rather than who says it."""
    coarse = F.avg_pool2d(mel[None].clamp(min=-9.0), (4, 2), ceil_mode=True)[0].T
    return coarse - coarse.mean(dim=0)


def warped_distances(query: Tensor, library: Sequence[Tensor]) -> Tensor:
    """(n, 20) against r recordings -> (r,) cost a step of the best warping path to each."""
    lengths = torch.tensor([len(row) for row in library])
    padded = torch.nn.utils.rnn.pad_sequence(list(library), batch_first=True)  # (r, m, 20)
    local = torch.cdist(query.expand(len(library), -1, -1), padded)  # (r, n, m)
    total = torch.full((len(library), query.shape[0] + 1, padded.shape[1] + 1), torch.inf)
    total[:, 0, 0] = 0.0
    for i in range(query.shape[0]):
        for j in range(padded.shape[1]):
            before = torch.minimum(torch.minimum(total[:, i, j + 1], total[:, i + 1, j]), total[:, i, j])
            total[:, i + 1, j + 1] = local[:, i, j] + before
    return total[torch.arange(len(library)), -1, lengths] / (lengths + len(query))


def nearest_digit(mel: Tensor, library: Sequence[Tensor], said: Sequence[str]) -> str:
    """What most of the five nearest recordings say; the nearest where none says it twice."""
    near = warped_distances(features(mel), library).argsort()[:5].tolist()
    votes = [said[i] for i in near]
    return max(votes, key=lambda digit: (votes.count(digit), -votes.index(digit)))


# --- to sound ----------------------------------------------------------------------------------------------


def griffin_lim(power: Tensor, mel: SpeechMel, num_samples: int) -> Tensor:
    """(f, n) power by mel bin -> (s,) waveform: non-negative frequencies first, then phases that fit."""
    matrix = mel_matrix(
        mel.sample_rate, mel.n_fft, mel.n_mels, mel.fmin, mel.fmax, "htk", "slaney", power.device, power.dtype
    )
    spectrum = torch.full((matrix.shape[1], power.shape[1]), power.mean().item())
    for _ in range(ITERATIONS):  # multiplicative updates (Lee and Seung, 2001)
        spectrum = spectrum * (matrix.T @ power) / (matrix.T @ (matrix @ spectrum) + 1e-10)
    magnitude = spectrum.sqrt()
    settings = {
        "n_fft": mel.n_fft, "hop_length": mel.hop_length,
        "window": hann_window(mel.n_fft, power.device, power.dtype),
    }  # fmt: skip
    phases = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    for _ in range(ITERATIONS):
        waveform = torch.istft(torch.polar(magnitude, phases), length=num_samples, **settings)
        phases = torch.stft(waveform, return_complex=True, **settings).angle()
    return torch.istft(torch.polar(magnitude, phases), length=num_samples, **settings)


def measured(waveform: Tensor) -> dict[str, float]:
    """Level, clipping, spectrum, and what is voiced among the frames that are not quiet; NaN for silence."""
    frames = waveform.numpy()
    frames = np.lib.stride_tricks.sliding_window_view(frames, 1024)[::256]
    energy = (frames**2).mean(axis=1)
    loud = frames[energy > energy.max() * 10 ** (-QUIET / 10)]
    loud = (loud - loud.mean(axis=1, keepdims=True)) * np.hanning(1024)
    spectrum = np.abs(np.fft.rfft(loud, 2048)) ** 2
    hertz = np.fft.rfftfreq(2048, 1 / RATE)
    power = spectrum.sum(axis=0)
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(1024), 2048)) ** 2)
    lags = np.arange(RATE // 350, RATE // 70)
    correlation = np.fft.irfft(spectrum)
    peaks = correlation[:, lags] / correlation[:, :1] * window[0] / window[lags]
    voiced = peaks.max(axis=1) > 0.5
    pitch = RATE / lags[peaks.argmax(axis=1)][voiced]
    return {
        "seconds": len(waveform) / RATE,
        "level_db": 10 * np.log10(energy.mean() + 1e-12),
        "clipped": float((waveform.abs() >= 1).float().mean()),
        "centroid_hz": float((hertz * power).sum() / power.sum()),
        "above_4_khz": float(power[hertz > 4000].sum() / power.sum()),
        "voiced": float(voiced.mean()),
        "pitch_hz": float(np.median(pitch)) if voiced.any() else float("nan"),
    }


def table(sounds: dict[str, list[Tensor]]) -> dict[str, dict[str, float]]:
    """Medians over the sounds of each kind, printed as rows."""
    rows = {}
    for kind, waveforms in sounds.items():
        found = [measured(waveform) for waveform in waveforms]
        rows[kind] = {key: told(np.nanmedian([one[key] for one in found])) for key in found[0]}
    print("| | " + " | ".join(next(iter(rows.values()))) + " |")
    for kind, row in rows.items():
        print(f"| {kind} | " + " | ".join(str(value) for value in row.values()) + " |")
    return rows


def picture(path: Path, rows: dict[str, list[Tensor]], mel: SpeechMel) -> None:
    """Log-mels (f, n), a row a kind and a column a digit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 2.0 * len(rows)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), len(DIGITS), sharex=True, sharey=True)
    for line, (kind, mels) in zip(panels, rows.items()):
        for panel, one, digit in zip(line, mels, DIGITS):
            seconds = one.shape[1] * mel.hop_length / mel.sample_rate
            panel.imshow(
                one, origin="lower", aspect="auto", cmap="magma", vmin=-11.5, vmax=2.0,
                extent=(0, seconds, -0.5, mel.n_mels - 0.5),
            )  # fmt: skip
            panel.set_title(digit, fontsize=8)
            panel.set(xlim=(0, 1.0))
        line[0].set_ylabel(f"{kind}\nmel bin", fontsize=8)
    figure.savefig(path)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/speech_digits"))
    parser.add_argument("--speaker", default="theo")
    parser.add_argument("--out", type=Path, default=Path("digits"))
    parser.add_argument("--clvp-weights", choices=("weights", "best"), default="weights",
                        help="best: of the step that did best on the same speaker, so too good")  # fmt: skip
    args = parser.parse_args()
    mel = SpeechMel(**SPEECH_MEL)
    dvae = load_network(args.runs / "dvae/weights/dvae.safetensors")
    clvp = load_network(args.runs / f"clvp/{args.clvp_weights}/clvp.safetensors")
    speech_lm = load_network(args.runs / "speech_lm/weights/speech_lm.safetensors")
    tokenizer = load_speech_tokenizer(args.runs / "clvp/weights/tokenizer.json")
    held_out, rest = (recordings(args.data, args.speaker, others=others) for others in (False, True))
    batch, known = batch_of(held_out), batch_of(rest)
    said, judge = batch["caption"], Judge(clvp, tokenizer)
    tokens, mask = speech_tokens(batch, mel, dvae)
    result = reconstruction(dvae, mel, batch) | ranking(judge, tokens, mask, said)

    frames = known["num_samples"] // mel.hop_length + 1
    library = [features(one[:, :n]) for one, n in zip(mel(known["waveform"]), frames.tolist())]
    own = batch["num_samples"] // mel.hop_length + 1
    mels = [one[:, :n] for one, n in zip(mel(batch["waveform"]), own.tolist())]
    heard = [nearest_digit(one, library, known["caption"]) for one in mels]
    result["recordings_heard_by_nearest"] = sum(map(str.__eq__, heard, said))
    again = [dvae.decode(row[kept][None])[0] for row, kept in zip(tokens, mask)]
    heard = [nearest_digit(one, library, known["caption"]) for one in again]
    result["round_trips_heard_by_nearest"] = sum(map(str.__eq__, heard, said))

    speak = TextToSpeechTokens(speech_lm=speech_lm, clvp=clvp, tokenizer=tokenizer, mel=mel, ending=None)
    written, best = [], []
    for digit in DIGITS:
        references = list(held_out[said.index(digit)]["references"])
        spoken = speak(
            digit, references, sample_rate=RATE, num_candidates=CANDIDATES, batch_size=CANDIDATES,
            sampling=SAMPLING, max_tokens=40, seed=0, num_latents=0,
        )  # fmt: skip
        by_nearest = [nearest_digit(dvae.decode(row[None])[0], library, known["caption"]) if len(row) else ""
                      for row in spoken.tokens]  # fmt: skip
        written.append({
            "clvp": [judge.hears(row) == digit for row in spoken.tokens],
            "nearest": [name == digit for name in by_nearest],
            "tokens": [len(row) for row in spoken.tokens],
            "stopped": spoken.stopped,
        })  # fmt: skip
        best.append(spoken.tokens[0] if len(spoken.tokens[0]) else torch.zeros(1, dtype=torch.int64))
        print(f"{digit}: nearest hears {by_nearest}", flush=True)
    result |= {
        "candidates": CANDIDATES * len(DIGITS),
        "candidates_heard_by_clvp": sum(sum(one["clvp"]) for one in written),
        "best_heard_by_clvp": sum(one["clvp"][0] for one in written),
        "candidates_heard_by_nearest": sum(sum(one["nearest"]) for one in written),
        "best_heard_by_nearest": sum(one["nearest"][0] for one in written),
        "stopped": sum(sum(one["stopped"]) for one in written),
        "mean_tokens": told(np.mean([one["tokens"] for one in written])),
        "mean_tokens_of_recordings": told(mask.sum(dim=1).float().mean()),
    }

    places = [said.index(digit) for digit in DIGITS]
    kinds = {
        "recording": [mels[i] for i in places],
        "its tokens": [again[i] for i in places],
        "sampled": [dvae.decode(row[None])[0] for row in best],
    }
    sounds = {"recording itself": [batch["waveform"][i][: batch["num_samples"][i]] for i in places]}
    for kind, pictures in kinds.items():
        sounds[kind] = [
            griffin_lim(mel.power(one), mel, (one.shape[1] - 1) * mel.hop_length) for one in pictures
        ]
        for digit, waveform in zip(DIGITS, sounds[kind]):
            write_wav(args.out / f"{kind.replace(' ', '_')}_{digit}.wav", waveform.clamp(-1, 1), RATE)
    picture(args.out / "digits.png", kinds, mel)
    result["sounds"] = table(sounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
