"""One optimiser step as every training here takes it, and a repeatable torch."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from recflow.core.errors import PermanentError
from recflow.core.seeding import derive_seed
from recflow.modeling.encoder import torch_threads

_LAST_RATE = 0.05  # share of the peak learning rate that the last step still has


class Optimiser:
    """AdamW with warm-up, linear decay, gradient clipping, and a check for lost numbers."""

    def __init__(
        self,
        groups: Iterable[tuple[Iterable[nn.Parameter], float]],
        *,
        steps: int,
        warmup_share: float,
        weight_decay: float,
        gradient_clip: float,
    ) -> None:
        """Prepare.

        Args:
            groups: Weights and their peak learning rate; weights that do not learn are skipped.
            steps: Steps until the learning rate has decayed.
            warmup_share: Share of the steps in which it rises.
            weight_decay: Decoupled weight decay of matrices; vectors are not decayed.
            gradient_clip: Largest norm of the gradient.
        """
        self._groups: list[dict[str, object]] = []
        self._parameters: list[nn.Parameter] = []
        for parameters, rate in groups:
            learning = [p for p in parameters if p.requires_grad]
            self._parameters += learning
            matrices = [p for p in learning if p.ndim > 1]
            vectors = [p for p in learning if p.ndim <= 1]
            self._groups.append({"params": matrices, "lr": rate, "weight_decay": weight_decay})
            self._groups.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
        self._adamw = torch.optim.AdamW(self._groups)
        warmup = max(1, round(steps * warmup_share))

        def rate_at(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return max(_LAST_RATE, 1 - (step - warmup) / max(1, steps - warmup))

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adamw, rate_at)
        self._clip = gradient_clip

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first group at the next step."""
        return float(self._schedule.get_last_lr()[0])

    def step(self, loss: Tensor, where: str) -> float:
        """Take one step and return the loss.

        Args:
            loss: Scalar with a gradient.
            where: Names the batch, for the error message.

        Raises:
            PermanentError: The loss or the gradient is not finite; the weights are unchanged.
        """
        value = loss.item()
        self._adamw.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._clip))
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise PermanentError(
                f"loss {value} with gradient norm {norm} at {where}; lower the learning rate or "
                "look at the texts of these impressions"
            )
        self._adamw.step()
        self._schedule.step()
        return value


@contextmanager
def deterministic(seed: int, threads: int) -> Generator[None]:
    """Make torch repeatable inside the block, and leave its global state as it was."""
    before = torch.are_deterministic_algorithms_enabled()
    with torch_threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "torch"))
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
