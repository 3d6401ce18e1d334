"""Published speech weights through the commands: load, inspect, convert, join, export."""

import json
from pathlib import Path

import pytest
import speech_toys as toys
import torch

from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.convert import tortoise
from ldm_audio.convert.rules import invert_rules
from ldm_audio.data.speech_tokenizer import train_speech_bpe
from ldm_audio.errors import InputError
from ldm_audio.exchange import convert, export, inspect, join_speech
from ldm_audio.pipelines.text_to_speech_tokens import TextToSpeechTokens
from ldm_audio.pipelines.token_generation import GREEDY
from ldm_audio.pretrained import load, load_network, load_parts

NORMS = [-7.0 + 0.05 * i for i in range(80)]
ENDING = [9, 4, 4, 7]
SETTINGS = {
    "sample_rate": 22050, "num_candidates": 2, "batch_size": 2, "sampling": GREEDY, "max_tokens": 8,
    "seed": 0,
}  # fmt: skip
WIDE = {**toys.SPEECH_LM_RECIPE, "dim": 128, "dropout": 0.1}
ORIGINALS = {
    "speech_lm": (WIDE, tortoise.speech_lm_rules(num_heads=2)),
    "clvp": (
        {
            **toys.CLVP_RECIPE,
            "text_tower": {**toys.TOWER, "dropout": 0.1, "norm": "floor"},
            "speech_tower": {**toys.TOWER, "vocab_size": 30, "dropout": 0.1, "norm": "floor"},
        },
        tortoise.clvp_rules(depth=2),
    ),
    "dvae": (
        {**toys.DVAE_RECIPE, "codebook_decay": 0.99},
        tortoise.dvae_rules(num_levels=2, num_res_blocks=2),
    ),
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*did not stop")


def clip() -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * 300 * torch.arange(7000) / 22050)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as transformers itself writes it."""
    import transformers

    path = tmp_path_factory.mktemp("theirs")
    peer = toys.theirs()
    peer.config.decoder_config.decoder_fixing_codes = ENDING
    peer.save_pretrained(path)
    transformers.ClvpFeatureExtractor(mel_norms=NORMS, default_audio_length=1).save_pretrained(path)
    train_speech_bpe(["seven eight"], vocab_size=40).save_vocabulary(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """TorToise's three files."""
    path = tmp_path_factory.mktemp("originals")
    for name, (recipe, rules) in ORIGINALS.items():
        torch.save(invert_rules(rules, toys.network(recipe).state_dict()), path / f"{name}.pth")
    return path


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][k], states[1][k]) for k in states[0]
    )


def test_a_folder_of_transformers_is_a_system(folder):
    speak = load(folder)
    assert isinstance(speak, TextToSpeechTokens)
    assert speak.ending == tuple(ENDING) and speak.mel.reference_samples == 22050
    assert speak.mel.norms == pytest.approx(NORMS) and speak.speech_lm.text_head is None
    made = speak("seven", [clip()], **SETTINGS)
    assert made.latents[0].shape == (len(made.tokens[0]), 64)


def test_a_system_of_ours_says_what_the_folder_said(folder, tmp_path):
    convert(folder, tmp_path / "ours", licence="a licence")
    ours, theirs = load(tmp_path / "ours"), load(folder)
    one, other = (speak("eight", [clip()], **SETTINGS) for speak in (ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(one.tokens, other.tokens, strict=True))
    assert torch.equal(one.scores, other.scores)
    system = json.loads((tmp_path / "ours" / "system.json").read_text())
    assert (system["pipeline"], system["licence"]) == ("text_to_speech_tokens", "a licence")
    assert any("SpeechLM" in line for line in inspect(tmp_path / "ours"))
    assert same_state(load_network(tmp_path / "ours", part="clvp"), theirs.clvp)


def test_there_and_back_is_the_same_folder(folder, tmp_path):
    import transformers

    convert(folder, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", to="transformers")
    model = transformers.ClvpModelForConditionalGeneration
    first, again = (model.from_pretrained(path) for path in (folder, tmp_path / "back"))
    assert same_state(first, again)
    assert again.config.decoder_config.decoder_fixing_codes == ENDING
    extractor = transformers.ClvpFeatureExtractor.from_pretrained(tmp_path / "back")
    assert extractor.mel_norms == pytest.approx(NORMS) and extractor.default_audio_length == 1
    words = transformers.ClvpTokenizer.from_pretrained(tmp_path / "back")
    assert words("seven eight")["input_ids"] == load(folder).tokenizer.encode("seven eight")


@pytest.mark.parametrize("name", ORIGINALS)
def test_an_original_file_is_known_by_its_tensors(files, tmp_path, name):
    network = load(files / f"{name}.pth")
    assert network.recipe == ORIGINALS[name][0] and network.provenance["kind"] == f"TorToise's {name}"
    assert same_state(network, toys.network(ORIGINALS[name][0])) or name == "dvae"
    convert(files / f"{name}.pth", tmp_path / f"{name}.safetensors")
    assert same_state(load(tmp_path / f"{name}.safetensors"), network)
    assert load_parts(files / f"{name}.pth", (name,))[0].keys() == {name}
    assert "every tensor fits" in "\n".join(inspect(files / f"{name}.pth"))


def test_originals_are_joined_to_a_system(files, tmp_path):
    train_speech_bpe(["seven eight"], vocab_size=40).save(tmp_path / "words.json")
    mel = SpeechMel(
        sample_rate=22050, n_fft=1024, hop_length=256, n_mels=80, fmin=0, fmax=8000, reference_samples=22050,
        norms=NORMS,
    )  # fmt: skip
    parts = {name: files / f"{name}.pth" for name in ("speech_lm", "clvp")}
    join_speech(tmp_path / "ours", **parts, tokenizer=tmp_path / "words.json", mel=mel, ending=ENDING)
    speak = load(tmp_path / "ours")
    assert speak.mel.settings() == mel.settings() and speak.ending == tuple(ENDING)
    assert same_state(speak.speech_lm, load(files / "speech_lm.pth"))
    assert speak("seven", [clip()], **SETTINGS).scores.isfinite().all()
    with pytest.raises(InputError, match="exists already"):
        join_speech(tmp_path / "ours", **parts, tokenizer=tmp_path / "words.json", mel=mel, ending=None)


def test_what_does_not_fit_is_refused(folder, files, tmp_path):
    with pytest.raises(InputError, match="holds speech_lm, clvp, expected one network alone"):
        load_network(folder)
    convert(folder, tmp_path / "ours")
    with pytest.raises(InputError, match="a text_to_speech_tokens system goes to transformers"):
        export(tmp_path / "ours", tmp_path / "out", to="diffusers")
    train_speech_bpe(["seven eight"] * 9, vocab_size=60).save(tmp_path / "ours" / "tokenizer.json")
    system = tmp_path / "ours" / "system.json"
    settings = json.loads(system.read_text())
    for change, message in (
        ({"pipeline": "other"}, "pipeline other, expected text_to_audio or text_to_speech_tokens"),
        ({"ending": [1, 2, 3, 99]}, r"ending=\[1, 2, 3, 99\]: expected four speech tokens"),
        ({"cleaner": "french"}, "cleaner='french'"),
    ):
        system.write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            load(tmp_path / "ours")
    system.write_text(json.dumps({k: v for k, v in settings.items() if k != "ending"}))
    with pytest.raises(InputError, match=r"system\.json: lacks ending"):
        load(tmp_path / "ours")


def test_a_damaged_original_is_named(files, tmp_path):
    state = torch.load(files / "clvp.pth")
    del state["to_text_latent.weight"]
    torch.save(state, tmp_path / "clvp2.pth")
    with pytest.raises(InputError, match=r"to_text_latent\.weight"):
        load(tmp_path / "clvp2.pth")


def test_a_folder_without_norms_or_words_says_so(folder, tmp_path):
    for file in folder.iterdir():
        if file.name not in ("preprocessor_config.json", "vocab.json", "merges.txt"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.warns(UserWarning, match="no mel_norms, as released models need"):
        with pytest.raises(InputError, match=r"holds no vocabulary; give tokenizer=FILE"):
            load(tmp_path)
    with pytest.warns(UserWarning, match="no mel_norms"):
        assert load(tmp_path, tokenizer=str(folder)).mel.norms is None
