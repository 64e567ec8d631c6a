"""A tiny pretrained encoder and a toy world in which text decides every click."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from recflow.core.columns import Columns
from recflow.core.seeding import make_rng
from recflow.modeling.config import TrainingConfig, with_values

TOPICS = ("sea", "war", "pop", "tax", "sun")
WORDS_PER_TOPIC = 6
FILLERS = ("the", "a", "new", "old", "very")

QUICK = with_values(
    TrainingConfig(),
    {
        "max_tokens": 16,
        "threads": 1,
        "tuning.tuned_layers": 1,
        "user_model.history_length": 5,
        "user_model.dropout": 0.0,
        "objective.negatives": 3,
        "optimiser.head_learning_rate": 1e-2,
        "optimiser.encoder_learning_rate": 1e-3,
        "schedule.head_epochs": 4,
        "schedule.patience": 2,
        "schedule.head_batch_size": 32,
        "schedule.encoder_batch_size": 32,
        "speed.max_texts_per_step": 16,
    },
)


def quick(values: Mapping[str, object] | None = None) -> TrainingConfig:
    return with_values(QUICK, values or {})


def words_of(topic: str) -> list[str]:
    return [f"{topic}{number}" for number in range(WORDS_PER_TOPIC)]


def write_base_model(directory: Path, seed: int = 0) -> Path:
    """Two layers, 32 wide, 4 heads, random weights, its own WordPiece vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*FILLERS, *(word for topic in TOPICS for word in words_of(topic))]
    vocabulary = {token: number for number, token in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    return directory


def make_items(per_topic: int = 8) -> pl.DataFrame:
    rng = make_rng(1, "items")
    rows = []
    for topic in TOPICS:
        for number in range(per_topic):
            words = [*rng.choice(words_of(topic), 3), *rng.choice(FILLERS, rng.integers(1, 5))]
            rows.append((f"{topic}-{number}", " ".join(words), f"category {topic}"))
    return pl.DataFrame(
        rows, schema=[Columns.ITEM_ID, Columns.TEXT, Columns.CATEGORY], orient="row"
    )


def make_impressions(items: pl.DataFrame, count: int, seed: int, cold_every: int = 7):
    """Users with one topic who click the one candidate of it; every n-th has no history."""
    rng = make_rng(seed, "impressions")
    ids = items[Columns.ITEM_ID].to_list()
    rows = []
    for number in range(count):
        topic = TOPICS[int(rng.integers(len(TOPICS)))]
        own = [item for item in ids if item.startswith(topic)]
        others = [item for item in ids if not item.startswith(topic)]
        length = 0 if number % cold_every == 0 else int(rng.integers(1, 8))
        candidates = [str(rng.choice(own)), *map(str, rng.choice(others, 4, replace=False))]
        order = rng.permutation(len(candidates))
        rows.append(
            {
                Columns.IMPRESSION_ID: str(number),
                Columns.USER_ID: f"u{number}",
                Columns.TIME: datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=number),
                Columns.HISTORY: [str(item) for item in rng.choice(own, length)],
                Columns.CANDIDATES: [candidates[place] for place in order],
                Columns.LABELS: [int(place == 0) for place in order],
            }
        )
    return pl.DataFrame(
        rows,
        schema_overrides={
            Columns.HISTORY: pl.List(pl.String),
            Columns.LABELS: pl.List(pl.Int8),
        },
    )
