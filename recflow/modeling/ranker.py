"""The ranker as it is stored, loaded and used: text in, vectors and scores out.

A ranker's directory holds the encoder (``model.safetensors`` or ``model.onnx``), the user model
(``user_model.safetensors``), ``tokenizer.json``, and a ``config.json`` that says how to rebuild
both and which runtime executes the encoder. One that knows items or users by name also has a
``vocabulary.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from recflow.core.columns import Columns
from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling.batching import ItemIndex, Ragged
from recflow.modeling.encoder import (
    WEIGHTS_NAME,
    TextEncoder,
    TorchRuntime,
    build_encoder,
    check_vocabulary,
    describe_encoder,
    hold_in_bfloat16,
    load_pretrained,
    load_weights,
    save_encoder,
)
from recflow.modeling.layout import (
    BF16,
    CONFIG_NAME,
    LAYOUT,
    ONNXRUNTIME,
    TORCH,
    read_ranker_config,
)
from recflow.modeling.onnx_runtime import ONNX_NAME, OnnxRuntime
from recflow.modeling.texts import (
    TOKENIZER_NAME,
    EncoderRuntime,
    Rows,
    TextTokenizer,
    Vectors,
    encode_texts,
)
from recflow.modeling.user_model import ItemFeatures, ItemStates, UserModel, UserModelShape
from recflow.modeling.vocabulary import load_vocabulary, number_ids, save_vocabulary

USER_MODEL_NAME = "user_model.safetensors"

# Similarities held at a time while scoring; 16 MB of float32.
_MAX_SIMILARITIES = 4_000_000


@dataclass(frozen=True, slots=True)
class RankerParts:
    """Everything of a ranker but the runtime of its encoder.

    Attributes:
        user_model: The user model.
        categories: Categories known from training, in the order of their numbers.
        max_tokens: Longest text in tokens.
        item_ids: Items with an embedding of their own, in the order of their numbers; empty where
            there are none.
        user_ids: The same for users.
    """

    user_model: UserModel
    categories: list[str]
    max_tokens: int
    item_ids: list[str] = field(default_factory=list)
    user_ids: list[str] = field(default_factory=list)

    def features(self, items: ItemIndex) -> ItemFeatures:
        """What the user model reads of each item beside its vector."""
        return ItemFeatures(
            categories=torch.from_numpy(items.category_numbers(self.categories)),
            ids=torch.from_numpy(items.numbers(self.item_ids)),
        )

    def user_numbers(self, impressions: pl.DataFrame) -> Rows:
        """Number of each impression's user, 0 where unknown."""
        return number_ids(impressions[Columns.USER_ID], self.user_ids)


class Ranker:
    """Ranks items for users by text."""

    def __init__(
        self, runtime: EncoderRuntime, tokenizer: TextTokenizer, parts: RankerParts
    ) -> None:
        """Put the parts together."""
        self._runtime, self._tokenizer = runtime, tokenizer
        self.parts = parts

    @property
    def dimension(self) -> int:
        """Width of the item vectors."""
        return self.parts.user_model.shape.dimension

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors ``[texts, dimension]`` float32, in the order of the texts."""
        return encode_texts(self._runtime, self._tokenizer, texts)

    def scorer(
        self, name: str, items: pl.DataFrame, vectors: Callable[[Rows], Vectors] | None = None
    ) -> ContentScorer:
        """A scorer over an item-features table.

        Args:
            name: Name on the board.
            items: Item features.
            vectors: Looks up the unit vectors of rows of ``items``, e.g. in a store; where there is
                none, items are encoded when first needed.

        Raises:
            ContractError: An item occurs twice.
        """
        return ContentScorer(name, self, ItemIndex(items), vectors)


class ContentScorer:
    """Scores impressions from texts, categories and click histories, and from ids where it has any.

    Attributes:
        name: Name on the board.
    """

    def __init__(
        self,
        name: str,
        ranker: Ranker,
        items: ItemIndex,
        vectors: Callable[[Rows], Vectors] | None = None,
    ) -> None:
        """Prepare for a table of items; their ``vectors`` are looked up, or else computed."""
        self.name = name
        self._ranker, self._items = ranker, items
        self._look_up = vectors or self._encode
        self._model = ranker.parts.user_model
        self._features = ranker.parts.features(items)
        self._vectors = np.zeros((len(items), ranker.dimension), dtype=np.float32)
        self._encoded = np.zeros(len(items), dtype=np.bool_)

    @property
    def board(self) -> Literal["content-only", "counter-aware"]:
        """The board to compete on: an embedding of an item also learns how popular it is."""
        return "counter-aware" if self._model.shape.knows_ids else "content-only"

    def score(self, impressions: pl.DataFrame) -> pl.Series:
        """Score of each candidate of each impression, ``List(Float64)``, in their order.

        Raises:
            ContractError: An item is not in the item table.
        """
        slates = self._items.ragged(impressions[Columns.CANDIDATES])
        histories = self._histories(impressions)
        rows = np.unique(np.concatenate([slates.values, histories.values]))
        scores = score_slates(
            self._model,
            self._states(rows),
            _renumber(histories, rows),
            _renumber(slates, rows),
            self._ranker.parts.user_numbers(impressions),
        )
        lists = pa.LargeListArray.from_arrays(slates.offsets, scores)
        return pl.Series(Columns.SCORES, lists, dtype=pl.List(pl.Float64))

    def score_catalogue(self, impressions: pl.DataFrame, item_ids: Sequence[str]) -> Vectors:
        """Score of every given item for every impression's user, ``[rows, items]`` float32.

        Raises:
            ContractError: An item is not in the item table.
        """
        catalogue = self._items.rows(pl.Series(item_ids, dtype=pl.String))
        histories = self._histories(impressions)
        rows = np.unique(np.concatenate([catalogue, histories.values]))
        states = self._states(rows)
        slate = torch.from_numpy(np.searchsorted(rows, catalogue))[None, :]
        padded = torch.from_numpy(_renumber(histories, rows).pad(right_aligned=True))
        users = torch.from_numpy(self._ranker.parts.user_numbers(impressions))
        size = max(1, _MAX_SIMILARITIES // (slate.shape[1] * padded.shape[1]))
        with torch.inference_mode():
            scores = [
                self._model(states, chunk, slate, some_users)
                for chunk, some_users in zip(padded.split(size), users.split(size), strict=True)
            ]
        return torch.cat(scores).numpy() if scores else np.zeros((0, len(catalogue)), np.float32)

    def _histories(self, impressions: pl.DataFrame) -> Ragged:
        newest = impressions[Columns.HISTORY].list.tail(self._model.shape.history_length)
        return self._items.ragged(newest)

    def _encode(self, rows: Rows) -> Vectors:
        return self._ranker.encode([self._items.texts[row] for row in rows])

    def _states(self, rows: Rows) -> ItemStates:
        missing = rows[~self._encoded[rows]]
        if len(missing):
            self._vectors[missing] = self._look_up(missing)
            self._encoded[missing] = True
        with torch.inference_mode():
            return self._model.describe_items(
                torch.from_numpy(self._vectors[rows]), self._features[rows]
            )


def score_slates(
    model: UserModel,
    states: ItemStates,
    histories: Ragged,
    slates: Ragged,
    users: Rows | None = None,
) -> NDArray[np.float64]:
    """Scores of all candidates, end to end.

    Slates of similar length are scored together, few enough at a time to bound the memory; a
    score depends on its own impression only.

    Args:
        model: The user model.
        states: The items that ``histories`` and ``slates`` number.
        histories: Clicks of each impression, oldest first.
        slates: Candidates of each impression.
        users: Number of each impression's user, 0 for unknown; None where nobody is known.
    """
    device = states.appeal.device
    scores = np.empty(len(slates.values), dtype=np.float64)
    longest = int(histories.lengths.max(initial=1))
    order = np.argsort(slates.lengths, kind="stable")
    with torch.inference_mode():
        for chunk in _chunks(order, slates.lengths, max(longest, 1)):
            history = torch.from_numpy(histories.take(chunk).pad(right_aligned=True))
            candidates = slates.take(chunk).pad()
            result = model(
                states,
                history.to(device),
                torch.from_numpy(candidates).to(device),
                None if users is None else torch.from_numpy(users[chunk]).to(device),
            ).cpu()
            positions = Ragged(np.arange(len(scores)), slates.offsets).take(chunk).values
            scores[positions] = result.numpy()[candidates >= 0]
    return scores


def _chunks(order: Rows, lengths: Rows, clicks: int) -> list[Rows]:
    """Cut impressions, ordered by slate length, where a chunk's similarities reach the limit."""
    chunks: list[Rows] = []
    start = 0
    while start < len(order):
        size = max(1, _MAX_SIMILARITIES // (clicks * max(int(lengths[order[start]]), 1)))
        # The longest slate of the chunk decides its width, so shrink once by that one.
        last = order[min(start + size, len(order)) - 1]
        size = max(1, min(size, _MAX_SIMILARITIES // (clicks * max(int(lengths[last]), 1))))
        chunks.append(order[start : start + size])
        start += size
    return chunks


def frozen_item_vectors(
    base_model: Path, items: pl.DataFrame, *, threads: int | None = None, max_tokens: int = 64
) -> tuple[list[str], Vectors]:
    """Item vectors of a pretrained encoder, for the baseline without any training.

    Args:
        base_model: Hugging Face model directory.
        items: Item features.
        threads: Threads torch may use; ``None`` leaves it as it is.
        max_tokens: Longest text in tokens; fewer where the encoder has fewer positions.

    Returns:
        Item ids and their unit vectors ``[items, dimension]`` float32.

    Raises:
        ArtifactError: The directory is not a complete model.
    """
    encoder = load_pretrained(base_model)
    longest = min(max_tokens, encoder.longest_text)
    tokenizer = TextTokenizer(base_model / TOKENIZER_NAME, longest)
    index = ItemIndex(items)
    runtime = TorchRuntime(encoder, threads)
    return index.ids, encode_texts(runtime, tokenizer, index.texts)


def save_ranker(
    output: Path, encoder: TextEncoder, tokenizer_path: Path, parts: RankerParts
) -> None:
    """Write a PyTorch ranker into ``output``."""
    save_encoder(encoder, output / WEIGHTS_NAME)
    save_parts(
        output,
        tokenizer_path,
        parts,
        runtime={"runtime": TORCH, "encoder": describe_encoder(encoder)},
        encoder_parameters=count_parameters(encoder),
    )


def save_parts(
    output: Path,
    tokenizer_path: Path,
    parts: RankerParts,
    *,
    runtime: Mapping[str, Any],
    encoder_parameters: int,
) -> None:
    """Write everything of a ranker but the encoder's weights.

    Args:
        output: Directory of the ranker.
        tokenizer_path: ``tokenizer.json`` to copy.
        parts: User model and limits.
        runtime: Keys of ``config.json`` that say how the encoder is executed.
        encoder_parameters: Weights of the encoder.
    """
    shape, state = parts.user_model.shape, parts.user_model.state_dict()
    save_file({k: v.detach().contiguous() for k, v in state.items()}, output / USER_MODEL_NAME)
    shutil.copyfile(tokenizer_path, output / TOKENIZER_NAME)
    if shape.knows_ids:
        save_vocabulary(output, item_ids=parts.item_ids, user_ids=parts.user_ids)
    config = {
        "layout": LAYOUT,
        "max_tokens": parts.max_tokens,
        "categories": parts.categories,
        "user_model": asdict(shape),
        "parameters": encoder_parameters + count_parameters(parts.user_model),
        **runtime,
    }
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (output / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def load_ranker(path: Path, *, threads: int | None = None) -> Ranker:
    """Load a ranker, whatever executes it.

    Args:
        path: Its directory.
        threads: Threads the encoder may use; ``None`` leaves that to the runtime.

    Raises:
        ArtifactError: A file is missing or damaged, the layout or runtime is unknown, or the
            weights are not exactly those of the described model.
    """
    config = read_ranker_config(path)
    parts = load_parts(path, config)
    tokenizer = TextTokenizer(path / TOKENIZER_NAME, parts.max_tokens)
    if config["runtime"] == ONNXRUNTIME:
        return Ranker(OnnxRuntime(path / ONNX_NAME, threads), tokenizer, parts)
    encoder = load_encoder(path, config)
    check_vocabulary(encoder, tokenizer)
    if config.get("precision") == BF16:
        hold_in_bfloat16(encoder)
    return Ranker(TorchRuntime(encoder, threads), tokenizer, parts)


def load_encoder(path: Path, config: Mapping[str, Any]) -> TextEncoder:
    """Rebuild the encoder of a PyTorch ranker.

    Raises:
        ArtifactError: The ranker has no PyTorch encoder, or its weights do not fit.
    """
    if config["runtime"] != TORCH:
        raise ArtifactError(f"{path} is executed by {config['runtime']}; a {TORCH} one is needed")
    encoder = build_encoder(config.get("encoder", {}))
    load_weights(encoder.transformer, path / WEIGHTS_NAME)
    return encoder


def load_parts(path: Path, config: Mapping[str, Any]) -> RankerParts:
    """Rebuild everything of a ranker but its encoder.

    Raises:
        ArtifactError: The description or the weights do not fit.
    """
    try:
        shape = UserModelShape(**config["user_model"])
        model = UserModel(shape)
        categories = [str(category) for category in config["categories"]]
        max_tokens = int(config["max_tokens"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ArtifactError(f"{path / CONFIG_NAME} cannot be used: {error!r}") from error
    load_weights(model, path / USER_MODEL_NAME)
    parts = RankerParts(model.eval(), categories, max_tokens)
    if not shape.knows_ids:
        return parts
    item_ids, user_ids = load_vocabulary(path, items=shape.items, users=shape.users)
    return replace(parts, item_ids=item_ids, user_ids=user_ids)


def count_parameters(module: torch.nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def _renumber(lists: Ragged, rows: Rows) -> Ragged:
    """Number the items by their place in ``rows`` instead of in the item table."""
    return Ragged(np.searchsorted(rows, lists.values), lists.offsets)
