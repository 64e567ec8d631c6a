"""The processes that train together, and the little they tell each other.

A batch of a recommender is not a row of independent samples: clicks share items. So the processes
share the *items* of a batch – each encodes as many – exchange the vectors, and then score their own
clicks. No item is encoded twice, and the gradient of a vector is summed over all who used it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from recflow.core.errors import ConfigError


class Team(Protocol):
    """Processes that train one model.

    Attributes:
        rank: Number of this process; 0 reports and writes.
        size: How many there are.
    """

    rank: int
    size: int

    def barrier(self) -> None:
        """Wait for all."""
        ...

    def gather(self, own: Tensor) -> Tensor:
        """Every process' rows, process after process, with gradients; each gives as many."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the processes."""
        ...

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """Let gradients be averaged over the processes in each backward pass.

        Whoever uses the weights calls ``forward`` of the result, in which all that learn take part.
        """
        ...

    def spread(self, model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
        """Do the same, and spread weights, gradients and optimiser states over the processes.

        Args:
            model: Holds all weights.
            layers: Parts of it that are gathered one at a time when they are used.
        """
        ...


class Alone:
    """One process."""

    rank, size = 0, 1

    def barrier(self) -> None:
        """Wait for nobody."""

    def gather(self, own: Tensor) -> Tensor:
        """The rows themselves."""
        return own

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values themselves."""
        return list(values)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Leave the tensors as they are."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def spread(self, model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:  # noqa: ARG002
        """Refuse.

        Raises:
            ConfigError: There is nobody to spread the weights over.
        """
        raise ConfigError.of("shard_encoder", True, "false with one process")


class ProcessTeam:
    """The processes of a ``torchrun`` (gloo on processors, NCCL on GPUs)."""

    def __init__(self, device: torch.device) -> None:
        """Use the process group that :func:`joined_team` opened."""
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._device = device
        # Vectors travel in the middle of the backward pass, while gradients are on their way too:
        # in one group the two would have to come in the same order everywhere.
        self._vectors = distributed.new_group()

    def barrier(self) -> None:
        """Wait for all."""
        distributed.barrier()

    def gather(self, own: Tensor) -> Tensor:
        """Every process' rows, process after process, with gradients; each gives as many."""
        return cast("Tensor", _Gather.apply(own, self._vectors, self.rank, self.size))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the processes."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        distributed.all_reduce(total)
        return total.tolist()

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        with torch.no_grad():
            for tensor in tensors:
                distributed.all_reduce(tensor)
                tensor /= self.size

    def wrap(self, model: nn.Module) -> nn.Module:
        """Let gradients be averaged over the processes in each backward pass."""
        return DistributedDataParallel(model)

    def spread(self, model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
        """Do the same, and spread weights, gradients and optimiser states over the processes."""
        mesh = init_device_mesh(self._device.type, (self.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        return cast("nn.Module", fully_shard(model, mesh=mesh))


class _Gather(torch.autograd.Function):
    """All processes' rows; backward sums what each of them wants of a row."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any, rank: int, size: int) -> Tensor:
        ctx.group, ctx.rank, ctx.size = group, rank, size
        parts = [torch.empty_like(own) for _ in range(size)]
        distributed.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0].contiguous()
        distributed.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.size)[ctx.rank], None, None, None


@contextmanager
def joined_team(device: torch.device) -> Generator[Team]:
    """Join the processes that ``torchrun`` started; alone where it started none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "RANK" not in os.environ:
        yield Alone()
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield ProcessTeam(device)
    finally:
        distributed.destroy_process_group()


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Keep the gradients of a wrapped model to this process inside the block.

    For all but the last part of a batch: the last exchange then carries the sum.
    """
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    if isinstance(model, FSDPModule):
        return _fsdp_without_exchange(model)
    return nullcontext()


@contextmanager
def _fsdp_without_exchange(model: FSDPModule) -> Generator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def without_gradients(model: nn.Module, *task: Any) -> Any:
    """Call a wrapped model whose weights only give results, and put them back where they belong.

    FSDP leaves the outermost weights gathered until a backward pass, which does not come here; the
    optimiser would then be given copies.
    """
    with torch.no_grad():
        result = model(*task)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return result


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes, whole and on the CPU; all must ask for it.

    One that is whole on the CPU already is returned as it is, not copied.
    """
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def fill(target: Tensor, value: Tensor) -> None:
    """Set a tensor that may be spread over processes to a whole one."""
    with torch.no_grad():
        target.copy_(spread_like(target, value))


def spread_like(target: Tensor, value: Tensor) -> Tensor:
    """A whole tensor on the device of ``target`` and spread over processes as it is."""
    placed = value.to(target.device)
    if isinstance(target, DTensor):
        return distribute_tensor(placed, target.device_mesh, target.placements)
    return placed


def choose_device(name: str) -> torch.device:
    """The device of a configuration.

    Raises:
        ConfigError: It is not one that torch can use here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError.of("device", name, "auto, cpu, or a GPU that torch sees") from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device
