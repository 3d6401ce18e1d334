"""What a foreign source comes down to: its networks, each with config, table and tensors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_audio.convert.rules import Rule, iter_rules
from ldm_audio.convert.stored import Tensors
from ldm_audio.errors import InputError

UNET = "ldm_audio.models.unet.UNet"
VAE = "ldm_audio.models.vae.VAE"
VOCODER = "ldm_audio.models.hifigan.HiFiGAN"

MEL_16K = {
    "sample_rate": 16000, "n_fft": 1024, "hop_length": 160, "win_length": 1024, "n_mels": 64,
    "fmin": 0, "fmax": 8000, "framing": "hifigan",
}  # fmt: skip
MEL_48K = {
    "sample_rate": 48000, "n_fft": 2048, "hop_length": 480, "win_length": 2048, "n_mels": 256,
    "fmin": 20, "fmax": 24000, "framing": "hifigan",
}  # fmt: skip
SCHEDULE = {
    "num_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "kind": "scaled_linear",
    "prediction": "eps",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A network: `recipe` builds it, `rules` turn `tensors` into its state; `origin` names it in messages."""

    recipe: dict[str, Any]
    rules: Sequence[Rule]
    tensors: Tensors
    origin: str

    def convert(self, expected: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the network's state one by one; `expected` is that state on the meta device.

        Floating-point numbers take the dtype expected. InputError where anything does not fit.
        """
        shapes = {name: tensor.shape for name, tensor in expected.items()}
        for name, tensor in iter_rules(self.rules, self.tensors, shapes, origin=self.origin):
            wanted = expected[name].dtype
            if tensor.is_floating_point() != wanted.is_floating_point:
                raise InputError(f"{self.origin}: {name} would be of {tensor.dtype}, expected {wanted}")
            yield name, tensor.to(wanted)

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """InputError unless the whole conversion fits; reads no numbers."""
        for _ in replace(self, tensors=self.tensors.on_meta()).convert(expected):
            pass


@dataclass(frozen=True)
class Source:
    """What was found at a path.

    parts: by the name that the network has in a system (`unet`, `vae`, `vocoder`, `clap`), or, for a part of
        one that only starts a training, with a dot (`clap.audio_tower`).
    system: `mel`, `schedule`, `latent_scale` and `family` where the parts make a text-to-audio system.
    tokenizer: the file or folder with the vocabulary that the text tower was trained with, if it lies there.
    notes: what was taken where there was a choice. cautions: what the user should know, told at every load.
    """

    kind: str
    parts: dict[str, Part]
    system: dict[str, Any] | None = None
    tokenizer: Path | None = None
    notes: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)


@contextmanager
def located(origin: object) -> Iterator[None]:
    """Errors inside become InputErrors that name `origin`: sizes are read off whatever a file holds."""
    try:
        yield
    except InputError as error:
        message = str(error)
        raise InputError(message if str(origin) in message else f"{origin}: {message}") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, StopIteration) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{origin}: its sizes make no sense ({reason})") from error


def mel_settings(*, n_mels: int, hop_length: int, sample_rate: int | None = None) -> dict[str, Any]:
    """The mel front end of a released vocoder; others get that of 16 kHz with what is known of them."""
    if n_mels == MEL_48K["n_mels"]:
        return dict(MEL_48K)
    rate = sample_rate or MEL_16K["sample_rate"]
    return MEL_16K | {"n_mels": n_mels, "hop_length": hop_length, "sample_rate": rate, "fmax": rate // 2}
