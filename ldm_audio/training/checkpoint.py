"""Training state on disk: written to a temporary name, then renamed, so that the last one is always whole.

`last.pt` holds everything, or, where networks are split over ranks, everything but the tensors. These then
lie in a folder beside it that `torch.distributed.checkpoint` writes, one file a rank, and `last.pt` names
that folder only after it is complete. Either kind loads in any number of processes.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_audio.distributed import barrier, is_main, is_split, split_as, world_size
from ldm_audio.errors import InputError, RunError
from ldm_audio.files import replacing

FORMAT = "ldm_audio.checkpoint/2"
SHARDS = "tensors_at_step_{step:07d}"


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes `state` (tensors and plain values) so that `path` is either the old one or the new one."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # of torch's zip writer, which covers the system's own
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def save_sharded(path: Path, state: dict, tensors: dict) -> None:
    """The same for tensors that are split over ranks; every rank calls it. `state` holds the step."""
    import torch.distributed.checkpoint as dcp  # a second of imports, as in `load_shards`

    folder = path.parent / SHARDS.format(step=state["step"])
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)  # what a run that was killed here left
        folder.mkdir(parents=True)
    barrier()
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except dcp.CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        raise RunError(f"{folder}: not written ({reason})") from error
    if is_main():
        save_checkpoint(path, state | {"tensors": folder.name})
        for other in path.parent.glob(SHARDS.partition("{")[0] + "*"):
            if other != folder:
                shutil.rmtree(other)
    barrier()


def load_checkpoint(path: Path, like: Mapping[str, Tensor] | None = None) -> dict:
    """Reads what was saved, tensors and plain values only; InputError if it is not readable.

    like: this process's tensors by name. Where one of them is split over ranks, what is stored under its
    name comes back split in the same way, and every rank must call.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "tensors" in state:
            state |= load_shards(path.parent / state["tensors"], like or {})
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a readable checkpoint ({reason}); remove it to start afresh"
        ) from error
    return state


def load_shards(folder: Path, like: Mapping[str, Tensor]) -> dict:
    """The nested dict of tensors that `save_sharded` was given."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata()
    tensors: dict[str, Any] = {}
    for key, place in metadata.planner_data.items():
        stored = metadata.state_dict_metadata[key]
        own = next((like[name] for name in place if name in like), None)
        *above, last = place
        node = tensors
        for name in above:
            node = node.setdefault(name, {})
        if own is not None and is_split(own) and own.shape == stored.size:
            node[last] = torch.empty_like(own, dtype=stored.properties.dtype)
        else:
            node[last] = torch.empty(stored.size, dtype=stored.properties.dtype)
    alone = world_size() == 1 or not any(is_split(tensor) for tensor in like.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=alone)
        except dcp.CheckpointException as error:  # which is no Exception
            raise RuntimeError(str(error)) from error
    return tensors


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict:
    """What an optimiser remembers of each parameter, by the parameter's name."""
    return {
        names[parameter]: {key: value for key, value in memory.items() if isinstance(value, Tensor)}
        for parameter, memory in optimizer.state.items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], state: dict
) -> None:
    """Inverse of `optimizer_state`, whole tensors being split as their parameter is."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            memory = state.get(names[parameter], {})
            optimizer.state[parameter] = {
                key: split_as(value, parameter) if value.shape == parameter.shape else value
                for key, value in memory.items()
            }
            for key, value in optimizer.state[parameter].items():
                if key != "step":  # which stays where the optimiser made it
                    optimizer.state[parameter][key] = value.to(parameter.device)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Inverse of `rng_state`, as far as both know the device."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
