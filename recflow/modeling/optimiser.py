"""One optimiser step as every training here takes it, and a repeatable torch."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from recflow.core.errors import PermanentError
from recflow.core.seeding import derive_seed
from recflow.modeling.encoder import torch_threads

_LAST_RATE = 0.05  # share of the peak learning rate that the last step still has


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Weights that share a peak learning rate; those that do not learn are skipped."""

    parameters: Iterable[nn.Parameter]
    learning_rate: float


class Optimiser:
    """AdamW with warm-up, linear decay, gradient clipping, and a check for lost numbers.

    The learning rate is a function of the number of steps taken, so that a resumed run needs
    nothing but that number and the state of AdamW.

    Attributes:
        adamw: The optimiser inside; its state belongs to a checkpoint.
        steps_taken: Steps so far.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        steps: int,
        warmup_share: float,
        weight_decay: float,
        gradient_clip: float,
        steps_taken: int = 0,
    ) -> None:
        """Prepare.

        Args:
            groups: What learns, and how fast.
            steps: Steps until the learning rate has decayed.
            warmup_share: Share of the steps in which it rises.
            weight_decay: Decoupled weight decay of matrices; vectors are not decayed.
            gradient_clip: Largest norm of the gradient.
            steps_taken: Steps that were taken before, by a run that is resumed.
        """
        self._peaks: list[float] = []
        arguments: list[dict[str, object]] = []
        for group in groups:
            learning = [p for p in group.parameters if p.requires_grad]
            for parameters, decay in (
                ([p for p in learning if p.ndim > 1], weight_decay),
                ([p for p in learning if p.ndim <= 1], 0.0),
            ):
                if parameters:
                    arguments.append({"params": parameters, "weight_decay": decay})
                    self._peaks.append(group.learning_rate)
        # One pass over weights, gradients and moments instead of a dozen, and no copies between.
        self.adamw = torch.optim.AdamW(arguments, fused=True)
        self._parameters = [p for group in self.adamw.param_groups for p in group["params"]]
        self._steps, self._warmup = steps, max(1, round(steps * warmup_share))
        self._clip = gradient_clip
        self.steps_taken = steps_taken

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first group at the next step."""
        return self._peaks[0] * self._share_of_peak()

    def clear(self) -> None:
        """Forget the gradients of the last step."""
        self.adamw.zero_grad(set_to_none=True)

    def apply(self, loss: float, where: str) -> None:
        """Take one step along the gradients that were added up.

        Args:
            loss: Loss of the step, all processes' parts together.
            where: Names the batch, for the error message.

        Raises:
            PermanentError: The loss or the gradient is not finite; the weights are unchanged.
        """
        norm = _plain(nn.utils.clip_grad_norm_(self._parameters, self._clip)).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise PermanentError(
                f"loss {loss} with gradient norm {norm} at {where}; lower the learning rate or "
                "look at the texts of these impressions"
            )
        share = self._share_of_peak()
        for group, peak in zip(self.adamw.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        self.adamw.step()
        self.steps_taken += 1

    def step(self, loss: Tensor, where: str) -> float:
        """Take one step along the gradient of ``loss`` and return its value.

        Raises:
            PermanentError: The loss or the gradient is not finite; the weights are unchanged.
        """
        value = loss.item()
        self.clear()
        loss.backward()
        self.apply(value, where)
        return value

    def _share_of_peak(self) -> float:
        if self.steps_taken < self._warmup:
            return (self.steps_taken + 1) / self._warmup
        decayed = (self.steps_taken - self._warmup) / max(1, self._steps - self._warmup)
        return max(_LAST_RATE, 1 - decayed)


def _plain(norm: Tensor) -> Tensor:
    """The norm of all processes' gradients, where weights are spread over processes."""
    whole = getattr(norm, "full_tensor", None)
    return norm if whole is None else whole()


@contextmanager
def deterministic(seed: int, threads: int) -> Generator[None]:
    """Make torch repeatable inside the block, and leave its global state as it was."""
    before = torch.are_deterministic_algorithms_enabled()
    memory = cast("Any", torch.utils.deterministic)
    filled = memory.fill_uninitialized_memory
    with torch_threads(threads), torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "torch"))
        torch.use_deterministic_algorithms(True)
        # It would write to every new tensor once more, to show who reads what nobody has written.
        memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            memory.fill_uninitialized_memory = filled
