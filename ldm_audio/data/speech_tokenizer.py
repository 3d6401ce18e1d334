"""TorToise's text tokenizer: cleaned English by a BPE of 255 tokens, on the `tokenizers` package alone.

Must match the original's `VoiceBpeTokenizer` and, with `cleaner="transformers"`, `ClvpTokenizer`. A space is
the token `[SPACE]`; a text ends and is padded with `[STOP]`, which encoding does not add; what is outside the
alphabet (digits are words by then) becomes `[UNK]`, character by character, and is reported. The token that
begins a text is the decoder's own and not in the vocabulary.

Axes: b batch, l text tokens.
"""

import json
import os
import string
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ldm_audio.data.english import CLEANERS
from ldm_audio.data.tokenizers import checked, padded, read_backend
from ldm_audio.errors import InputError
from ldm_audio.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

STOP, UNK, SPACE = "[STOP]", "[UNK]", "[SPACE]"
SPECIALS = (STOP, UNK, SPACE)
ALPHABET = "!'(),-./:;?" + string.ascii_lowercase
START = "<|endoftext|>"  # transformers' name of the token that begins a text


class SpeechTokenizer:
    """list of b texts -> (text_tokens (b, l) int64, text_mask (b, l) bool, True = real token).

    backend: a `tokenizers.Tokenizer` with the three special tokens; taken over. cleaner: `english` as the
    original, `transformers` as that library, or `basic` for lower case alone.
    """

    def __init__(self, backend: "Backend", *, cleaner: str = "english"):
        if cleaner not in CLEANERS:
            raise InputError(f"cleaner={cleaner!r}: expected {', '.join(CLEANERS)}")
        missing = [token for token in SPECIALS if backend.token_to_id(token) is None]
        if missing:
            raise InputError(f"tokenizer lacks the special tokens {' '.join(missing)}")
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.clean = CLEANERS[cleaner]
        self.stop_token, self.unknown_token = map(backend.token_to_id, (STOP, UNK))
        self.vocab_size = len([token for token in backend.get_vocab() if token != START])
        self.warned = False

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """b texts -> (b, l) tokens and mask, l the longest of the batch."""
        return padded([self.encode(text) for text in checked(texts)], self.stop_token)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text. InputError where nothing is left of it; warns of the first unknown ones."""
        cleaned = self.clean(text)
        if not cleaned.strip():
            raise InputError(f"text {text!r}: empty, expected something to say")
        ids = self.backend.encode(cleaned.replace(" ", SPACE), add_special_tokens=False).ids
        if self.unknown_token in ids and not self.warned:
            self.warned = True
            known = self.backend.get_vocab()
            odd = sorted({character for character in cleaned if character not in known} - {" "})
            warnings.warn(
                f"text {text!r}: {' '.join(odd)} outside the alphabet, read as {UNK} (told once)",
                stacklevel=3,
            )
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The cleaned text of some tokens; stops and unknown ones are left out."""
        words = [self.backend.id_to_token(int(token)) for token in tokens]
        kept = (word for word in words if word not in (None, STOP, UNK, START))
        return "".join(" " if word == SPACE else word for word in kept)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `tokenizer.json`, which `load_speech_tokenizer` and the original read."""
        write_text(path, self.backend.to_str(pretty=True))

    def save_vocabulary(self, folder: str | os.PathLike[str]) -> None:
        """Writes `vocab.json` and `merges.txt`, which transformers reads."""
        model = json.loads(self.backend.to_str())["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        write_text(Path(folder) / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
        write_text(Path(folder) / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))


def load_speech_tokenizer(path: str | os.PathLike[str], *, cleaner: str = "english") -> SpeechTokenizer:
    """Reads a `tokenizer.json`, or a folder with one or with `vocab.json` and `merges.txt`.

    A weights file stands for its folder. InputError, naming the file, where there is no such tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix == ".json" and path.name not in ("vocab.json", "system.json"):
        source = path
    else:
        folder = path if path.is_dir() else path.parent
        own = folder / "tokenizer.json"
        source = own if own.exists() else folder / "vocab.json"
        if not source.exists():
            raise InputError(f"{folder}: holds neither tokenizer.json nor vocab.json with merges.txt")
    backend = read_vocabulary(source.parent) if source.name == "vocab.json" else read_backend(source)
    try:
        return SpeechTokenizer(backend, cleaner=cleaner)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def read_vocabulary(folder: Path) -> "Backend":
    """`vocab.json` and `merges.txt`, the first line of which is a title."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    try:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
        model = models.BPE(vocab, [tuple(line.split()) for line in lines if line], unk_token=UNK)
    except Exception as error:  # the package raises nothing narrower
        raise InputError(f"{folder / 'vocab.json'}: not a vocabulary with merges.txt ({error})") from error
    return prepared(Backend(model))


def prepared(backend: "Backend") -> "Backend":
    """Cuts out the special tokens, then words and punctuation, before anything is merged."""
    from tokenizers import pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([token for token in SPECIALS if backend.token_to_id(token) is not None])
    return backend


def train_speech_bpe(
    captions: Iterable[str], *, vocab_size: int, cleaner: str = "english"
) -> SpeechTokenizer:
    """Learns at most `vocab_size` tokens from texts: the specials, 11 signs, 26 letters, and merges.

    Deterministic; few texts give fewer tokens.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, trainers

    smallest = len(SPECIALS) + len(ALPHABET)
    if vocab_size < smallest:
        raise InputError(f"vocab_size={vocab_size}: expected {smallest} or more (alphabet and specials)")
    if cleaner not in CLEANERS:
        raise InputError(f"cleaner={cleaner!r}: expected {', '.join(CLEANERS)}")
    cleaned = [CLEANERS[cleaner](caption) for caption in captions]
    if not cleaned:
        raise InputError("no texts to train a tokenizer on")
    backend = prepared(Backend(models.BPE(unk_token=UNK)))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=list(ALPHABET),
        limit_alphabet=len(ALPHABET),
        show_progress=False,
    )
    backend.train_from_iterator(cleaned, trainer)
    return SpeechTokenizer(backend, cleaner=cleaner)
