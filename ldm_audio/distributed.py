"""Several processes under `torchrun` that train as one: what they share, and how networks are wrapped.

PyTorch's own engine: `DistributedDataParallel` (ddp) or `fully_shard` (fsdp2). Each rank takes its part of
every batch; gradients are averaged, so a loss must be a mean over the batch. With batch-norm statistics and
the pairs of a contrastive loss taken over all ranks, a step of n processes is the step of one process with
the n-fold batch. In one process everything here is the identity.

Axes: b batch, c channels, d width.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm_audio.errors import InputError

STRATEGIES = ("none", "ddp", "fsdp2")


@contextmanager
def process_group(strategy: str, device: str) -> Iterator[torch.device]:
    """Inside, the ranks that torchrun started know each other; yields the device of this one.

    InputError for an unknown strategy, for ddp and fsdp2 without torchrun, and for torchrun without them.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"trainer.strategy={strategy}: expected {', '.join(STRATEGIES)}")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if strategy == "none":
        if launched > 1:
            raise InputError(f"trainer.strategy=none in {launched} processes: expected ddp or fsdp2")
        yield torch.device(device)
        return
    if "LOCAL_RANK" not in os.environ:
        raise InputError(f"trainer.strategy={strategy}: start it by torchrun --nproc_per_node=N train.py ...")
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        with told_once():
            yield place
    except SystemExit:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()  # not after an error: the other ranks may never answer
    finally:
        # DDP keeps gloo's threads alive. One that lets go of the last collective's tensors while the
        # interpreter ends aborts the process; now it needs only to be scheduled
        time.sleep(0.5)


@contextmanager
def told_once() -> Iterator[None]:
    """Of an error that several ranks meet, or that ends the others' conversation, only the first passes.

    The other ranks say nothing and end with SystemExit(1), later: whom torchrun sees end, it ends all for.
    """
    try:
        yield
    except Exception:
        store = dist.distributed_c10d._get_default_store()  # the one place that all ranks still reach
        if store.add("ldm_audio/errors", 1) > 1:
            time.sleep(10)  # torchrun ends this process as soon as the one that tells has ended
            raise SystemExit(1) from None
        raise


def is_launched() -> bool:
    """Whether torchrun, which passes signals on and ends what does not end, started this process."""
    return dist.is_initialized()


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and talks."""
    return rank() == 0


def mean_over_ranks(values: Tensor) -> Tensor:
    """The average over ranks, without a gradient."""
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / world_size()


def max_over_ranks(value: float) -> float:
    """The largest of all ranks' values; every rank learns it."""
    if world_size() == 1:
        return value
    values = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return float(values)


def gather_objects(value: Any) -> list:
    """The value of every rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


class _Sum(torch.autograd.Function):
    """All-reduce; every rank's sum depends on every rank's term, so the gradients are summed too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class _Gather(torch.autograd.Function):
    """All-gather along the first axis; a row's gradient is the sum of what every rank makes of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks, differentiable."""
    return x if world_size() == 1 else _Sum.apply(x)


def gather_rows(x: Tensor) -> Tensor:
    """(b, ...) of each rank -> (ranks · b, ...) of all of them in order, differentiable."""
    return x if world_size() == 1 else _Gather.apply(x)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of the batches of all ranks, on any device.

    `nn.SyncBatchNorm` refuses the CPU. Means and squares are taken in float32 at least.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, y, x) -> same."""
        if not self.training or world_size() == 1:
            return self.forward_alone(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = (0, 2, 3)
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = sum_over_ranks(torch.cat([values.sum(axes), count]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()  # (c,), scalar
        centred = values - mean[:, None, None]
        variance = sum_over_ranks(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def forward_alone(self, x: Tensor) -> Tensor:
        """As `nn.BatchNorm2d`, with the gradient in the layout of the input.

        Where y or x is 1, torch's CPU kernel (2.14.1) mistakes a channels-last gradient of a contiguous
        input, or the reverse, and gives weight and bias a wrong one.
        """
        if 1 not in x.shape[2:]:
            return super().forward(x)
        normalised = super().forward(x.contiguous())
        if normalised.requires_grad:
            normalised.register_hook(Tensor.contiguous)
        return normalised


def replicate(network: nn.Module) -> DistributedDataParallel:
    """The network as training calls it under ddp: its gradients are averaged while they are made."""
    with warnings.catch_warnings():  # the argument that takes its place is newer than the oldest torch here
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(network: nn.Module) -> None:
    """Splits the network's parameters over ranks, in place: block by block, then what lies between them.

    Scalars cannot be split: they stay whole on every rank, and their gradients are averaged by a hook.
    """
    from torch.distributed.device_mesh import init_device_mesh  # a second of imports, which sampling saves
    from torch.distributed.fsdp import fully_shard

    scalars = {p for p in network.parameters() if p.ndim == 0}
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_post_accumulate_grad_hook(average_gradient)
    device = next(network.parameters()).device
    settings = {
        "mesh": init_device_mesh(device.type, (world_size(),)),
        "reshard_after_forward": True,  # the root too: validation swaps weights between two forwards
        "ignored_params": scalars,
    }
    for block in network.repeated_blocks():
        fully_shard(block, **settings)
    fully_shard(network, **settings)


def average_gradient(parameter: Tensor) -> None:
    """Replaces its gradient by the average over ranks."""
    parameter.grad = mean_over_ranks(parameter.grad)


def synchronise_gradients(networks: Iterable[nn.Module], enabled: bool) -> None:
    """Whether the next backward averages over ranks: only the last one of an accumulated step needs to."""
    for network in networks:
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = enabled
        if is_sharded([network]):
            network.set_requires_gradient_sync(enabled)


def is_sharded(networks: Iterable[nn.Module]) -> bool:
    """Whether a forward of one of them needs all ranks."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # `shard` imports it: nothing is sharded before
    return fsdp is not None and any(isinstance(network, fsdp.FSDPModule) for network in networks)


def is_split(tensor: Tensor) -> bool:
    """Whether each rank holds a part of it."""
    split = sys.modules.get("torch.distributed.tensor")  # no tensor is of a class that nobody imported
    return split is not None and isinstance(tensor, split.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of it that this rank holds, sharing its memory."""
    return tensor.to_local() if is_split(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank; every rank must ask."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def split_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split over ranks as `like` is."""
    if is_split(like) and not is_split(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients to a norm of at most `limit`; their norm before that, the same on every rank."""
    split = [p for p in parameters if is_split(p) and p.grad is not None]
    rest = [p for p in parameters if not is_split(p) and p.grad is not None]
    gradients = [[p.grad for p in group] for group in (split, rest) if group]
    norms = [whole(torch.nn.utils.get_total_norm(group)) for group in gradients]
    norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
    for group in (split, rest):
        torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def kinds(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters and whole ones apart, for an optimiser's fused step takes one kind at a time."""
    groups = [[p for p in parameters if is_split(p) == split] for split in (True, False)]
    return [group for group in groups if group]
