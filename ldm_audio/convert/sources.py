"""What lies at a path: opens every kind of foreign weights, from this machine or from the Hugging Face hub.

hf://owner/name  hf://owner/name@revision  hf://owner/name/folder/file.pt
"""

import re
from pathlib import Path

from ldm_audio.convert.folders import choose_heads, open_network, open_pipeline
from ldm_audio.convert.originals import open_original
from ldm_audio.convert.parts import Source
from ldm_audio.convert.pickles import read_pickle
from ldm_audio.convert.stored import open_safetensors
from ldm_audio.errors import InputError

HUB = re.compile(r"hf://(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>[\w./-]+))?")
HUB_SECONDS = 5.0  # to wait for the hub's answer
SETTINGS = ("*.json", "*.txt")
# Of a repository's weights, which may be there several times, the first (pattern, but not) that there is.
WEIGHTS = (("*.safetensors", "*.fp16.*"), ("*.bin", "*.fp16.*"), ("*.safetensors", ""), ("*.bin", ""))
HEADS = ("config", "original")


def open_source(path: str | Path, *, ema: bool = True, heads: str = "config") -> Source:
    """The foreign weights at `path`: a folder of diffusers or transformers, or an original's file.

    ema: an original diffusion checkpoint's averaged weights; False takes the raw ones.
    heads: a diffusers UNet's numbers of heads, `config` as its folder says or `original` as the original had.

    Raises:
        InputError: nothing there, nothing that is known, or something that does not fit together.
    """
    if heads not in HEADS:
        raise InputError(f"heads={heads}: expected {' or '.join(HEADS)}")
    path = Path(path)
    source = open_folder(path) if path.is_dir() else open_file(path, ema=ema)
    if path.is_dir() and "unet" in source.parts:
        choose_heads(source, heads)
    dtypes = {str(dtype) for part in source.parts.values() for dtype in part.tensors.dtypes}
    if others := sorted(dtype.removeprefix("torch.") for dtype in dtypes - {"torch.float32"}):
        source.cautions.append(f"{path}: holds {' and '.join(others)} weights, taken as float32")
    return source


def open_folder(path: Path) -> Source:
    if (path / "model_index.json").is_file():
        return open_pipeline(path)
    if (path / "config.json").is_file():
        return open_network(path)
    raise InputError(f"{path}: holds neither system.json, model_index.json nor config.json")


def open_file(path: Path, *, ema: bool) -> Source:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    content = open_safetensors(path)[1] if path.suffix == ".safetensors" else read_pickle(path)
    return open_original(path, content, ema=ema)


def local(path: str | Path, *, settings_only: bool = False) -> Path:
    """`path` itself, or where an `hf://` one lies after it was downloaded (once; then without a network).

    settings_only: leaves the weights behind, for a tokenizer.

    Raises:
        InputError: no such repository or file, or no network and no earlier download.
    """
    if not str(path).startswith("hf://"):
        return Path(path)
    found = HUB.fullmatch(str(path))
    if not found:
        raise InputError(
            f"{path}: expected hf://owner/name, hf://owner/name@revision or hf://owner/name/file"
        )
    repo, revision, file = found["repo"], found["revision"], found["file"]
    try:
        folder = download(repo, revision, file, settings_only=settings_only)
    except Exception as error:  # the hub's client raises what several packages do
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: not on this machine and the hub did not give it ({reason}); check name and network, or "
            "copy the files here and give their folder"
        ) from error
    if file and not (folder / file).is_file():
        raise InputError(f"{path}: the repository holds no such file")
    return folder / file if file else folder


def download(repo: str, revision: str | None, file: str | None, *, settings_only: bool) -> Path:
    """The folder of a repository, with one file of it, or with its settings and one copy of its weights."""
    from huggingface_hub import snapshot_download

    def fetch(*taken: str, left: str = "") -> Path:
        # Also for one file: the call that is made for that asks a dead network six times.
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(taken),
                ignore_patterns=left or None,
                etag_timeout=HUB_SECONDS,
            )
        )

    if file:
        return fetch(file)
    folder = fetch(*SETTINGS)
    for taken, left in () if settings_only else WEIGHTS:
        folder = fetch(taken, left=left)
        if any(folder.rglob(taken)):
            break
    return folder
