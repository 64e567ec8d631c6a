"""What other estimators say, against numbers that they publish or returned themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from recflow.core.errors import ConfigError
from recflow.hardware.device import Device, Price
from recflow.hardware.planner import plan_training
from recflow.hardware.shape import EncoderShape
from recflow.hardware.workload import TrainingWorkload
from recflow.modeling.config import TrainingConfig, with_values
from recflow_tests.benchmarks.estimators import (
    READINGS,
    Run,
    accelerate_bytes,
    deepspeed_bytes,
    deepspeed_stage_3_bytes,
    eleuther_bytes,
    estimate_all,
    llm_analysis_bytes,
    zero_2_bytes,
    zero_3_bytes,
)

_BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
_QWEN: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 32_768,
}
# A layer of BERT-base: 4 · 768² + 2 · 768 · 3072 weights of matrices, 9 · 768 + 3072 others.
_LAYER = 7_087_872
# (30 522 + 512 + 2) · 768 + 2 · 768 below twelve layers.
_BERT_WEIGHTS = 23_837_184 + 12 * _LAYER


def _run(model: dict[str, Any], strategy: str = "full", half: bool = True, **changes: Any) -> Run:
    shape = EncoderShape.from_config(model)
    learns = {"full": shape.parameters, "top_k_layers": 2 * _LAYER, "lora": 200_000, "frozen": 0}
    values: dict[str, object] = {"tuning.strategy": strategy} | changes.pop("values", {})
    run = Run(
        model=model,
        shape=shape,
        config=with_values(TrainingConfig(), values),
        half=half,
        length=64,
        texts=256,
        occurrences=7_424,
        trainable=learns[strategy],
    )
    return replace(run, **changes)


def _checkpointed(half: bool = True, **changes: Any) -> Run:
    return _run(_BERT, half=half, values={"speed.gradient_checkpointing": True}, **changes)


class TestAccelerate:
    # https://huggingface.co/docs/accelerate/usage_guides/model_size_estimator, bert-base-cased:
    # 1.61 GB in float32, 826.36 MB in float16, both in units of 1024.
    cased = _BERT | {"vocab_size": 28_996}

    def test_says_what_its_documentation_shows_in_float32(self) -> None:
        said = accelerate_bytes(_run(self.cased, half=False)).bytes
        assert said is not None
        assert round(said / 1024**3, 2) == 1.61

    def test_says_what_its_documentation_shows_in_float16(self) -> None:
        said = accelerate_bytes(_run(self.cased)).bytes
        assert said is not None
        assert round(said / 1024**2, 2) == 826.36

    def test_knows_neither_batch_nor_strategy(self) -> None:
        said = {
            accelerate_bytes(_run(_BERT, strategy, texts=texts)).bytes
            for strategy in ("full", "lora", "frozen")
            for texts in (1, 256)
        }
        assert len(said) == 1

    def test_of_what_learns_takes_sixteen_bytes_a_weight_and_four_of_the_others(self) -> None:
        said = accelerate_bytes(_run(_BERT, "top_k_layers", half=False), "what learns").bytes
        assert said == 16 * 2 * _LAYER + 4 * (_BERT_WEIGHTS - 2 * _LAYER)


class TestDeepSpeed:
    def test_of_stage_2_says_what_the_package_returned(self) -> None:
        # Of 110 million weights, cpu_offload=False, one GPU: deepspeed 0.19.8 returned
        # 660,000,000 bytes for the CPU and these for the GPU.
        assert zero_2_bytes(110_000_000) == 2_200_000_000

    def test_of_stage_3_says_what_the_package_returned(self) -> None:
        # The same with 23 million weights of the largest module and nothing offloaded.
        assert zero_3_bytes(110_000_000, 23_000_000) == 2_072_000_000

    def test_is_told_all_weights_and_the_largest_module(self) -> None:
        table = 30_522 * 768
        assert deepspeed_bytes(_run(_BERT)).bytes == 20 * _BERT_WEIGHTS
        assert deepspeed_stage_3_bytes(_run(_BERT)).bytes == 18 * _BERT_WEIGHTS + 4 * table

    def test_knows_no_precision(self) -> None:
        single, half = (deepspeed_bytes(_run(_BERT, half=half)).bytes for half in (False, True))
        assert single == half

    def test_of_what_learns_holds_the_others_in_sixteen_bits(self) -> None:
        said = deepspeed_bytes(_run(_BERT, "frozen"), "what learns").bytes
        assert said == 2 * _BERT_WEIGHTS


class TestEleuther:
    # Two tables of the vocabulary, positions of 64 tokens, norms, attention, feed-forward:
    # 2 · 30522 · 768 + 768 · 64 + 8 · 768 · 12 + 2 · 768 + 4 · 12 · 768² + 2 · 12 · 768 · 3072
    weights = 46_881_792 + 49_152 + 75_264 + 28_311_552 + 56_623_104

    def test_counts_a_language_model_in_mixed_precision(self) -> None:
        # 2 + 4 + 12 bytes a weight; a layer keeps 34 · 768 + 5 · 12 · 64 bytes of a token.
        activations = 256 * 64 * 12 * (34 * 768 + 5 * 12 * 64)
        assert eleuther_bytes(_run(_BERT)).bytes == 18 * self.weights + activations

    def test_counts_float32(self) -> None:
        activations = 256 * 64 * 12 * (66 * 768 + 9 * 12 * 64)
        assert eleuther_bytes(_run(_BERT, half=False)).bytes == 20 * self.weights + activations

    def test_counts_every_occurrence_as_a_batch(self) -> None:
        said = [eleuther_bytes(_run(_BERT), reading).bytes for reading in READINGS[:2]]
        assert said[0] is not None
        assert said[1] is not None
        assert said[1] - said[0] == (7_424 - 256) * 64 * 12 * (34 * 768 + 5 * 12 * 64)

    def test_recomputes_the_attention_only(self) -> None:
        said = eleuther_bytes(_checkpointed()).bytes
        assert said == 18 * self.weights + 256 * 64 * 12 * 34 * 768

    def test_of_what_learns_keeps_a_layers_input_when_recomputed(self) -> None:
        # "Transformer Math 101": 2 s b h L bytes in 16 bits.
        said = eleuther_bytes(_checkpointed(), "what learns").bytes
        assert said == 18 * _BERT_WEIGHTS + 2 * 64 * 256 * 768 * 12

    def test_of_what_learns_takes_sixteen_bytes_a_weight_in_float32(self) -> None:
        run = _run(_BERT, half=False, texts=0)
        assert eleuther_bytes(run, "what learns").bytes == 16 * _BERT_WEIGHTS

    def test_of_what_learns_takes_two_layers(self) -> None:
        run = _run(_BERT, "top_k_layers", half=False, texts=8)
        states = 16 * 2 * _LAYER + 4 * (_BERT_WEIGHTS - 2 * _LAYER)
        activations = 8 * 64 * 2 * (66 * 768 + 9 * 12 * 64)
        assert eleuther_bytes(run, "what learns").bytes == states + activations


class TestLlmAnalysis:
    @pytest.mark.parametrize(
        ("model", "texts", "length", "checkpointing", "returned"),
        [
            # LLMAnalysis(ModelConfig(…), a100-sxm-80gb, 16 bits each).training(batch_size_per_gpu,
            # seq_len, activation_recomputation) of llm-analysis 0.2.2 returned these numbers as
            # "(weight+op_state+grad+act)_memory_per_gpu".
            (_BERT, 8, 64, False, 2_177_985_024),
            (_BERT, 8, 64, True, 1_991_797_248),
            (_BERT, 256, 32, False, 5_581_177_344),
            (_BERT, 256, 32, True, 2_602_172_928),
            (_QWEN, 8, 64, False, 9_376_237_568),
            (_QWEN, 8, 64, True, 8_799_782_912),
            (_QWEN, 256, 32, False, 20_797_196_288),
            (_QWEN, 256, 32, True, 11_573_921_792),
        ],
    )
    def test_says_what_the_package_returned(
        self, model: dict[str, Any], texts: int, length: int, checkpointing: bool, returned: int
    ) -> None:
        values = {"speed.gradient_checkpointing": checkpointing}
        run = _run(model, values=values, texts=texts, length=length)
        assert llm_analysis_bytes(run).bytes == returned

    def test_cannot_say_float32(self) -> None:
        said = llm_analysis_bytes(_run(_BERT, half=False))
        assert said.bytes is None
        assert "16 bits" in said.note

    def test_of_what_learns_leaves_the_logits_out(self) -> None:
        run = _run(_BERT, "top_k_layers", texts=8)
        states = 18 * 2 * _LAYER + 2 * (_BERT_WEIGHTS - 2 * _LAYER)
        # Korthikanti et al. 2022 for fused attention: inputs, queries, keys, values, what attention
        # makes of them and its two working tensors; the feed-forward part; the norms in float32.
        layer = 2 * (7 * 768 + 4 * 12) + 768 + 2 * (768 + 2 * 3072) + 2 * 4 * 768
        said = llm_analysis_bytes(run, "what learns").bytes
        assert said == states + 8 * 64 * 2 * layer


class TestAll:
    def test_asks_every_tool_that_takes_a_batch_in_three_readings(self) -> None:
        asked = [(said.tool, said.reading) for said in estimate_all(_run(_BERT))]
        assert len(asked) == len(set(asked)) == 3 * 2 + 2 * 3

    @pytest.mark.parametrize("strategy", ["lora", "frozen", "top_k_layers"])
    def test_no_tool_knows_that_little_learns(self, strategy: str) -> None:
        whole, part = (estimate_all(_run(_BERT, name)) for name in ("full", strategy))
        for said, other in zip(whole, part, strict=True):
            if said.reading == "what learns":
                assert other.bytes is not None
                assert said.bytes is not None
                assert other.bytes < 0.6 * said.bytes
            else:
                assert other == said

    def test_weights_that_are_spread_are_not_compared(self) -> None:
        with pytest.raises(ConfigError, match="shard_encoder"):
            _run(_BERT, values={"distribution.shard_encoder": True})


def test_a_planned_run_feeds_the_texts_of_a_part() -> None:
    device = Device(
        name="one", label="One", kind="cpu", memory_gib=16, bandwidth_gb_s=20, watts=65,
        teraflops={"fp32": 0.2, "bf16": 0.4}, host_memory_gib=16, cores=4, source="made up",
        price=Price(usd_per_hour=0.1, date="2025-01-01", source="made up"),
    )  # fmt: skip
    config = with_values(TrainingConfig(), {"speed.micro_batches": 4, "speed.precision": "fp32"})
    plan = plan_training(
        EncoderShape.from_config(_BERT), config, TrainingWorkload.typical(), device
    )
    run = Run.planned(_BERT, config, plan, length=19.2, history=20.0)
    assert (run.texts, run.length, run.half) == (256 // 4, 20, False)
    # 256 clicks with 20 clicks of history, the clicked candidate and 8 others, in 4 parts.
    assert run.occurrences == 256 * (20 + 1 + 8) // 4
    assert run.trainable == plan.trainable_parameters >= 2 * _LAYER
    assert run.held == _BERT_WEIGHTS - 2 * _LAYER
