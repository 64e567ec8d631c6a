"""The models whose cost was measured, as families: who was made from whom, and who is dominated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recflow.core.errors import ConfigError
from recflow.core.measurement import Measurement
from recflow.evaluation.evaluator import BOARDS, Board, Estimate, Evaluation, Paired
from recflow.evaluation.frontier import Frontier, Replacement, frontier
from recflow.evaluation.metrics import METRICS
from recflow.evaluation.report.context import FamilyMember


@dataclass(frozen=True, slots=True)
class Relative:
    """A member in its family.

    Attributes:
        member: The model.
        depth: Steps from the model that its family descends from.
        root: That model; its own name at depth 0.
    """

    member: FamilyMember
    depth: int
    root: str


@dataclass(frozen=True, slots=True)
class Group:
    """The models of one board that are compared in accuracy and cost.

    Attributes:
        board: The board.
        relatives: The models, each followed by its descendants.
        frontier: Which of them are dominated.
    """

    board: Board
    relatives: tuple[Relative, ...]
    frontier: Frontier

    @property
    def is_family(self) -> bool:
        """Whether any model was made from another one."""
        return any(relative.depth for relative in self.relatives)


def groups_of(
    evaluation: Evaluation, costs: Mapping[str, Measurement], family: Sequence[FamilyMember]
) -> list[Group]:
    """Put the models of each board in order and find the dominated ones.

    Args:
        evaluation: The results.
        costs: What the models cost, by name; those without a family are shown beside the others.
        family: The models made from each other; where there are none, the parents that the
            evaluation knows.

    Raises:
        ConfigError: A member is named twice, is no scorer, or descends from nobody: its parent is
            no member of its board, or parents go in a circle.
    """
    members = list(family) or _from_parents(evaluation)
    boards = {result.name: result.board for result in evaluation.scorers}
    for number, member in enumerate(members):
        if member.name not in boards:
            raise ConfigError.of("family member", member.name, f"one of {', '.join(boards)}")
        if any(member.name == other.name for other in members[:number]):
            raise ConfigError.of("family member", member.name, "every model once")
    known = {member.name for member in members}
    members += [FamilyMember(name) for name in costs if name not in known]
    groups: list[Group] = []
    for board in BOARDS:
        on_board = [member for member in members if boards[member.name] == board]
        if on_board:
            ordered = _ordered(on_board)
            names = [relative.member.name for relative in ordered]
            found = frontier(names, costs, lambda a, b: paired(evaluation, a, b))
            groups.append(Group(board, tuple(ordered), found))
    return groups


def paired(evaluation: Evaluation, one: str, other: str) -> Paired:
    """What one model gains over another; without intervals where they were not resampled."""
    known = evaluation.pairs.get((one, other))
    if known is not None:
        return known
    primary = evaluation.config.primary_metric
    base = evaluation[other].metrics[primary].value
    difference = evaluation[one].metrics[primary].value - base
    return Paired(Estimate(difference), Estimate(difference / base if base else float("nan")))


def reason(found: Replacement, metric: str) -> str:
    """Why a model can replace another one, as part of a sentence."""
    difference = found.gain.difference
    words = "distinguishably better" if found.more_accurate else "not distinguishably worse"
    if not found.more_accurate and difference.value >= 0:
        words = "no worse"
    numbers = _signed(difference.value)
    if difference.low is not None and difference.high is not None:
        numbers += f", {_signed(difference.low)} to {_signed(difference.high)}"
    costs = [f"{name} {ratio:.2f}×" for name, ratio in found.ratios.items()]
    return f"its {METRICS[metric].label} is {words} ({numbers}); {', '.join(costs)}"


def _from_parents(evaluation: Evaluation) -> list[FamilyMember]:
    parents = {r.name: r.parent.other for r in evaluation.scorers if r.parent is not None}
    return [
        FamilyMember(result.name, parents.get(result.name))
        for result in evaluation.scorers
        if result.name in parents or result.name in parents.values()
    ]


def _ordered(members: Sequence[FamilyMember]) -> list[Relative]:
    """Each member followed by its children, in the order given."""
    ordered: list[Relative] = []

    def add(member: FamilyMember, depth: int, root: str) -> None:
        ordered.append(Relative(member, depth, root))
        for child in members:
            if child.parent == member.name:
                add(child, depth + 1, root)

    for member in members:
        if member.parent is None:
            add(member, 0, member.name)
    reached = {relative.member.name for relative in ordered}
    for member in members:
        if member.name not in reached:
            raise ConfigError.of(
                f"parent of {member.name!r}",
                member.parent,
                "a member of the family on the same board, and no descendant",
            )
    return ordered


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")
