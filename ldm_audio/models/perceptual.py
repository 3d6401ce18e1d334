"""Distances between log-mel spectrograms that weigh structure and not single bins, for training the VAE.

`LPIPS` implements Zhang et al. 2018 (arXiv 1801.03924) on VGG16 features with their learned linear heads, and
must match the perceptual loss that AudioLDM's autoencoder was trained with: the un-normalised one-channel
log-mel, time before frequency, is broadcast to three channels by the scaling layer. It departs in that its
dropout is never active, and in a gradient of 0 instead of NaN where all features of a point are 0.

`MultiResolutionMel` is our own stand-in where those weights are not at hand.
"""

import pickle
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ldm_audio.errors import InputError

# torchvision's `vgg16().features`, slice by slice up to relu1_2, relu2_2, relu3_3, relu4_3, relu5_3; each
# slice but the first begins with a max pool.
SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SUFFIXES = (".safetensors", ".pt", ".pth")


class LPIPS(nn.Module):
    """Learned perceptual distance; frozen and always in eval mode.

    Args:
        path: the weights: one file, several, or a folder of them (safetensors, or pickles of tensors alone).
            Together they hold VGG16 under torchvision's names (`features.0.weight`, ...) and the linear heads
            (`lin0.model.1.weight`, ...); VGG16's classifier is ignored.

    Raises:
        InputError: a file is missing or unreadable, or tensors are missing, extra or of another shape.
    """

    def __init__(self, *, path: str | Path | Sequence[str | Path]):
        super().__init__()
        self.features = nn.Sequential()
        self.taps = []
        channels = 3
        for widths in SLICES:
            if self.taps:
                self.features.append(nn.MaxPool2d(2))
            for width in widths:
                self.features.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                self.features.append(nn.ReLU())
                channels = width
            self.taps.append(len(self.features) - 1)
        self.heads = nn.ModuleList(nn.Conv2d(widths[-1], 1, kernel_size=1, bias=False) for widths in SLICES)
        self._load(path)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in eval mode whatever is asked: a distance must not change with its surroundings."""
        return super().train(False)

    def forward(self, mel: Tensor, target: Tensor) -> Tensor:
        """(b, f, n) log-mel, (b, f, n) log-mel -> (b,) distance, 0 for equal inputs; f, n >= 16."""
        if min(mel.shape[1:]) < 16:
            raise InputError(f"LPIPS needs mels of at least 16 x 16, got {list(mel.shape[1:])}")
        distance = torch.zeros(len(mel), device=mel.device, dtype=mel.dtype)
        for head, ours, theirs in zip(self.heads, self._normed(mel), self._normed(target), strict=True):
            distance = distance + reduce(head((ours - theirs) ** 2), "b 1 n f -> b", "mean")
        return distance

    def _normed(self, mel: Tensor) -> list[Tensor]:
        """The five feature maps (b, c, n', f'), each point a unit vector."""
        shift, scale = scaling_layer(mel.device, mel.dtype)
        x = (rearrange(mel, "b f n -> b 1 n f") - shift) / scale  # (b, 3, n, f)
        maps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                # vector_norm's gradient at 0 is 0, that of sqrt(sum of squares) NaN.
                maps.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return maps

    def _load(self, path: str | Path | Sequence[str | Path]) -> None:
        files = weight_files(path)
        where = ", ".join(map(str, files))
        found: dict[str, Tensor] = {}
        for file in files:
            tensors = read_tensors(file)
            if twice := sorted(found.keys() & tensors.keys()):
                raise InputError(f"{where}: more than one of these files holds {twice[0]}")
            found |= tensors
        wanted = {name: name for name in self.state_dict() if name.startswith("features.")}
        wanted |= {f"heads.{i}.weight": f"lin{i}.model.1.weight" for i in range(len(SLICES))}
        odd = set(wanted.values()) ^ {name for name in found if not name.startswith("classifier.")}
        if odd:
            first = min(odd)
            state = "extra" if first in found else "missing"
            raise InputError(f"{where}: not LPIPS on VGG16, {len(odd)} names differ: {first} is {state}")
        for name, tensor in self.state_dict().items():
            given = found[wanted[name]]
            if given.shape != tensor.shape:
                raise InputError(
                    f"{where}: {wanted[name]} has shape {list(given.shape)}, expected {list(tensor.shape)}"
                )
        self.load_state_dict({name: found[theirs] for name, theirs in wanted.items()})


class MultiResolutionMel(nn.Module):
    """L1 of log-mels averaged over squares of several sizes, and of their differences in time and frequency.

    Args:
        scales: sides of the squares, in frames and bins; 1 compares the mels themselves.
    """

    def __init__(self, *, scales: Sequence[int]):
        super().__init__()
        self.scales = list(scales)

    def forward(self, mel: Tensor, target: Tensor) -> Tensor:
        """(b, f, n) log-mel, (b, f, n) log-mel -> (b,) distance, 0 for equal inputs, symmetric.

        Raises InputError if a scale exceeds a side of the mel. Edges that do not fill a square are left out.
        """
        if max(self.scales) > min(mel.shape[1:]):
            raise InputError(f"scale {max(self.scales)} exceeds a side of the mel, {list(mel.shape[1:])}")
        error = rearrange(mel - target, "b f n -> b 1 f n")  # averages and differences are linear
        distances = []
        for scale in self.scales:
            pooled = F.avg_pool2d(error, scale)
            distances += [mean_abs(pooled), mean_abs(pooled.diff(dim=2)), mean_abs(pooled.diff(dim=3))]
        return torch.stack(distances).sum(dim=0) / len(self.scales)


def mean_abs(x: Tensor) -> Tensor:
    """(b, 1, f, n) -> (b,); 0 where nothing is left to average, the differences of a single row."""
    return reduce(x.abs(), "b 1 f n -> b", "mean") if x.numel() else x.new_zeros(len(x))


@lru_cache
def scaling_layer(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(1, 3, 1, 1) shift and scale that take images in [-1, 1] to the statistics VGG16 was trained with."""
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        shift = torch.tensor([-0.030, -0.088, -0.188], device=device, dtype=dtype)
        scale = torch.tensor([0.458, 0.448, 0.450], device=device, dtype=dtype)
        return rearrange(shift, "c -> 1 c 1 1"), rearrange(scale, "c -> 1 c 1 1")


def weight_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `path` means: itself, its members, or the weights files in the folder it names."""
    files = []
    for one in map(Path, [path] if isinstance(path, str | Path) else path):
        inside = sorted(file for file in one.iterdir() if file.suffix in SUFFIXES) if one.is_dir() else [one]
        if not inside or not inside[0].is_file():
            raise InputError(f"{one}: no weights file ({', '.join(SUFFIXES)}) is there")
        files += inside
    return files


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle that holds tensors by name and nothing else."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise InputError(f"{file}: not a readable safetensors file ({error})") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        raise InputError(f"{file}: not a readable pickle of tensors ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{file}: expected tensors by name (a state dict)")
    return state
