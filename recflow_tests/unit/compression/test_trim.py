import dataclasses
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tokenizers import Tokenizer, models

from recflow.compression.config import QuantizationConfig, TrimmingConfig
from recflow.compression.quantize import quantize_ranker
from recflow.compression.trim import (
    TrimmingReport,
    check_same_tokens,
    trim_encoder,
    trim_ranker,
)
from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError, ParityError
from recflow.modeling.batching import items_in_use
from recflow.modeling.encoder import (
    TextEncoder,
    build_encoder,
    describe_encoder,
    load_pretrained,
    load_weights,
    save_encoder,
)
from recflow.modeling.low_rank import factorise
from recflow.modeling.ranker import load_ranker, save_ranker
from recflow.modeling.reports import TrainingReport
from recflow.modeling.texts import TextTokenizer
from recflow.modeling.tracking import NullTracker
from recflow_tests.unit.modeling.families import CONFIGS, padded_batch, write_family

QUICK = TrimmingConfig(common_tokens=0, threads=1)
FEW = 3  # impressions that do not use all words


@pytest.fixture(scope="module")
def few(train: pl.DataFrame) -> pl.DataFrame:
    return train.filter(pl.col(Columns.HISTORY).list.len() > 0).head(FEW)


@pytest.fixture(scope="module")
def trimmed(
    tmp_path_factory: pytest.TempPathFactory,
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    few: pl.DataFrame,
    validation: pl.DataFrame,
) -> tuple[Path, TrimmingReport]:
    output = tmp_path_factory.mktemp("trimmed")
    return output, _trim(trained[0], output, items, few, validation)


def _trim(
    parent: Path,
    output: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    config: TrimmingConfig = QUICK,
) -> TrimmingReport:
    return trim_ranker(
        parent=parent,
        output=output,
        items=items,
        train=train,
        validation=validation,
        config=config,
        tracker=NullTracker(),
    )


def test_texts_of_kept_tokens_have_the_same_vectors_to_the_bit(
    trimmed: tuple[Path, TrimmingReport],
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    few: pl.DataFrame,
) -> None:
    texts = items_in_use(items, [few], 5).texts
    before, after = (load_ranker(path, threads=1) for path in (trained[0], trimmed[0]))
    np.testing.assert_array_equal(before.encode(texts), after.encode(texts))
    others = items[Columns.TEXT].to_list()
    assert not np.array_equal(before.encode(others), after.encode(others))


def test_the_report_says_what_is_left_and_what_it_risks(
    trimmed: tuple[Path, TrimmingReport],
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    few: pl.DataFrame,
    validation: pl.DataFrame,
) -> None:
    path, report = trimmed
    table = load_ranker(path)
    words = {w for text in items_in_use(items, [few], 5).texts for w in text.split()}
    assert "a" in words  # a single character would be kept in any case
    assert report.parent_tokens == 40
    assert report.seen_tokens == len(words) - 1
    assert report.always_kept == 5  # [PAD] for its number; [UNK], [CLS], [SEP]; "a"
    assert report.tokens == report.seen_tokens + report.always_kept
    assert report.parent_parameters - report.parameters == 32 * (40 - report.tokens)
    assert report.bytes == (path / "model.safetensors").stat().st_size < report.parent_bytes
    json.dumps(dataclasses.asdict(report))

    assert report.train.changed_texts == report.train.lost_tokens == 0
    assert report.train.mean_cosine == report.train.lowest_cosine == 1
    # The toy vocabulary has no characters to spell a new word with, so that it becomes unknown.
    known = set(items_in_use(items, [few], 5).ids)
    shown = items_in_use(items, [validation], 5)
    new = [t.split() for i, t in zip(shown.ids, shown.texts, strict=True) if i not in known]
    lost = [[word not in words for word in text] for text in new]
    assert report.unseen.texts == len(new)
    changed = sum(map(any, lost)) / len(new)
    assert 0 < report.unseen.changed_texts < 1
    assert report.unseen.changed_texts == report.unseen.more_unknown_texts == changed
    tokens = sum(len(text) + 2 for text in new)  # [CLS] and [SEP]
    assert report.unseen.lost_tokens == pytest.approx(sum(map(sum, lost)) / tokens)
    assert report.unseen.lowest_cosine < report.unseen.mean_cosine < 1
    assert report.estimated.changed_texts > 0
    assert report.validation_auc < report.parent_validation_auc
    assert report.estimated_validation_auc < report.parent_validation_auc
    assert table.dimension == 32


def test_the_estimate_chooses_from_the_texts_that_appeared_earlier(
    trained: tuple[Path, TrainingReport], train: pl.DataFrame, tmp_path: Path
) -> None:
    items = pl.DataFrame(
        {
            Columns.ITEM_ID: ["new 1", "old 1", "new 2", "old 2"],
            Columns.TEXT: ["sea0 the", "sea0 the", "war3 the", "sea1 the"],
            Columns.CATEGORY: ["x"] * 4,
        }
    )
    rows = train.head(2).with_columns(
        pl.Series(Columns.HISTORY, [["old 1"], ["old 2"]]),
        pl.Series(Columns.CANDIDATES, [["old 2", "old 1"], ["new 1", "new 2"]]),
        pl.Series(Columns.LABELS, [[1, 0], [1, 0]], dtype=pl.List(pl.Int8)),
    )
    report = _trim(trained[0], tmp_path, items, rows, rows)
    assert report.estimated.texts == 2
    assert report.estimated.changed_texts == 0.5
    assert report.estimated.lost_tokens == 1 / 8
    assert report.unseen.texts == 0


def test_rare_tokens_go_and_common_ones_stay(
    trimmed: tuple[Path, TrimmingReport],
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    few: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    rare, common = tmp_path / "rare", tmp_path / "common"
    for folder in (rare, common):
        folder.mkdir()
    config = dataclasses.replace(QUICK, min_count=3)
    fewer = _trim(trained[0], rare, items, few, validation, config)
    assert fewer.tokens < trimmed[1].tokens
    assert fewer.train.changed_texts > 0
    assert fewer.train.mean_cosine < 1
    config = dataclasses.replace(QUICK, common_tokens=40)
    more = _trim(trained[0], common, items, few, validation, config)
    assert more.tokens == 39  # all but [MASK], which nothing names and no text contains
    assert more.unseen.changed_texts == 0
    assert more.validation_auc == pytest.approx(more.parent_validation_auc)


def test_trimming_twice_gives_the_same_bytes(
    trimmed: tuple[Path, TrimmingReport],
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    few: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    _trim(trained[0], tmp_path, items, few, validation)
    for file in trimmed[0].iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_trimmed_ranker_can_be_quantized_and_trimmed_again(
    trimmed: tuple[Path, TrimmingReport],
    items: pl.DataFrame,
    few: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    again, quantized = tmp_path / "again", tmp_path / "quantized"
    for folder in (again, quantized):
        folder.mkdir()
    assert _trim(trimmed[0], again, items, few, validation).tokens == trimmed[1].tokens
    weights = [(path / "model.safetensors").read_bytes() for path in (trimmed[0], again)]
    assert weights[0] == weights[1]
    quantize_ranker(
        parent=trimmed[0],
        output=quantized,
        items=items,
        train=few,
        validation=validation,
        config=QuantizationConfig(sample_texts=20, threads=1),
        tracker=NullTracker(),
    )
    texts = items[Columns.TEXT].to_list()
    float32, int8 = (load_ranker(path, threads=1).encode(texts) for path in (again, quantized))
    assert np.einsum("ij,ij->i", float32, int8).mean() > 0.98


@pytest.mark.parametrize(
    ("family", "low_rank"),
    # Gemma's table is scaled, and is not factorised.
    [*((f, False) for f in CONFIGS), *((f, True) for f in CONFIGS if f != "gemma")],
)
def test_the_table_of_every_family_is_cut(
    base_model: Path, tmp_path: Path, family: str, low_rank: bool
) -> None:
    directory = write_family(family, tmp_path / "base", base_model / "tokenizer.json")
    encoder = load_pretrained(directory)
    if low_rank:
        name = _table_name(encoder)
        factorise(encoder.transformer, {name: 8})
        torch.nn.init.normal_(encoder.transformer.get_submodule(name).down.weight)
        torch.nn.init.normal_(encoder.transformer.get_submodule(name).up.weight)
    ids, mask = padded_batch()
    kept = np.unique(np.concatenate([[0, 1, 2], ids.numpy().ravel()]))
    assert len(kept) < 40
    with torch.inference_mode():
        before = encoder(ids, mask)
        trim_encoder(encoder, kept)
        renumbered = torch.from_numpy(np.searchsorted(kept, ids.numpy()))
        np.testing.assert_array_equal(encoder(renumbered, mask), before)
        save_encoder(encoder, tmp_path / "model.safetensors")
        again = build_encoder(json.loads(json.dumps(describe_encoder(encoder))))
        load_weights(again.transformer, tmp_path / "model.safetensors")
        np.testing.assert_array_equal(again(renumbered, mask), before)
    assert encoder.config.vocab_size == len(kept)


def _table_name(encoder: TextEncoder) -> str:
    table = encoder.transformer.get_input_embeddings()  # type: ignore[operator]
    return next(name for name, module in encoder.transformer.named_modules() if module is table)


def test_the_padding_token_is_renumbered(base_model: Path, tmp_path: Path) -> None:
    directory = write_family("distilbert", tmp_path, base_model / "tokenizer.json")
    config = json.loads((directory / "config.json").read_text()) | {"pad_token_id": 7}
    (directory / "config.json").write_text(json.dumps(config))
    encoder = load_pretrained(directory)
    trim_encoder(encoder, np.array([0, 4, 7, 9]))
    assert encoder.config.pad_token_id == 2
    assert encoder.transformer.get_input_embeddings().padding_idx == 2  # type: ignore[operator]


def test_positions_that_begin_behind_the_padding_stay(
    trained: tuple[Path, TrainingReport],
    base_model: Path,
    items: pl.DataFrame,
    few: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    base = write_family("roberta", tmp_path / "base", base_model / "tokenizer.json")
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"pad_token_id": 5}))
    encoder = load_pretrained(base)
    parent, output = tmp_path / "parent", tmp_path / "output"
    for folder in (parent, output):
        folder.mkdir()
    save_ranker(parent, encoder, base / "tokenizer.json", load_ranker(trained[0]).parts)
    report = _trim(parent, output, items, few, validation)
    # Besides what any encoder keeps, [MASK], which nothing names but which comes before token 5.
    assert report.tokens == report.seen_tokens + report.always_kept + 1
    texts = items_in_use(items, [few], 5).texts
    before, after = (load_ranker(path, threads=1).encode(texts) for path in (parent, output))
    np.testing.assert_array_equal(before, after)
    with pytest.raises(ConfigError, match="with all tokens up to 5"):
        trim_encoder(encoder, np.array([0, 1, 2, 3, 5, 6]))


def test_a_narrow_student_with_a_projection_is_trimmed(
    trained: tuple[Path, TrainingReport],
    base_model: Path,
    items: pl.DataFrame,
    few: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    parent, output = tmp_path / "parent", tmp_path / "output"
    for folder in (parent, output):
        folder.mkdir()
    base = load_pretrained(base_model)
    narrow = build_encoder(
        describe_encoder(base)
        | {
            "transformer": describe_encoder(base)["transformer"] | {"hidden_size": 16},
            "projection": 32,
        }
    )
    for parameter in narrow.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    ranker = load_ranker(trained[0])
    save_ranker(parent, narrow, base_model / "tokenizer.json", ranker.parts)
    _trim(parent, output, items, few, validation)
    texts = items_in_use(items, [few], 5).texts
    before, after = (load_ranker(path, threads=1).encode(texts) for path in (parent, output))
    np.testing.assert_array_equal(before, after)


def test_other_tokens_than_before_are_noticed(base_model: Path, tmp_path: Path) -> None:
    described = json.loads((base_model / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["sea0"], vocabulary["sea1"] = vocabulary["sea1"], vocabulary["sea0"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    whole, wrong = (TextTokenizer(path / "tokenizer.json", 16) for path in (base_model, tmp_path))
    check_same_tokens(whole, wrong, np.arange(40), ["pop0", "war1 the"])
    with pytest.raises(ParityError, match="cuts 'sea0 the' otherwise"):
        check_same_tokens(whole, wrong, np.arange(40), ["pop0", "sea0 the"])


def test_parents_that_cannot_be_trimmed_are_refused_and_nothing_is_written(
    trained: tuple[Path, TrainingReport],
    items: pl.DataFrame,
    few: pl.DataFrame,
    validation: pl.DataFrame,
    tmp_path: Path,
) -> None:
    parent, output = tmp_path / "parent", tmp_path / "output"
    for folder in (parent, output):
        folder.mkdir()
    for file in trained[0].iterdir():
        (parent / file.name).write_bytes(file.read_bytes())
    described = json.loads((parent / "config.json").read_text())
    (parent / "config.json").write_text(json.dumps(described | {"runtime": "onnxruntime"}))
    with pytest.raises(ArtifactError, match="a torch one is needed"):
        _trim(parent, output, items, few, validation)
    (parent / "config.json").write_text(json.dumps(described))
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "sea0": 1}, unk_token="[UNK]"))
    words.save(str(parent / "tokenizer.json"))
    with pytest.raises(ConfigError, match="tokenizer to trim = 'WordLevel'"):
        _trim(parent, output, items, few, validation)
    assert list(output.iterdir()) == []


def test_a_token_without_a_row_is_refused(base_model: Path) -> None:
    with pytest.raises(ArtifactError, match="token 40 has no row"):
        trim_encoder(load_pretrained(base_model), np.array([0, 40]))


@pytest.mark.parametrize(
    ("key", "value"),
    [("min_count", 0), ("common_tokens", -1), ("max_texts", 0), ("max_validation_impressions", 0)],
)
def test_impossible_configuration_is_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=key):
        TrimmingConfig(**{key: value})
