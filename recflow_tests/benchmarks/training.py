"""Training, the textbook's way and recflow's: ``python -m recflow_tests.benchmarks.training``.

The textbook recipe re-encodes every history and candidate text, padded to 128 tokens, in float32,
with all layers learning, 16 clicks a step. Both train the same ranker from the same pretrained
encoder on the same clicks of a stored snapshot (``make demo`` stores one), each in a process of its
own, one after the other.

First every technique is switched on in turn and the steps are timed. The two ways to sample fewer
texts are told apart: ``texts`` is what was encoded with gradient for each click. Then both recipes
train until the validation AUC has reached what the textbook's way reaches within its clicks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from recflow_tests.benchmarks.processes import in_own_process, train_here

_MEBIBYTE: Final = 1 << 20

TEXTBOOK: Final[dict[str, object]] = {
    "max_tokens": 128,
    "tuning.strategy": "full",
    "user_model.history_length": 20,
    "objective.negatives": 4,
    "objective.clicks_per_impression": 1,
    "schedule.head_epochs": 0,
    "schedule.encoder_epochs": 1,
    "schedule.encoder_batch_size": 16,
    "schedule.max_validation_impressions": 500,
    "schedule.checkpoint_seconds": 1e9,
    "speed.distinct_items": False,
    "speed.dynamic_padding": False,
    "speed.length_buckets": False,
    "speed.cache_hidden_states": False,
    "speed.precision": "fp32",
    "speed.open_attention": False,
    "speed.max_texts_per_step": 0,
    "speed.prefetch_batches": 0,
}
# Each is switched on beside those before it; the second number is how many clicks are timed.
STEPS: Final[tuple[tuple[str, dict[str, object], int], ...]] = (
    ("textbook", {}, 32),
    ("distinct items once", {"speed.distinct_items": True}, 64),
    ("dynamic padding", {"speed.dynamic_padding": True}, 128),
    ("length buckets", {"speed.length_buckets": True}, 128),
    ("bf16 where native", {"speed.precision": "auto"}, 256),
    ("open attention", {"speed.open_attention": True}, 256),
    ("last two layers", {"tuning.strategy": "top_k_layers", "tuning.tuned_layers": 2}, 512),
    ("hidden states kept", {"speed.cache_hidden_states": True}, 1024),
    ("256 clicks a step", {"schedule.encoder_batch_size": 256}, 2048),
    ("overlapping batches", {"speed.batching": "overlapping"}, 2048),
    ("256 texts a step", {"speed.max_texts_per_step": 256}, 4096),
    ("batches made ahead", {"speed.prefetch_batches": 2}, 4096),
)
# Options that trade something else; each beside all of the above.
OPTIONS: Final[tuple[tuple[str, dict[str, object], int], ...]] = (
    ("torch.compile", {"speed.compile": True}, 4096),
    ("gradient checkpointing", {"speed.gradient_checkpointing": True}, 4096),
    ("4 parts a step", {"speed.micro_batches": 4}, 4096),
    ("LoRA on the two layers", {"tuning.strategy": "lora"}, 4096),
    ("64 texts a step", {"speed.max_texts_per_step": 64}, 4096),
)
OURS: Final[dict[str, object]] = (
    TEXTBOOK
    | {key: value for _, values, _ in STEPS for key, value in values.items()}
    # The head first; then the encoder. Epochs are short, to see when the AUC is reached.
    | {"schedule.head_epochs": 6, "schedule.encoder_epochs": 2, "schedule.patience": 99}
)


def _trained(job: Mapping[str, Any]) -> dict[str, Any]:
    return in_own_process(__spec__.name, "--measure", job)


def steps_table(job: Mapping[str, Any]) -> Iterator[str]:
    """Rows of the table of techniques."""
    yield "| switched on | clicks/s | faster | texts a click | peak RSS MiB |"
    yield "|---|---:|---:|---:|---:|"
    base = 0.0
    values = dict(TEXTBOOK)
    for name, change, clicks in STEPS:
        values |= change
        report = _trained({**job, "values": _timed(values, clicks)})
        base = base or report["impressions_per_second"]
        yield _row(name, report, base)
    for name, change, clicks in OPTIONS:
        report = _trained({**job, "values": _timed(values | change, clicks)})
        yield _row(f"… and {name}", report, base)


def _timed(values: Mapping[str, object], clicks: int) -> dict[str, object]:
    return {**values, "schedule.max_impressions_per_epoch": clicks}


def _row(name: str, report: Mapping[str, Any], base: float) -> str:
    rate = report["impressions_per_second"]
    texts = sum(e["texts"] for e in report["epochs"]) / sum(e["clicks"] for e in report["epochs"])
    peak = report["peak_rss_bytes"] / _MEBIBYTE
    return f"| {name} | {rate:,.2f} | {rate / base:,.1f}× | {texts:.1f} | {peak:,.0f} |"


def time_to_auc(job: Mapping[str, Any], clicks: int, looks: int) -> Iterator[str]:
    """Rows of the table of what each recipe needs for the same validation AUC.

    Args:
        job: What is trained on.
        clicks: Clicks that the textbook's way is given.
        looks: How often it is validated on the way.
    """
    textbook = _trained(
        {
            **job,
            "values": TEXTBOOK
            | {
                "schedule.max_impressions_per_epoch": clicks // looks,
                "schedule.encoder_epochs": looks,
                "schedule.patience": looks,
            },
        }
    )
    wanted = max(epoch["validation"] for epoch in textbook["epochs"])
    ours = _trained({**job, "values": OURS | {"schedule.max_impressions_per_epoch": clicks}})
    yield f"| to a validation AUC of {wanted:.4f} | clicks | s | sooner | best AUC | peak RSS MiB |"
    yield "|---|---:|---:|---:|---:|---:|"
    base = _reached(textbook, wanted)
    for name, report in (("textbook", textbook), ("recflow", ours)):
        reached = _reached(report, wanted)
        best = max(epoch["validation"] for epoch in report["epochs"])
        peak = report["peak_rss_bytes"] / _MEBIBYTE
        if reached is None or base is None:
            yield f"| {name} | – | not reached | – | {best:.4f} | {peak:,.0f} |"
            continue
        seen, seconds = reached
        yield (
            f"| {name} | {seen:,} | {seconds:,.0f} | {base[1] / seconds:,.0f}× | {best:.4f} "
            f"| {peak:,.0f} |"
        )


def _reached(report: Mapping[str, Any], wanted: float) -> tuple[int, float] | None:
    """Clicks and seconds until a validation AUC; loading and what is computed once count too."""
    epochs: Sequence[Mapping[str, Any]] = report["epochs"]
    seconds = report["seconds"] - sum(epoch["seconds"] for epoch in epochs)
    clicks = 0
    for epoch in epochs:
        clicks += epoch["clicks"]
        seconds += epoch["seconds"] - epoch["validation_seconds"]
        if epoch["validation"] >= wanted:
            return clicks, seconds
    return None


def main(arguments: list[str] | None = None) -> None:
    """Print both comparisons as Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="simulated", help="whose snapshot: see make demo")
    parser.add_argument("--clicks", type=int, default=320, help="that the textbook trains on")
    parser.add_argument("--looks", type=int, default=4, help="validations on the way")
    parser.add_argument("--measure", metavar="JOB")
    options: Any = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(train_here(json.loads(options.measure))))
        return
    from recflow.demo import find_deployment

    settings = find_deployment(options.data).settings
    job = {
        "store": str(settings.store_dir),
        "snapshot": str(settings.last_day),
        "base_model": str(settings.base_model),
        "threads": settings.threads,
    }
    for line in steps_table(job):
        print(line, flush=True)
    print()
    for line in time_to_auc(job, options.clicks, options.looks):
        print(line, flush=True)


if __name__ == "__main__":
    main()
