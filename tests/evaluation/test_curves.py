"""A run's metrics as a picture."""

import pytest
from PIL import Image

from ldm_audio.errors import InputError
from ldm_audio.evaluation.curves import curves_of, draw_curves

ROWS = (
    '{"step": 5, "time": 1.0, "train/loss": 2.0, "grad_norm/unet": 0.5, "bad": null}',
    '{"step": 10, "time": 2.0, "train/loss": 1.0, "grad_norm/unet": 0.25}',
    '{"step": 10, "time": 2.5, "val/loss": 1.5}',
    '{"step": 15, "train/lo',
)


def test_training_and_validation_share_a_panel_and_a_half_row_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(ROWS))
    assert curves_of(tmp_path) == {
        "loss": {"train": [(5, 2.0), (10, 1.0)], "val": [(10, 1.5)]},
        "grad_norm/unet": {"grad_norm/unet": [(5, 0.5), (10, 0.25)]},
    }
    with Image.open(draw_curves(tmp_path)) as picture:
        assert picture.size == (1080, 198)  # three panels in a row


def test_a_folder_without_rows_is_named(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: no such file"):
        curves_of(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"metrics\.jsonl: no rows"):
        draw_curves(tmp_path)
