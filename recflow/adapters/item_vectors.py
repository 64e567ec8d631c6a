"""The item vectors of a snapshot's catalogue, in fewer bytes, as an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import ITEM_VECTORS
from recflow.adapters.models import open_models, without_test
from recflow.adapters.snapshots import load_snapshot
from recflow.compression.config import VectorStoreConfig
from recflow.compression.family import ROOT, Family
from recflow.compression.store_report import StoreMeasurementConfig, item_vectors_report
from recflow.compression.vector_store import ItemVectors as StoredVectors
from recflow.core.artifacts import Artifact, Draft, JsonValue
from recflow.core.columns import Columns
from recflow.core.errors import ConfigError
from recflow.evaluation.report import ItemVectors
from recflow.modeling.ranker import load_ranker


def build_vector_stores(
    store: ArtifactStore,
    snapshot: str,
    *,
    family: Family,
    stores: Sequence[VectorStoreConfig],
    code_version: str,
    rebuild: bool = False,
) -> Artifact:
    """Encode the catalogue with the fine-tuned model and store its vectors once for each codec.

    Codecs are fitted on the items of train. Each codec's vectors are a folder of the artifact, for
    serving; its facts say what each codec loses.

    Args:
        store: Where the snapshot and the fine-tuned model are.
        snapshot: Partition of the snapshot.
        family: The family whose root the model is.
        stores: How to store them, one a codec.
        code_version: Version of the storing code.
        rebuild: Store again what is stored.

    Raises:
        ArtifactError: The model is missing, altered, or was made from other splits.
        ConfigError: A codec occurs twice, or does not fit the vectors.
    """
    by_codec = {config.codec: config for config in stores}
    if not stores or len(by_codec) < len(stores):
        raise ConfigError.of("codecs", [c.codec for c in stores], "one or more, each once")
    data = load_snapshot(store, snapshot)
    root = open_models(store, snapshot, data, family, [ROOT])[ROOT]

    def build(draft: Draft) -> None:
        ranker = load_ranker(root.path, threads=stores[0].threads)

        def keep(codec: str, built: StoredVectors) -> None:
            if codec in by_codec:
                (draft.path / codec).mkdir()
                built.save(draft.path / codec)

        reports = item_vectors_report(
            ranker=ranker,
            vectors=ranker.encode(data.items[Columns.TEXT].to_list()),
            items=data.items,
            train=data.splits.train,
            validation=data.splits.validation,
            # The vectors as they are, beside them, show what is lost.
            stores={"float32": VectorStoreConfig(codec="float32"), **by_codec},
            config=StoreMeasurementConfig(seed=stores[0].seed),
            on_store=keep,
        )
        draft.facts |= {
            "items": data.items.height,
            "stores": {
                codec: cast("JsonValue", asdict(report)) for codec, report in reports.items()
            },
        }

    return store.build(
        ITEM_VECTORS,
        snapshot,
        build,
        code_version=code_version,
        parents={**without_test(data), root.manifest.key: root},
        config={"stores": [cast("JsonValue", asdict(config)) for config in stores]},
        rebuild=rebuild,
    )


def stored_codecs(artifact: Artifact) -> dict[str, Path]:
    """Folder of each codec's vectors, by codec."""
    stores = cast("Mapping[str, JsonValue]", artifact.facts["stores"])
    folders = {codec: artifact.path / codec for codec in stores}
    return {codec: folder for codec, folder in folders.items() if folder.is_dir()}


def reported_codecs(artifact: Artifact) -> list[ItemVectors]:
    """What the report shows of each codec."""
    stores = cast("Mapping[str, Mapping[str, float]]", artifact.facts["stores"])
    return [
        ItemVectors(
            codec=codec,
            bytes_per_item=facts["bytes_per_item"],
            mean_cosine=facts["mean_cosine"],
            recall_at_10=facts["recall_at_10"],
            recall_at_100=facts["recall_at_100"],
            validation_auc=facts["validation_auc"],
        )
        for codec, facts in stores.items()
    ]
