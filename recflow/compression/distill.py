"""Distillation: a student of fewer layers, and narrower where asked for, taught by its parent.

It begins with layers of the teacher (:mod:`recflow.compression.student`) and learns twice.

*From texts*, without labels: its vectors are pulled to the teacher's by their cosine, and its
normalised hidden states to the teacher's by their squared distance, which teaches it every token of
a text instead of one vector (TinyBERT, Jiao et al. 2020, https://arxiv.org/abs/1909.10351). By
default those of the last layer alone (MiniLM, Wang et al. 2020, https://arxiv.org/abs/2002.10957):
on MovieLens that did no worse than every layer, and it costs less. The texts are those of train and
not of the whole catalogue: that holds texts which appeared in the days of validation and test, and
a student that has seen them would be measured on texts it knows, which it will not be in use.

*From clicks*: cross-entropy of the click in its slate, and the divergence of the student's from the
teacher's distribution over the same slate (Hinton et al. 2015, https://arxiv.org/abs/1503.02531),
while the cosine goes on holding the vectors where they are. Where validation shows no gain, the
state before them stays.

The embeddings stay the teacher's: they are most of the weights, learning them would cost time and
gain little, and texts met later need those of all words in one space.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from recflow.compression.config import DistillationConfig
from recflow.compression.recovery import (
    STEPS_BETWEEN_METRICS,
    encode_all,
    encode_tokens,
    evenly_drawn,
    mean_cosine,
    text_batches,
    validation_auc,
)
from recflow.compression.student import (
    build_student,
    choose_layers,
    principal_directions,
    require_teachable,
)
from recflow.core.errors import ContractError
from recflow.core.seeding import make_rng
from recflow.modeling.batching import (
    ItemIndex,
    index_impressions,
    items_in_use,
    local_rows,
)
from recflow.modeling.config import ObjectiveConfig
from recflow.modeling.encoder import WEIGHTS_NAME, TextEncoder, TorchRuntime, mixed_precision
from recflow.modeling.hidden_states import HiddenStates, HiddenStateStore
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.memory import peak_rss_bytes
from recflow.modeling.objectives import per_click_losses
from recflow.modeling.optimiser import Optimiser, ParameterGroup, deterministic
from recflow.modeling.ranker import (
    Ranker,
    RankerParts,
    count_parameters,
    load_encoder,
    load_parts,
    save_ranker,
)
from recflow.modeling.sampling import ClickBatch, click_batch, draw_clicks
from recflow.modeling.texts import (
    TOKENIZER_NAME,
    Rows,
    TextTokenizer,
    Vectors,
    length_buckets,
    pad_tokens,
)
from recflow.modeling.tracking import Progress, Tracker
from recflow.modeling.user_model import UserModel

logger = logging.getLogger("recflow.training")

_OBJECTIVE: Final = ObjectiveConfig()
_HELD_OUT_SHARE: Final = 0.05
_FEWEST_TEXTS: Final = 4  # two to learn from, two to compare
_WARMUP_SHARE: Final = 0.1
_CLICK_BUCKET: Final = 16  # shorter than elsewhere: a step on clicks has few texts
_BASIS_TEXTS: Final = 1_000  # enough to see the directions of a few hundred dimensions


@dataclass(frozen=True, slots=True)
class DistillationReport:
    """What the student is and what it lost.

    Attributes:
        layers: The teacher's layers that the student's began as, counted from 0.
        width: Width of its hidden states.
        parent_parameters: Weights of the teacher's encoder.
        parameters: Weights of the student's encoder.
        parent_bytes: Size of the teacher's encoder weights.
        bytes: Size of the student's encoder weights.
        texts: Texts of train learnt from.
        held_out_texts: Texts of train that the vectors were compared on.
        cosine_before_training: Mean cosine of vectors of held-out texts to the teacher's, when the
            student was made.
        cosine_after_texts: The same after the training on texts.
        cosine: The same at the end.
        text_steps: Optimiser steps on texts.
        best_text_step: The one whose state was kept.
        click_steps: Optimiser steps on clicks.
        best_click_step: The one whose state was kept; 0 where the clicks did not help.
        parent_validation_auc: Mean AUC of the parent on (a part of) validation.
        validation_auc: The student's on the same impressions.
        training_seconds: Wall time of the two trainings, their validations included.
        seconds: Wall time.
        peak_rss_bytes: Peak resident memory of the process so far.
    """

    layers: tuple[int, ...]
    width: int
    parent_parameters: int
    parameters: int
    parent_bytes: int
    bytes: int
    texts: int
    held_out_texts: int
    cosine_before_training: float
    cosine_after_texts: float
    cosine: float
    text_steps: int
    best_text_step: int
    click_steps: int
    best_click_step: int
    parent_validation_auc: float
    validation_auc: float
    training_seconds: float
    seconds: float
    peak_rss_bytes: int


def distill_ranker(
    *,
    parent: Path,
    output: Path,
    items: pl.DataFrame,
    train: pl.DataFrame,
    validation: pl.DataFrame,
    config: DistillationConfig,
    tracker: Tracker,
) -> DistillationReport:
    """Write a ranker whose encoder is a student of the parent's.

    The user model is the parent's, unless it is to be tuned. One text of train in twenty is held
    out; of the training on texts that state stays whose vectors of these texts are closest to the
    teacher's, of the training on clicks the one with the best AUC on validation, the state before
    it included. The same arguments give the same files, byte for byte, on one machine with one
    number of threads.

    Args:
        parent: Directory of a PyTorch ranker.
        output: Existing empty directory.
        items: Item features.
        train: Training impressions: their texts and clicks teach.
        validation: Validation impressions, to choose and to report the accuracy.
        config: The student, and how it learns.
        tracker: Told the configuration, the losses and the result.

    Raises:
        ArtifactError: The parent is not a complete PyTorch ranker.
        ConfigError: Its encoder cannot have such a student.
        ContractError: An impression names an unknown item, there is nothing to learn from, or
            there are too few texts.
        PermanentError: A loss or gradient is not a number.
    """
    started = time.monotonic()
    tracker.log_params(asdict(config))
    described = read_ranker_config(parent)
    parts = load_parts(parent, described)
    tokenizer = TextTokenizer(parent / TOKENIZER_NAME, parts.max_tokens)
    with deterministic(config.seed, config.threads):
        teacher = load_encoder(parent, described).requires_grad_(False)
        require_teachable(teacher, layers=config.layers, width=config.width)
        sample = evenly_drawn(validation, config.max_validation_impressions)
        parent_auc = _auc(teacher, tokenizer, parts, items, sample)

        lesson = _prepare(teacher, tokenizer, parts, items, train, config.seed)
        clicks = _Clicks(parts, lesson, train)
        kept = choose_layers(len(teacher.layers), config.layers)
        basis = None
        if 0 < config.width < teacher.width:
            texts = [lesson.tokens[row] for row in lesson.learnt[:_BASIS_TEXTS]]
            basis = principal_directions(teacher, texts, kept, config.width)
        student = build_student(teacher, kept, basis)
        first_cosine = lesson.held_out_cosine(student)

        training = time.monotonic()
        with tempfile.TemporaryDirectory(dir=output) as folder:
            hidden = _hidden_targets(teacher, lesson, kept, basis, Path(folder), config)
            best_text = _learn_from_texts(student, lesson, hidden, config, tracker)
            del hidden  # lets go of the files in the folder
        text_cosine = lesson.held_out_cosine(student)
        parts = replace(parts, user_model=copy.deepcopy(parts.user_model))
        best_click = _learn_from_clicks(
            student,
            parts,
            clicks,
            lambda: _auc(student, tokenizer, parts, items, sample),
            config,
            tracker,
        )
        training = time.monotonic() - training
        cosine = lesson.held_out_cosine(student)
        save_ranker(output, student, tokenizer.path, parts)
    tracker.log_metrics(
        {"validation_auc": best_click.value, "cosine": cosine},
        step=best_text.steps + best_click.steps,
    )
    return DistillationReport(
        layers=kept,
        width=student.width,
        parent_parameters=count_parameters(teacher),
        parameters=count_parameters(student),
        parent_bytes=(parent / WEIGHTS_NAME).stat().st_size,
        bytes=(output / WEIGHTS_NAME).stat().st_size,
        texts=len(lesson.learnt),
        held_out_texts=len(lesson.held_out),
        cosine_before_training=first_cosine,
        cosine_after_texts=text_cosine,
        cosine=cosine,
        text_steps=best_text.steps,
        best_text_step=best_text.step,
        click_steps=best_click.steps,
        best_click_step=best_click.step,
        parent_validation_auc=parent_auc,
        validation_auc=best_click.value,
        training_seconds=training,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What the teacher says of the texts of train.

    Attributes:
        index: The items of train.
        tokens: Token ids of each item's text.
        vectors: The teacher's vector of each, ``[items, dimension]``.
        learnt: Rows of the texts to learn from.
        held_out: Rows of the texts to compare vectors on.
    """

    index: ItemIndex
    tokens: list[list[int]]
    vectors: Vectors
    learnt: Rows
    held_out: Rows

    def held_out_cosine(self, student: TextEncoder) -> float:
        """Mean cosine of the student's vectors of held-out texts to the teacher's."""
        tokens = [self.tokens[row] for row in self.held_out]
        return mean_cosine(student, tokens, self.vectors[self.held_out])


def _prepare(
    teacher: TextEncoder,
    tokenizer: TextTokenizer,
    parts: RankerParts,
    items: pl.DataFrame,
    train: pl.DataFrame,
    seed: int,
) -> _Lesson:
    """Encode the texts of train once, and hold some of them out."""
    index = items_in_use(items, [train], parts.user_model.shape.history_length)
    tokens = tokenizer(index.texts)
    numbers: dict[tuple[int, ...], int] = {}
    text_of_item = [numbers.setdefault(tuple(text), len(numbers)) for text in tokens]
    if len(numbers) < _FEWEST_TEXTS:
        raise ContractError(
            f"train has {len(numbers)} distinct item texts, too few to teach a student; at least "
            f"{_FEWEST_TEXTS} are needed"
        )
    # Items with one text are held out together, or the student would know the held-out text.
    order = make_rng(seed, "held-out texts").permutation(len(numbers))
    chosen = order[: max(2, round(len(order) * _HELD_OUT_SHARE))]
    held_out = np.isin(text_of_item, chosen)
    return _Lesson(
        index=index,
        tokens=tokens,
        vectors=encode_all(teacher, tokens),
        learnt=np.flatnonzero(~held_out),
        held_out=np.flatnonzero(held_out),
    )


class _HiddenTargets:
    """The teacher's hidden states behind some layers, in the student's basis.

    They are computed once and read from disk through a memory map; where they need more room than
    is allowed, the teacher runs again for every batch, which costs time (all its layers, without
    gradients) and no room.

    Attributes:
        behind: Layers of the student behind which states are compared, lowest first.
    """

    def __init__(
        self,
        teacher: TextEncoder,
        tokens: list[list[int]],
        pairs: dict[int, int],
        basis: Tensor | None,
        states: list[HiddenStates] | None,
    ) -> None:
        """Prepare.

        Args:
            teacher: The teacher.
            tokens: Token ids of each text.
            pairs: By the student's layer, the teacher's.
            basis: The student's basis, or None where it is the teacher's.
            states: Stored states of each pair, or None to compute them.
        """
        self.behind = tuple(pairs)
        self._teacher, self._tokens, self._basis = teacher, tokens, basis
        self._layers, self._states = tuple(pairs.values()), states

    def gather(self, rows: Rows) -> list[Tensor]:
        """States of some texts end to end, ``[sum of their tokens, width]``, of each pair."""
        if self._states is None:
            found = self._compute([self._tokens[row] for row in rows])
        else:
            found = [states.gather(rows) for states in self._states]
        found = [states.to(torch.float32) for states in found]
        return found if self._basis is None else [states @ self._basis for states in found]

    @torch.no_grad()
    def _compute(self, tokens: list[list[int]]) -> list[Tensor]:
        ids, mask = map(torch.from_numpy, pad_tokens(tokens))
        return [states[mask] for states in _states_behind(self._teacher, ids, mask, self._layers)]


def _hidden_targets(
    teacher: TextEncoder,
    lesson: _Lesson,
    kept: tuple[int, ...],
    basis: Tensor | None,
    folder: Path,
    config: DistillationConfig,
) -> _HiddenTargets | None:
    """What the student's hidden states are to be; None where only vectors are compared."""
    if config.hidden_weight == 0:
        return None
    pairs = dict(enumerate(kept))
    if config.hidden_layers == "last":
        pairs = {len(kept) - 1: kept[-1]}
    with mixed_precision():
        half = torch.is_autocast_enabled("cpu")
    needed = sum(map(len, lesson.tokens)) * teacher.width * (2 if half else 4) * len(pairs)
    states = None
    if needed <= config.max_states_bytes:
        store = HiddenStateStore(folder, max_bytes=config.max_states_bytes)
        progress = Progress("hidden states", len(pairs) * len(lesson.tokens), "texts")
        states = [
            store.states(
                teacher,
                lesson.tokens,
                layer=layer + 1,
                precision="bf16" if half else "fp32",
                on_texts=progress.advance,
            )
            for layer in pairs.values()
        ]
        progress.close()
    return _HiddenTargets(teacher, lesson.tokens, pairs, basis, states)


def _states_behind(
    encoder: TextEncoder, ids: Tensor, mask: Tensor, layers: Sequence[int]
) -> list[Tensor]:
    """Hidden states ``[texts, tokens, width]`` behind some layers, given lowest first."""
    found: list[Tensor] = []
    start = 0
    with mixed_precision():
        hidden = encoder.embed(ids)
        for layer in layers:
            hidden = encoder.run_layers(hidden, mask, start, layer + 1)
            start = layer + 1
            found.append(hidden)
    return found


@dataclass(frozen=True, slots=True)
class _Best:
    """The state that a training ended with.

    Attributes:
        steps: Steps taken.
        step: The one after which it was kept; 0 for the state before training.
        value: Its value.
    """

    steps: int
    step: int
    value: float


class _Keeper:
    """Keeps the best state of what learns; greater values are better.

    Attributes:
        value: Value of the best state.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        """Keep the state before training."""
        self._parameters = list(parameters)
        self._step, self.value = 0, value
        self._state = self._copy()

    def offer(self, step: int, value: float) -> None:
        """Keep the state as of ``step`` where it is better than all before."""
        if value > self.value:
            self._step, self.value, self._state = step, value, self._copy()

    def restore(self, steps: int) -> _Best:
        """Go back to the best state, after ``steps`` steps."""
        with torch.no_grad():
            for parameter, kept in zip(self._parameters, self._state, strict=True):
                parameter.copy_(kept)
        return _Best(steps, self._step, self.value)

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]


def _learning(student: TextEncoder) -> list[nn.Parameter]:
    """Let everything but the embeddings learn, and return it."""
    student.requires_grad_(False)
    for module in (student.layers, student.adapters, *student.top):
        module.requires_grad_(True)
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def _learn_from_texts(
    student: TextEncoder,
    lesson: _Lesson,
    hidden: _HiddenTargets | None,
    config: DistillationConfig,
    tracker: Tracker,
) -> _Best:
    """Pull vectors and hidden states to the teacher's; ends with the best state."""
    parameters = _learning(student)
    tokens = [lesson.tokens[row] for row in lesson.learnt]
    steps = min(config.max_steps, config.epochs * math.ceil(len(tokens) / config.batch_size))
    optimiser = _optimiser([ParameterGroup(parameters, config.learning_rate)], steps, config)
    keeper = _Keeper(parameters, lesson.held_out_cosine(student))
    wanted = torch.from_numpy(lesson.vectors)
    between = math.ceil(steps / config.validations)
    progress = Progress("distilling from texts", steps, "steps")
    batches = text_batches(tokens, steps=steps, batch_size=config.batch_size, seed=config.seed)
    for step, places in enumerate(batches, start=1):
        rows = lesson.learnt[places]
        vectors, apart = _encode(student, [tokens[place] for place in places], hidden, rows)
        distance = 1 - (vectors * wanted[rows]).sum(-1).mean()
        loss = distance + config.hidden_weight * apart
        value = optimiser.step(loss, f"text step {step}")
        progress.advance(1, f"loss {value:.4f}")
        if step % STEPS_BETWEEN_METRICS == 0:
            losses = {"text_loss": value, "text_distance": distance.item()}
            tracker.log_metrics(losses, step=step)
        if step % between == 0 or step == steps:
            cosine = lesson.held_out_cosine(student)
            tracker.log_metrics({"held_out_cosine": cosine}, step=step)
            logger.info("text step %d: held-out cosine %.4f", step, cosine)
            keeper.offer(step, cosine)
    progress.close()
    return keeper.restore(steps)


def _encode(
    student: TextEncoder, tokens: list[list[int]], hidden: _HiddenTargets | None, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Unit vectors of a batch, and how far its hidden states are from those they should be."""
    if hidden is None:
        return encode_tokens(student, tokens), torch.zeros(())
    ids, mask = map(torch.from_numpy, pad_tokens(tokens))
    found = _states_behind(student, ids, mask, hidden.behind)
    with mixed_precision():
        vectors = student.pool(found[-1], mask)
    distances = [
        functional.mse_loss(_normalised(states[mask]), _normalised(wanted))
        for states, wanted in zip(found, hidden.gather(rows), strict=True)
    ]
    return vectors, torch.stack(distances).mean()


def _normalised(states: Tensor) -> Tensor:
    """States ``[tokens, width]``, each with mean 0 and variance 1, as families differ in scale."""
    states = states.to(torch.float32)
    return functional.layer_norm(states, states.shape[-1:])


class _Clicks:
    """Slates of train with what the teacher thinks of them."""

    def __init__(self, teacher: RankerParts, lesson: _Lesson, train: pl.DataFrame) -> None:
        """Look up the items of the impressions; nothing here changes in training."""
        self.lesson = lesson
        self.data = index_impressions(train, lesson.index, teacher.user_model.shape.history_length)
        self.data.require_contrasts("training")
        self.features = teacher.features(lesson.index)
        self.users = torch.from_numpy(teacher.user_numbers(train))
        self.vectors = torch.from_numpy(lesson.vectors)
        self._teacher = teacher.user_model

    def draw(self, config: DistillationConfig, epoch: int) -> Iterator[ClickBatch]:
        """Batches of one pass over the clicks, one click of each impression, in random order."""
        rng = make_rng(config.seed, "clicks", epoch)
        clicks = draw_clicks(
            self.data,
            self.data.contrasting_clicks,
            clicks_per_impression=1,
            max_impressions=len(self.data),
            rng=rng,
        )
        for start in range(0, len(clicks), config.click_batch_size):
            drawn = clicks[start : start + config.click_batch_size]
            yield click_batch(self.data, drawn, config.negatives, rng)

    def scores(self, model: UserModel, batch: ClickBatch, rows: Rows, vectors: Tensor) -> Tensor:
        """Scores ``[clicks, candidates]``, -inf where a slate had no more candidates.

        Args:
            model: The user model.
            batch: The clicks.
            rows: The distinct items of the batch.
            vectors: Their vectors.
        """
        scores = model(
            model.describe_items(vectors, self.features[rows]),
            local_rows(batch.history, rows),
            local_rows(batch.candidates, rows),
            self.users[batch.impressions],
        )
        return scores.masked_fill(torch.from_numpy(batch.candidates < 0), -torch.inf)

    @torch.no_grad()
    def teacher_scores(self, batch: ClickBatch, rows: Rows) -> Tensor:
        """The teacher's scores, likewise."""
        return self.scores(self._teacher, batch, rows, self.vectors[rows])


def _learn_from_clicks(
    student: TextEncoder,
    parts: RankerParts,
    clicks: _Clicks,
    measure: Callable[[], float],
    config: DistillationConfig,
    tracker: Tracker,
) -> _Best:
    """Learn from clicks and the teacher's scores; ends with the best state by ``measure``.

    Some candidates of a step are encoded with gradient; the other items of the batch have the
    vectors that the student gave them last.
    """
    groups = [ParameterGroup(_learning(student), config.click_learning_rate)]
    parts.user_model.requires_grad_(config.tune_user_model)
    if config.tune_user_model:
        groups.append(
            ParameterGroup(list(parts.user_model.parameters()), config.click_learning_rate)
        )
    learning = [parameter for group in groups for parameter in group.parameters]
    keeper = _Keeper(learning, measure())
    logger.info("before clicks: validation AUC %.4f", keeper.value)
    steps = config.click_steps
    if steps == 0:
        return keeper.restore(0)
    optimiser = _optimiser(groups, steps, config)
    vectors = torch.from_numpy(encode_all(student, clicks.lesson.tokens))
    rng = make_rng(config.seed, "encoded candidates")
    between = math.ceil(steps / config.validations)
    progress = Progress("distilling from clicks", steps, "steps")
    batches = (batch for epoch in count() for batch in clicks.draw(config, epoch))
    for step, batch in enumerate(islice(batches, steps), start=1):
        losses = _click_losses(student, parts.user_model, clicks, batch, vectors, rng, config)
        value = optimiser.step(torch.stack(list(losses.values())).sum(), f"click step {step}")
        progress.advance(1, f"loss {value:.4f}")
        if step % STEPS_BETWEEN_METRICS == 0:
            tracker.log_metrics({name: loss.item() for name, loss in losses.items()}, step=step)
        if step % between == 0 or step == steps:
            auc = measure()
            tracker.log_metrics({"validation_auc": auc}, step=step)
            logger.info("click step %d: validation AUC %.4f", step, auc)
            keeper.offer(step, auc)
    progress.close()
    return keeper.restore(steps)


def _click_losses(
    student: TextEncoder,
    user_model: UserModel,
    clicks: _Clicks,
    batch: ClickBatch,
    vectors: Tensor,
    rng: np.random.Generator,
    config: DistillationConfig,
) -> dict[str, Tensor]:
    """The parts of a step's loss; ``vectors`` keeps what was encoded."""
    rows = batch.distinct_items
    candidates = np.flatnonzero(np.isin(rows, batch.candidates))
    places = np.sort(rng.permutation(candidates)[: config.click_texts])
    encoded = _encode_in_buckets(student, [clicks.lesson.tokens[row] for row in rows[places]])
    mixed = vectors[rows].index_copy(0, torch.from_numpy(places), encoded)
    vectors[rows[places]] = encoded.detach()

    scores = clicks.scores(user_model, batch, rows, mixed)
    present = torch.from_numpy(batch.candidates >= 0)
    taught = clicks.teacher_scores(batch, rows).log_softmax(-1)
    # Where there is no candidate both are -inf; 0 · (-inf) would be NaN.
    gaps = (taught - scores.log_softmax(-1)).masked_fill(~present, 0.0)
    divergence = (taught.exp() * gaps).sum(-1).mean()
    clicked = per_click_losses(_OBJECTIVE, scores, present).mean()
    return {
        "click_loss": (1 - config.score_weight) * clicked,
        "score_loss": config.score_weight * divergence,
        "vector_loss": 1 - (encoded * clicks.vectors[rows[places]]).sum(-1).mean(),
    }


def _encode_in_buckets(student: TextEncoder, tokens: list[list[int]]) -> Tensor:
    """Unit vectors with gradients; texts of similar length are padded together."""
    lengths = np.array([len(text) for text in tokens], dtype=np.int64)
    buckets = list(length_buckets(lengths, _CLICK_BUCKET))
    encoded = [encode_tokens(student, [tokens[text] for text in bucket]) for bucket in buckets]
    inverse = np.argsort(np.concatenate(buckets))
    return torch.cat(encoded)[torch.from_numpy(inverse)]


def _optimiser(
    groups: Sequence[ParameterGroup], steps: int, config: DistillationConfig
) -> Optimiser:
    return Optimiser(
        groups,
        steps=steps,
        warmup_share=_WARMUP_SHARE,
        weight_decay=config.weight_decay,
        gradient_clip=config.gradient_clip,
    )


def _auc(
    encoder: TextEncoder,
    tokenizer: TextTokenizer,
    parts: RankerParts,
    items: pl.DataFrame,
    impressions: pl.DataFrame,
) -> float:
    ranker = Ranker(TorchRuntime(encoder, None), tokenizer, parts)
    return validation_auc(ranker, items, impressions)
