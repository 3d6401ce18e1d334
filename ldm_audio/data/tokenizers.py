"""Byte-level BPE text tokenizer with RoBERTa's special tokens, on the `tokenizers` package alone.

Must match transformers' `RobertaTokenizer`: a text becomes `<s> ... </s>`, anything beyond the length limit
is cut before `</s>`. Departures: a batch is padded to its longest text (the towers mask padding, so nothing
else changes), and a cut text is reported.

Axes: b batch, l text tokens.
"""

import copy
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm_audio.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
SPECIALS = (BOS, PAD, EOS, UNK)
ROBERTA_MAX_LENGTH = 512  # where a file states no limit of its own
NUM_BYTES = 256


class Tokenizer:
    """list of b texts -> (text_tokens (b, l) int64, text_mask (b, l) bool, True = real token).

    backend: a `tokenizers.Tokenizer` that wraps each text in `<s>` and `</s>` and knows `<pad>` and `<unk>`;
    it is taken over, its own truncation and padding are switched off.
    max_length: the most tokens of a text, the two specials included. Raises InputError for a backend without
    the special tokens or without the wrapping.
    """

    def __init__(self, backend: "Backend", *, max_length: int):
        missing = [token for token in SPECIALS if backend.token_to_id(token) is None]
        if missing:
            raise InputError(f"tokenizer lacks the special tokens {' '.join(missing)}")
        if max_length < 2:
            raise InputError(f"max_length={max_length}: expected 2 or more, <s> and </s> being counted")
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.max_length = max_length
        self.vocab_size = backend.get_vocab_size()
        self.bos_token, self.pad_token, self.eos_token = map(backend.token_to_id, (BOS, PAD, EOS))
        self.warned = False
        if backend.encode("").ids != [self.bos_token, self.eos_token]:
            raise InputError(f"tokenizer does not wrap a text in {BOS} and {EOS}")

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """b texts -> (b, l) tokens and mask, l the longest of the batch."""
        return padded([self.encode(text) for text in checked(texts)], self.pad_token)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, at most `max_length`; warns on the first text that has to be cut."""
        encoding = self.backend.encode(text)
        if len(encoding.ids) <= self.max_length:
            return encoding.ids
        if not self.warned:
            self.warned = True
            kept = encoding.offsets[self.max_length - 2][1]  # where the last token but </s> ends
            warnings.warn(
                f"text of {len(encoding.ids)} tokens cut to {self.max_length}, losing {text[kept:]!r} "
                "(further cuts are not reported)",
                stacklevel=3,
            )
        return [*encoding.ids[: self.max_length - 1], self.eos_token]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `tokenizer.json`, `max_length` included, which `load_tokenizer` reads back."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = copy.deepcopy(self.backend)
        backend.enable_truncation(self.max_length)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(backend.to_str(pretty=True), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def checked(texts: Sequence[str]) -> Sequence[str]:
    """The texts themselves; InputError for a bare string, which is a sequence of letters, and for none."""
    if isinstance(texts, str) or not texts:
        raise InputError(f"texts={texts!r}: expected a list of at least one string")
    return texts


def padded(rows: Sequence[list[int]], pad_token: int) -> tuple[Tensor, Tensor]:
    """b rows of tokens -> (b, l) tokens and mask, l the longest of them."""
    longest = max(map(len, rows))
    text_tokens = torch.full((len(rows), longest), pad_token)
    text_mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        text_tokens[i, : len(row)] = torch.tensor(row)
        text_mask[i, : len(row)] = True
    return text_tokens, text_mask


def train_bpe(captions: Iterable[str], *, vocab_size: int, max_length: int) -> Tokenizer:
    """Learn a byte-level BPE of at most `vocab_size` tokens from captions.

    Deterministic: neither the order of the captions nor the number of threads matters. The four specials
    come first, then the 256 bytes, so that any text can be written; few captions give fewer tokens.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    smallest = NUM_BYTES + len(SPECIALS)
    if vocab_size < smallest:
        raise InputError(f"vocab_size={vocab_size}: expected {smallest} or more (256 bytes and 4 specials)")
    captions = list(captions)
    if not captions:
        raise InputError("no captions to train a tokenizer on")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    wrap(backend)
    return Tokenizer(backend, max_length=max_length)


def load_tokenizer(path: str | os.PathLike[str], *, max_length: int | None = None) -> Tokenizer:
    """Read a tokenizer from a `tokenizer.json`, from a folder, or from beside any other file.

    A folder (or its subfolder `tokenizer`, as in diffusers' pipelines), or the folder of a file such as
    `clap.safetensors`, must hold `tokenizer.json`, or `vocab.json` and `merges.txt`; a `.json` file (but
    `vocab.json` and a system's `system.json`) is read itself. The limit is `max_length` if given, else what
    the file states, else what `tokenizer_config.json` beside it states, else 512. Raises InputError, naming
    the file, where there is no tokenizer or one without RoBERTa's special tokens.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if path.suffix == ".json" and path.name not in ("vocab.json", "system.json"):
        source = path
    elif (folder / "tokenizer.json").exists():
        source = folder / "tokenizer.json"
    else:
        source = folder / "vocab.json"
        if not (source.exists() and (folder / "merges.txt").exists()):
            raise InputError(f"{folder}: holds neither tokenizer.json nor vocab.json with merges.txt")
    backend = read_vocabulary(folder) if source.name == "vocab.json" else read_backend(source)
    try:
        limit = stated_limit(backend, folder) if max_length is None else max_length
        return Tokenizer(backend, max_length=limit)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def read_backend(path: Path) -> "Backend":
    """A `tokenizer.json`."""
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise InputError(f"{path}: not a tokenizer.json ({error})") from error


def read_vocabulary(folder: Path) -> "Backend":
    """`vocab.json` and `merges.txt`, as RoBERTa was published."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the package raises nothing narrower
        raise InputError(f"{folder / 'vocab.json'}: not a vocabulary with merges.txt ({error})") from error
    backend = Backend(model)
    missing = [token for token in SPECIALS if backend.token_to_id(token) is None]
    if missing:
        raise InputError(f"{folder / 'vocab.json'}: lacks the special tokens {' '.join(missing)}")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [token for token in (*SPECIALS, MASK) if backend.token_to_id(token) is not None]
    )
    wrap(backend)
    return backend


def wrap(backend: "Backend") -> None:
    """Make the backend put `<s>` before and `</s>` after a text."""
    from tokenizers import processors

    bos, eos = backend.token_to_id(BOS), backend.token_to_id(EOS)
    backend.post_processor = processors.RobertaProcessing((EOS, eos), (BOS, bos), add_prefix_space=False)


def stated_limit(backend: "Backend", folder: Path) -> int:
    """The length limit in the tokenizer's own file or in `tokenizer_config.json`, else RoBERTa's."""
    if backend.truncation is not None:
        return backend.truncation["max_length"]
    config = folder / "tokenizer_config.json"
    if not config.exists():
        return ROBERTA_MAX_LENGTH
    try:
        limit = json.loads(config.read_text(encoding="utf-8")).get("model_max_length")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config}: not a JSON object ({error})") from error
    # transformers writes an absurdly large number for "no limit".
    return limit if isinstance(limit, int) and limit < 1_000_000 else ROBERTA_MAX_LENGTH
