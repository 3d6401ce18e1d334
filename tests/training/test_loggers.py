"""Where metrics and previews go."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_audio.audio.io import read_audio
from ldm_audio.objectives.base import Preview
from ldm_audio.training.loggers import (
    JSONLLogger,
    PreviewFiles,
    TensorBoardLogger,
    WandbLogger,
    mel_picture,
    read_rows,
)

MEL = torch.linspace(-10, 1, 16)[:, None].expand(16, 20).contiguous()
SOUND = 0.5 * torch.sin(torch.arange(1600) / 10)


def test_metrics_are_rounded_rows_of_strict_json(tmp_path):
    logger = JSONLLogger(tmp_path / "metrics.jsonl", num_rows=0)
    logger.log(1, {"loss": 0.123456789, "bad": float("nan"), "worse": float("inf")})
    assert read_rows(tmp_path / "metrics.jsonl")[0]["loss"] == 0.1234568  # readable while the run goes on
    logger.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row["step"] == 1 and row["time"] > 1.5e9 and row["bad"] is None and row["worse"] is None


def test_rows_beyond_the_checkpoint_are_cut_and_a_half_row_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 2, "val/a": 2}\n{"step": 3, "a": 3}\n{"st'
    )
    logger = JSONLLogger(path, num_rows=3)
    logger.log(3, {"a": 4.0})
    logger.close()
    assert [(row["step"], row.get("a")) for row in read_rows(path)] == [(1, 1), (2, 2), (2, None), (3, 4.0)]
    JSONLLogger(path, num_rows=0).close()
    assert path.read_text() == ""


@pytest.mark.filterwarnings("ignore:Glyph")
def test_previews_become_a_picture_and_sounds_whatever_their_names(tmp_path):
    names = [r"0_a $\frac{dog$", "1_../../etc/passwd", "2_" + "long " * 60, "3_雨の音"]
    PreviewFiles(tmp_path / "previews").preview(12, {name: Preview(MEL, 3 * SOUND, 16000) for name in names})
    files = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert files[0] == "0000012.png" and len(files) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["previews"]
    with Image.open(tmp_path / "previews" / files[0]) as picture:
        assert min(picture.size) > 100
    waveform, rate = read_audio(tmp_path / "previews" / files[1])
    assert (
        rate == 16000 and waveform.shape == (1, 1600) and np.abs(waveform).max() == pytest.approx(1, abs=1e-3)
    )


def test_previews_without_sound_are_pictures_only(tmp_path):
    PreviewFiles(tmp_path).preview(1, {"mel": Preview(MEL), "silence": Preview(torch.full((16, 20), -11.5))})
    assert [path.name for path in tmp_path.iterdir()] == ["0000001.png"]


def test_a_mel_picture_has_low_bins_at_the_bottom_and_the_loudest_brightest():
    picture = mel_picture(MEL)  # the highest bin is the loudest
    assert picture.shape == (16, 20, 3) and picture.dtype == np.uint8
    brightness = picture.astype(int).sum(axis=(1, 2))
    assert brightness[0] == brightness.max() and brightness[-1] == brightness.min()
    assert mel_picture(torch.zeros(4, 5)).shape == (4, 5, 3)


def test_tensorboard_gets_scalars_pictures_and_sound(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(folder=str(tmp_path))
    logger.log(5, {"train/loss": 0.5})
    logger.preview(5, {"0_rain": Preview(MEL, SOUND, 16000), "1_mel": Preview(MEL)})
    logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(5, 0.5)]
    assert events.Tags()["images"] == ["mel/0_rain", "mel/1_mel"] and events.Tags()["audio"] == [
        "audio/0_rain"
    ]


def test_wandb_gets_the_same_offline_and_under_one_id(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, sorted(values))), finish=lambda: calls.append("finished")
    )
    stub = types.SimpleNamespace(
        init=lambda **settings: calls.append(settings) or run,
        Image=lambda picture: picture,
        Audio=lambda samples, sample_rate: (samples, sample_rate),
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = WandbLogger(project="ldm_audio", name="musicldm/blm 1", folder=str(tmp_path / "run"))
    logger.log(5, {"train/loss": 0.5})
    logger.preview(5, {"0_rain": Preview(MEL, SOUND, 16000)})
    logger.close()
    import os

    assert os.environ["WANDB_MODE"] == "offline"
    assert (
        calls[0]["id"] == "musicldm-blm-1" and calls[0]["resume"] == "allow" and (tmp_path / "run").is_dir()
    )
    assert calls[1:] == [(5, ["train/loss"]), (5, ["audio/0_rain", "mel/0_rain"]), "finished"]
