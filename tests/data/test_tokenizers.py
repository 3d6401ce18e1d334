"""The text tokenizer: the same ids as transformers' RoBERTa, and clear words about bad files."""

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_audio.data.tokenizers import Tokenizer, load_tokenizer, train_bpe
from ldm_audio.errors import InputError

CAPTIONS = [
    "A low tone that rises, then noise.",
    "a high steady tone pulsing 4 times per second",
    "drums at 120 beats per minute with claps",
    "Ein Hund bellt — наверху поёт птица 🎵",
]
TEXTS = [
    *CAPTIONS,
    "",
    " leading and trailing ",
    "don't  stop\nnow",
    "zzz <mask> </s>b",
    "é" * 30,
    "🎻 strings",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(CAPTIONS * 3, vocab_size=320, max_length=77)


@pytest.fixture
def published(tokenizer, tmp_path) -> Path:
    """A folder with vocab.json and merges.txt, as RoBERTa is published, `<mask>` included."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    vocab = {**model["vocab"], "<mask>": len(model["vocab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def load_short(tokenizer: Tokenizer, max_length: int) -> Tokenizer:
    return Tokenizer(pickle.loads(pickle.dumps(tokenizer.backend)), max_length=max_length)


def test_ids_equal_transformers_roberta(published):
    from transformers import RobertaTokenizer

    theirs = RobertaTokenizer.from_pretrained(published)
    assert theirs.vocab_size > 300  # built from the files, not the empty one that its constructor gives
    for max_length in (8, 77):
        ours = load_tokenizer(published, max_length=max_length)
        expected = theirs(TEXTS, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text_tokens, text_mask = ours(TEXTS)
        assert torch.equal(text_tokens, expected["input_ids"])
        assert torch.equal(text_mask, expected["attention_mask"].bool())


def test_every_way_of_loading_gives_the_same_ids(published, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "own" / "tokenizer.json")
    (tmp_path / "own" / "clap.safetensors").touch()
    (tmp_path / "clap.safetensors").touch()
    ways = [
        tmp_path / "own",
        tmp_path / "own" / "tokenizer.json",
        tmp_path / "own" / "clap.safetensors",
        published / "clap.safetensors",
        published / "vocab.json",
    ]
    texts = [text for text in TEXTS if "<mask>" not in text]
    for way in ways:
        assert torch.equal(load_tokenizer(way)(texts)[0], tokenizer(texts)[0])


def test_transformers_reads_what_we_save(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert [theirs(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_specials_are_robertas(tokenizer):
    ids = [tokenizer.backend.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    assert ids == [0, 1, 2, 3] and tokenizer.pad_token == 1
    text_tokens, text_mask = tokenizer(["", "low tone"])
    assert text_tokens.dtype == torch.int64 and text_mask.dtype == torch.bool
    assert text_tokens[0].tolist() == [0, 2] + [1] * (text_tokens.shape[1] - 2)
    assert text_mask[0].sum() == 2 and text_mask[1].all()


def test_batches_are_no_wider_than_their_longest_text(tokenizer):
    together, mask = tokenizer(TEXTS)
    assert together.shape[1] == max(len(tokenizer.encode(text)) for text in TEXTS)
    for row, keep, text in zip(together, mask, TEXTS):
        alone, _ = tokenizer([text])
        assert torch.equal(row[keep], alone[0])
        assert (row[~keep] == tokenizer.pad_token).all()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"])))
def test_any_text_can_be_written_and_read_back(text):
    backend = train_bpe(CAPTIONS, vocab_size=280, max_length=77).backend
    encoding = backend.encode(text)
    assert 3 not in encoding.ids  # never unknown
    assert backend.decode(encoding.ids) == text


def train_backwards(path: Path) -> None:
    """What another process does, with one thread of the tokenizers' own."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    path.write_text(train_bpe(CAPTIONS[::-1] * 3, vocab_size=300, max_length=9).backend.to_str())


def test_training_does_not_depend_on_order_threads_or_process(tmp_path, processes):
    here = train_bpe(CAPTIONS * 3, vocab_size=300, max_length=9).backend.to_str()
    process = processes.Process(target=train_backwards, args=(tmp_path / "there.json",))
    process.start()
    process.join()
    assert (tmp_path / "there.json").read_text() == here


def test_vocabulary_is_no_larger_than_asked(tokenizer):
    assert tokenizer.vocab_size == 320 == tokenizer.backend.get_vocab_size()
    assert (
        train_bpe(["aa"], vocab_size=5000, max_length=5).vocab_size == 261
    )  # 4 specials, 256 bytes, one merge


def test_a_cut_text_is_reported_once_with_what_was_lost(tokenizer):
    short = load_short(tokenizer, 6)
    with pytest.warns(UserWarning, match="cut to 6, losing '.* noise.'") as caught:
        text_tokens, _ = short([CAPTIONS[0], CAPTIONS[1]])
    assert len(caught) == 1 and text_tokens.shape == (2, 6)
    assert (text_tokens[:, 0] == 0).all() and (text_tokens[:, -1] == 2).all()
    lost = str(caught[0].message).split("losing ")[1].split(" (further")[0]
    kept = short.backend.decode(text_tokens[0].tolist())
    assert lost and kept + lost.strip("'") == CAPTIONS[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short([CAPTIONS[2]])


def test_a_text_of_exactly_the_limit_is_not_cut(tokenizer):
    length = len(tokenizer.encode(CAPTIONS[1]))
    exact = load_short(tokenizer, length)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exact.encode(CAPTIONS[1]) == tokenizer.encode(CAPTIONS[1])


def test_the_limit_travels_with_the_file(tokenizer, published, tmp_path):
    path = tmp_path / "deep" / "tokenizer.json"
    tokenizer.save(path)
    assert load_tokenizer(path).max_length == 77
    assert load_tokenizer(path, max_length=12).max_length == 12
    assert [entry.name for entry in path.parent.iterdir()] == ["tokenizer.json"]
    assert load_tokenizer(published).max_length == 512
    (published / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    assert load_tokenizer(published).max_length == 128
    (published / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert load_tokenizer(published).max_length == 512


def test_tokenizers_travel_to_worker_processes(tokenizer):
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(TEXTS)[0], tokenizer(TEXTS)[0])


def test_files_that_are_no_tokenizer_are_refused_by_name(tmp_path, published):
    path = tmp_path / "tokenizer.json"
    for content in ("", "{}", "not json", '{"model": {"type": "nothing"}}', "\x00\x01"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer\.json") as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    (published / "merges.txt").write_text("no version\nnothing here either x y\n")
    with pytest.raises(InputError, match=r"vocab\.json: not a vocabulary with merges\.txt"):
        load_tokenizer(published)
    (published / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"holds neither tokenizer\.json nor vocab\.json with merges\.txt"):
        load_tokenizer(published)
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_missing_specials_are_refused_by_name(published, tmp_path):
    vocab = json.loads((published / "vocab.json").read_text())
    for token in ("<pad>", "<unk>"):
        del vocab[token]
    (published / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(InputError, match=r"vocab\.json: .*lacks the special tokens <pad> <unk>"):
        load_tokenizer(published)

    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    path = tmp_path / "other" / "tokenizer.json"
    path.parent.mkdir()
    Backend(models.BPE({"a": 0}, [])).save(str(path))
    with pytest.raises(InputError, match=r"tokenizer\.json: tokenizer lacks the special tokens <s>"):
        load_tokenizer(path)
    specials = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    Backend(models.BPE(specials, [])).save(str(path))
    with pytest.raises(InputError, match=r"tokenizer\.json: tokenizer does not wrap a text"):
        load_tokenizer(path)


def test_impossible_requests_are_refused(tokenizer):
    with pytest.raises(InputError, match="vocab_size=259: expected 260 or more"):
        train_bpe(CAPTIONS, vocab_size=259, max_length=77)
    with pytest.raises(InputError, match="no captions"):
        train_bpe([], vocab_size=300, max_length=77)
    with pytest.raises(InputError, match="max_length=1"):
        load_short(tokenizer, 1)
    for texts in ("a plain string", []):
        with pytest.raises(InputError, match="expected a list of at least one string"):
            tokenizer(texts)
