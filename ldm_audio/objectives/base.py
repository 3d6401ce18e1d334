"""What a trainer asks of an objective: who learns, and who minimises what, in which order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_audio.errors import InputError
from ldm_audio.randomness import RowRandom

Logs = dict[str, Tensor]
Turn = tuple[str, Tensor, Logs]


@dataclass(frozen=True)
class Preview:
    """One thing to look at and listen to: a log-mel (f, n) and, where there is one, its waveform (s,)."""

    mel: Tensor
    waveform: Tensor | None = None
    sample_rate: int = 0


class Objective(nn.Module):
    """Owns its networks and yields losses; the trainer does everything else.

    `losses` is a generator: it yields `(player, loss, logs)` in the order of the paper's algorithm, and the
    trainer steps that player's optimiser before asking for the next one. It never yields inside a `with`,
    because a context opened in a generator stays open in its caller.
    """

    accumulable = False
    """Whether the mean of the losses of two half batches is the loss of the whole batch."""

    strategies: tuple[str, ...] = ()
    """How several processes may train it: those in which n have the losses of one with the n-fold batch."""

    retains_graph = False
    """Whether a loss takes a gradient of its own before it is yielded."""

    monitor = "val/loss"
    """The validation metric that picks the best checkpoint; smaller is better."""

    frozen: tuple[str, ...] = ()
    """Names of the parts that do not learn; they stay in eval mode and out of checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped: dict[nn.Module, nn.Module] = {}
        """Networks that several processes train, each with the wrapper that averages its gradients."""

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network as its own player's turn calls it: its wrapper where there is one."""
        return self.wrapped.get(network, network)

    def players(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by player; every parameter that learns belongs to exactly one player."""
        raise NotImplementedError

    def losses(self, batch: dict, step: int) -> Iterator[Turn]:
        """Yields (player, scalar loss, named scalars to log)."""
        raise NotImplementedError

    def networks(self) -> dict[str, nn.Module]:
        """The networks that learn and are kept, by name (a discriminator is not)."""
        raise NotImplementedError

    def weights(self) -> dict[str, nn.Module]:
        """What a checkpoint writes as weights files: the networks in the form in which they are used."""
        return self.networks()

    def averaged(self) -> dict[str, nn.Module]:
        """The networks whose exponential moving average is kept, validated and written."""
        return {}

    def prepare(self, batches: Iterable[dict]) -> None:
        """Called once, before the first step of a fresh run, with the first training batches."""

    def start_from(self, networks: dict[str, nn.Module], *, latent_scale: float | None) -> None:
        """Begins with the weights of trained networks, named as here: `unet`, `clap.audio_tower`.

        latent_scale: what the latents of that system are multiplied by, where it is one.
        """
        for name, network in networks.items():
            self.get_submodule(name).load_state_dict(network.state_dict())

    def validate(self, batch: dict) -> Logs:
        """Scalars of one validation batch, under `no_grad`, in eval mode, with the averaged weights."""
        return {}

    def preview(self, batch: dict) -> dict[str, Preview]:
        """A few things to look at, from one validation batch."""
        return {}

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        for name in self.frozen:
            part = getattr(self, name)
            if part is not None:
                part.eval()
        return self

    def freeze_parts(self, *, allow_random: bool) -> None:
        """Freezes the parts named in `frozen`; InputError for one that has no trained weights."""
        for name in self.frozen:
            part = getattr(self, name)
            if part is None:
                continue
            if not allow_random and getattr(part, "provenance", None) is None:
                raise InputError(
                    f"{name} is frozen here but has no weights: give {name}=file "
                    f"{name}.path=FILE.safetensors, or allow_random_frozen=true"
                )
            part.requires_grad_(False).eval()

    def learned_state(self) -> dict[str, Tensor]:
        """The state dict without the frozen parts: what a checkpoint keeps."""
        prefixes = tuple(f"{name}." for name in self.frozen)
        return {k: v for k, v in self.state_dict().items() if not k.startswith(prefixes)}

    def load_learned_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `learned_state`, strict about what it covers."""
        expected = self.learned_state().keys()
        if state.keys() != expected:
            odd = sorted(state.keys() ^ expected)
            raise InputError(
                f"the checkpoint does not fit this objective: {len(odd)} keys differ, first {odd[0]}"
            )
        self.load_state_dict(state, strict=False)


def check_players(objective: Objective) -> None:
    """AssertionError unless players() covers every parameter that requires a gradient exactly once."""
    owned = [id(p) for parameters in objective.players().values() for p in parameters]
    learning = {id(p) for p in objective.parameters() if p.requires_grad}
    assert len(owned) == len(set(owned)), "a parameter belongs to two players"
    assert learning == set(owned), (
        f"{len(learning ^ set(owned))} parameters are owned by no player or are frozen"
    )


def random_segments(waveform: Tensor, num_samples: int, rows: RowRandom) -> Tensor:
    """(b, s) -> (b, num_samples), each row cut at a random place of its own; shorter ones stay whole."""
    room = waveform.shape[-1] - num_samples
    if room <= 0:
        return waveform
    starts = rows.randint(room + 1).tolist()
    return torch.stack([row[start : start + num_samples] for row, start in zip(waveform, starts)])


def to_device(batch: dict, device: torch.device) -> dict:
    """Moves the tensors of a batch; captions and other lists stay."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
