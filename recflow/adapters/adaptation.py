"""The adapted encoder as an artifact: made from the texts of a snapshot, no label looked at."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import cast

import polars as pl

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import ADAPTED_ENCODER, ITEMS, TRAIN
from recflow.adapters.models import weights_hash
from recflow.adapters.planning import PlanningConfig
from recflow.adapters.snapshots import Snapshot, load_snapshot
from recflow.adapters.step_plans import require_adaptation
from recflow.core.artifacts import Artifact, Draft, JsonValue
from recflow.core.columns import Columns
from recflow.modeling.adaptation import adapt_encoder
from recflow.modeling.adaptation_config import AdaptationConfig
from recflow.modeling.tracking import Tracker


def build_adapted_encoder(
    store: ArtifactStore,
    snapshot: str,
    *,
    base_model: Path,
    config: AdaptationConfig,
    tracker: Tracker,
    code_version: str,
    planning: PlanningConfig | None = None,
    rebuild: bool = False,
) -> Artifact:
    """Adapt the pretrained encoder to the texts of a snapshot and store it.

    The artifact's folder is a base model: whatever trains from ``base_model`` can train from it.

    Args:
        store: Where the snapshot is.
        snapshot: Partition of the snapshot.
        base_model: Hugging Face directory of the pretrained encoder.
        config: How to adapt.
        tracker: Told the configuration and the losses.
        code_version: Version of the adapting code.
        planning: What it is planned with, and what follows where memory is short.
        rebuild: Adapt again what was adapted.

    Raises:
        ArtifactError: The pretrained encoder or the snapshot is missing or not whole.
        ConfigError: The configuration does not fit the encoder.
        ContractError: The snapshot has too few texts.
        HardwareError: It needs more memory than there is; nothing was begun.
    """
    data = load_snapshot(store, snapshot)

    def build(draft: Draft) -> None:
        planned = require_adaptation(
            data, base_model=base_model, config=config, planning=planning or PlanningConfig()
        )
        report = adapt_encoder(
            texts=known_texts(data),
            base_model=base_model,
            output=draft.path,
            config=config,
            tracker=tracker,
        )
        draft.facts |= cast("dict[str, JsonValue]", asdict(report))
        if planned is not None:
            draft.facts |= planned.facts()

    return store.build(
        ADAPTED_ENCODER,
        snapshot,
        build,
        code_version=code_version,
        parents={key: data.artifacts[key] for key in (ITEMS, TRAIN)},
        config={**asdict(config), "base_model_sha256": weights_hash(base_model)},
        rebuild=rebuild,
    )


def known_texts(data: Snapshot) -> list[str]:
    """Texts of the items that were shown or clicked until train ends, by item id.

    Items that first appear in validation or test are left out: a model of that day could not have
    read them.
    """
    train = data.splits.train
    seen = pl.concat([train[column].explode() for column in (Columns.CANDIDATES, Columns.HISTORY)])
    ids = seen.rename(Columns.ITEM_ID).drop_nulls().unique().to_frame()
    known = data.items.join(ids, on=Columns.ITEM_ID, how="semi")
    return known.sort(Columns.ITEM_ID)[Columns.TEXT].to_list()
