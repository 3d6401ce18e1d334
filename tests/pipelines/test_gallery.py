from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch

from ldm_audio.audio.mel import LogMel
from ldm_audio.errors import InputError
from ldm_audio.pipelines import gallery
from ldm_audio.pipelines.gallery import mel_sheet, write_page

torch.set_num_threads(1)

NASTY = '<script>alert("x")</script> & $x^{$ 犬 \n\t end'


@pytest.fixture(scope="module")
def mel():
    return LogMel(
        sample_rate=16000,
        n_fft=1024,
        hop_length=160,
        win_length=1024,
        n_mels=64,
        fmin=0,
        fmax=8000,
        framing="hifigan",
    )


def tone(mel, hertz, seconds=0.5):
    t = torch.arange(round(seconds * mel.sample_rate)) / mel.sample_rate
    return mel(0.5 * torch.sin(2 * torch.pi * hertz * t)[None])[0]


def pixels(path):
    return matplotlib.image.imread(path)[..., :3]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


class Elements(HTMLParser):
    """Every tag with its attributes, and the text between."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def height_of_the_loudest(path):
    """How far up the picture its yellow is, in share of the height; the colour bar is cut off."""
    image = pixels(path)
    red, green, blue = np.moveaxis(image[:, : int(0.7 * image.shape[1])], -1, 0)
    rows, _ = np.nonzero((red > 0.95) & (green > 0.85) & (blue < 0.85))
    return 1 - rows.mean() / len(image)


def test_low_frequencies_are_at_the_bottom(tmp_path, mel):
    for hertz in (250, 1000, 4000):
        mel_sheet(tmp_path / f"{hertz}.png", [tone(mel, hertz)], [""], mel=mel)
    low, middle, high = (height_of_the_loudest(tmp_path / f"{hertz}.png") for hertz in (250, 1000, 4000))
    assert low + 0.1 < middle < high - 0.1


def test_axes_are_in_seconds_and_hertz(tmp_path, mel, monkeypatch):
    import matplotlib.figure

    seen = []
    draw = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: seen.append(self) or draw(self, *a, **k)
    )
    mel_sheet(tmp_path / "sheet.png", [tone(mel, 1000, 1.5)], ["a tone"], mel=mel)
    panel = seen[0].axes[0]
    assert panel.get_xlim() == (0, 1.5) and panel.get_title(loc="left") == "a tone"
    labels = dict(zip((t.get_text() for t in panel.get_yticklabels()), panel.get_yticks()))
    assert list(labels) == ["250", "500", "1k", "2k", "4k"]
    loudest = tone(mel, 1000, 1.5)[:, 70].argmax().item()
    assert abs(labels["1k"] - loudest) <= 0.5


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_any_number_of_spectrograms_of_any_length_fit_one_sheet(tmp_path, mel, count):
    mels = [tone(mel, 300 * (i + 1), 0.3 + 0.2 * i) for i in range(count)]
    mel_sheet(tmp_path / "sheet.png", mels, [f"tone {i}" for i in range(count)], mel=mel)
    assert pixels(tmp_path / "sheet.png").std() > 0.1
    assert files(tmp_path) == ["sheet.png"]


@pytest.mark.filterwarnings("error")
def test_titles_may_hold_anything(tmp_path, mel):
    mel_sheet(tmp_path / "sheet.png", [tone(mel, 500)] * 3, [NASTY, "", "word " * 200], mel=mel)
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_silence_alone_is_drawn(tmp_path, mel):
    mel_sheet(tmp_path / "sheet.png", [mel(torch.zeros(1, 16000))[0]], ["silence"], mel=mel)
    assert (tmp_path / "sheet.png").exists()


def test_long_titles_are_two_lines():
    title = gallery.shorten("word " * 200)
    assert title.count("\n") == 1 and title.endswith("…") and max(map(len, title.split("\n"))) <= 46


@pytest.mark.parametrize("mels, titles", [(0, 0), (2, 1)])
def test_as_many_titles_as_spectrograms_are_needed(tmp_path, mel, mels, titles):
    with pytest.raises(InputError, match=f"{mels} spectrograms and {titles} titles"):
        mel_sheet(tmp_path / "sheet.png", [tone(mel, 500)] * mels, ["x"] * titles, mel=mel)
    assert files(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, mel, monkeypatch):
    mel_sheet(tmp_path / "sheet.png", [tone(mel, 500)], ["x"], mel=mel)
    before = (tmp_path / "sheet.png").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(gallery.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        mel_sheet(tmp_path / "sheet.png", [tone(mel, 900)], ["y"], mel=mel)
    assert (tmp_path / "sheet.png").read_bytes() == before and files(tmp_path) == ["sheet.png"]


def test_the_page_has_a_player_a_picture_and_the_texts_of_each_clip(tmp_path):
    clips = [
        {"title": "a dog", "audio": "0.wav", "picture": "0.png", "note": "seed 1"},
        {"title": "a cat", "audio": "sub/1.wav"},
    ]
    path = write_page(tmp_path / "new", clips, "Sounds")
    page = Elements(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "new" / "index.html"
    assert [audio["src"] for audio in page.named("audio")] == ["0.wav", "sub/1.wav"]
    assert all("controls" in audio for audio in page.named("audio"))
    assert [image["src"] for image in page.named("img")] == ["0.png"]
    for text in ("Sounds", "a dog", "a cat", "seed 1"):
        assert text in page.texts


def test_the_page_escapes_every_text(tmp_path):
    clips = [{"title": NASTY, "audio": 'a "b"&#?.wav', "picture": "ä<.png", "note": NASTY}]
    path = write_page(tmp_path, clips, NASTY)
    page = Elements(path.read_text(encoding="utf-8"))
    assert not page.named("script")
    assert page.named("audio")[0]["src"] == "a%20%22b%22%26%23%3F.wav"
    assert page.named("img")[0]["src"] == "%C3%A4%3C.png"
    assert page.texts.count(NASTY) >= 3


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path):
    text = write_page(tmp_path, [{"title": "a", "audio": "a.wav"}], "t").read_text(encoding="utf-8")
    assert "http" not in text and "//" not in text
