"""TorToise's tokenizer against transformers' and the published file; both layouts; what it cannot read."""

import json
import os
from pathlib import Path

import pytest

from ldm_audio.data.speech_tokenizer import (
    ALPHABET,
    SpeechTokenizer,
    load_speech_tokenizer,
    train_speech_bpe,
)
from ldm_audio.errors import InputError

DATA = os.environ.get("LDM_AUDIO_DATA")
real = pytest.mark.skipif(not DATA, reason="no published tokenizer: LDM_AUDIO_DATA is unset")
TEXTS = [
    "Hello world", " Hello  world ", "This is an example text.", "It's 3:15, isn't it? (No!)",
    "$2.50; 21 a-b/c",
    "well -- then... 'quoted'", "the 100% @home", "a", "x?!",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> SpeechTokenizer:
    return train_speech_bpe(["the cat sat on the mat", "that is the thing"] * 3, vocab_size=60)


def published() -> Path:
    return Path(DATA) / "tortoise" / "tokenizer.json"


def their_tokenizer(ours: SpeechTokenizer, folder: Path):
    from transformers import ClvpTokenizer

    ours.save_vocabulary(folder)
    return ClvpTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


@real
def test_published_ids_are_the_known_ones():
    tokenizer = load_speech_tokenizer(published())
    assert tokenizer.encode("Hello world") == [62, 84, 28, 2, 179, 79]
    expected = [147, 2, 54, 2, 43, 2, 169, 122, 29, 64, 2, 136, 37, 33, 9]
    assert tokenizer.encode("This is an example text.") == expected
    assert tokenizer.decode([255, *expected, 0, 0]) == "this is an example text."
    assert tokenizer.vocab_size == 255


@real
@pytest.mark.filterwarnings("ignore:.*outside the alphabet")
def test_published_ids_equal_transformers(tmp_path):
    ours = load_speech_tokenizer(published(), cleaner="transformers")
    peer = their_tokenizer(ours, tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == peer(text)["input_ids"], text


@pytest.mark.filterwarnings("ignore:.*outside the alphabet")
def test_trained_ids_equal_transformers(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    ours = load_speech_tokenizer(tmp_path / "tokenizer.json", cleaner="transformers")
    peer = their_tokenizer(ours, tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == peer(text)["input_ids"], text


def test_both_layouts_read_the_same(trained, tmp_path):
    trained.save(tmp_path / "one" / "tokenizer.json")
    trained.save_vocabulary(tmp_path / "two")
    for place in ("one", "one/tokenizer.json", "two", "two/vocab.json"):
        again = load_speech_tokenizer(tmp_path / place)
        assert again.backend.get_vocab() == trained.backend.get_vocab()
        assert again.encode("the mat, that cat") == trained.encode("the mat, that cat")


def test_training_is_repeatable_and_keeps_to_its_size():
    texts = ["one two three", "two three four", "three four five"]
    first, again = train_speech_bpe(texts, vocab_size=44), train_speech_bpe(texts[::-1], vocab_size=44)
    assert first.backend.get_vocab() == again.backend.get_vocab()
    assert first.vocab_size == 44 and set(ALPHABET) <= first.backend.get_vocab().keys()
    assert [first.backend.id_to_token(i) for i in range(3)] == ["[STOP]", "[UNK]", "[SPACE]"]


def test_a_batch_is_padded_with_stops(trained):
    tokens, mask = trained(["the mat", "a"])
    assert tokens.shape == mask.shape and tokens[1].tolist() == [trained.encode("a")[0]] + [0] * (
        tokens.shape[1] - 1
    )
    assert mask.sum(1).tolist() == [tokens.shape[1], 1]
    assert trained.decode(tokens[0]) == "the mat"


def test_numbers_are_words_and_spaces_tokens(trained):
    assert trained.encode("3") == trained.encode("three")
    assert trained.encode(" a ") == [2, *trained.encode("a"), 2]


def test_what_is_outside_the_alphabet_is_unknown_and_told_once(trained):
    fresh = SpeechTokenizer(trained.backend)
    with pytest.warns(UserWarning, match=r"% @ outside the alphabet, read as \[UNK\]"):
        assert fresh.encode("a%@") == [*fresh.encode("a"), 1, 1]
    assert fresh.decode(fresh.encode("a%b")) == "ab"


@pytest.mark.parametrize("text", ["", "  ", '"" \n'])
def test_an_empty_text_is_refused(trained, text):
    with pytest.raises(InputError, match="empty, expected something to say"):
        trained.encode(text)


def test_files_that_are_no_such_tokenizer_are_refused(trained, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        load_speech_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match=r"holds neither tokenizer\.json nor vocab\.json"):
        load_speech_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(InputError, match=r"vocab\.json: not a vocabulary with merges\.txt"):
        load_speech_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version\n")
    with pytest.raises(InputError, match=r"lacks the special tokens \[STOP\]"):
        load_speech_tokenizer(tmp_path)
    with pytest.raises(InputError, match="vocab_size=39: expected 40 or more"):
        train_speech_bpe(["a"], vocab_size=39)
    with pytest.raises(InputError, match="cleaner='french': expected english, transformers, basic"):
        SpeechTokenizer(trained.backend, cleaner="french")
