"""Learning with few labels: what adapting the encoder to the domain gains at each share of them.

Rankers are trained from the pretrained and from the adapted encoder on nested samples of the same
training impressions. All are judged on the same test impressions and the same resamples, so that
the difference between two rankers of one share is paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import polars as pl

from recflow.core.columns import Columns
from recflow.core.errors import ConfigError
from recflow.core.seeding import make_rng
from recflow.evaluation.evaluator import Estimate, EvaluationConfig, evaluate
from recflow.evaluation.scoring import Predictions, Snapshot

METRICS: Final = ("auc", "ndcg@10")

Start = Literal["pretrained", "adapted"]


@dataclass(frozen=True, slots=True)
class LabelShare:
    """What was reached with one share of the labels.

    Attributes:
        share: Share of the training impressions whose clicks were learnt from.
        impressions: How many these are.
        pretrained: Test metrics of the ranker trained from the pretrained encoder.
        adapted: The same from the adapted encoder.
        difference: Adapted less pretrained, with paired intervals.
    """

    share: float
    impressions: int
    pretrained: Mapping[str, Estimate]
    adapted: Mapping[str, Estimate]
    difference: Mapping[str, Estimate]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LabelShare:
        """Rebuild what ``dataclasses.asdict`` made."""
        return cls(
            share=float(values["share"]),
            impressions=int(values["impressions"]),
            pretrained=_estimates(values["pretrained"]),
            adapted=_estimates(values["adapted"]),
            difference=_estimates(values["difference"]),
        )


def scorer_name(start: Start, share: float) -> str:
    """Name of the ranker trained from an encoder with a share of the labels."""
    return f"{start}_{share:g}"


def nested_sample(impressions: pl.DataFrame, share: float, seed: int) -> pl.DataFrame:
    """Draw a share of the impressions, at least one; a smaller share is inside a larger one.

    Args:
        impressions: Table ``SPLIT_IMPRESSIONS`` in any order of rows.
        share: Above 0, at most 1.
        seed: Seed of the draw.

    Returns:
        The drawn rows in order of time, histories and all: clicks in a history are input here, as
        they are when the ranker is used.

    Raises:
        ConfigError: ``share`` is out of range.
    """
    if not 0 < share <= 1:
        raise ConfigError.of("share", share, "above 0 and at most 1")
    ordered = impressions.sort(Columns.TIME, Columns.IMPRESSION_ID, maintain_order=True)
    order = make_rng(seed, "label sample").permutation(ordered.height)
    return ordered[np.sort(order[: max(1, round(share * ordered.height))])]


def judge_label_efficiency(
    predictions: Sequence[Predictions],
    impressions: Mapping[float, int],
    snapshot: Snapshot,
    config: EvaluationConfig,
) -> tuple[LabelShare, ...]:
    """Compare adapted with pretrained at each share of the labels, smallest share first.

    Args:
        predictions: Of the rankers of every share, named by :func:`scorer_name`.
        impressions: Training impressions by share.
        snapshot: What was scored.
        config: How to judge; its references and parents are replaced.
    """
    shares = sorted(impressions)
    pairs = {
        share: (scorer_name("pretrained", share), scorer_name("adapted", share)) for share in shares
    }
    evaluation = evaluate(
        predictions,
        snapshot,
        replace(
            config,
            references={"content-only": pairs[shares[-1]][0]},
            parents={adapted: pretrained for pretrained, adapted in pairs.values()},
        ),
    )
    rows: list[LabelShare] = []
    for share, (pretrained, adapted) in pairs.items():
        comparison = evaluation[adapted].parent
        assert comparison is not None, "every adapted ranker has a pretrained one"
        rows.append(
            LabelShare(
                share=share,
                impressions=impressions[share],
                pretrained={name: evaluation[pretrained].metrics[name] for name in METRICS},
                adapted={name: evaluation[adapted].metrics[name] for name in METRICS},
                difference={name: comparison.differences[name] for name in METRICS},
            )
        )
    return tuple(rows)


def _estimates(values: Mapping[str, Mapping[str, float]]) -> dict[str, Estimate]:
    return {name: Estimate(**estimate) for name, estimate in values.items()}
