"""A tiny random model of every supported architecture."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers as hf
from transformers import AutoModel

LAYERS = 3
ROWS = 40  # of the embedding table; the tokenizer of write_base_model has 40 tokens

_BERT = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
_DECODER = {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}

CONFIGS: Mapping[str, Callable[[], hf.PretrainedConfig]] = {
    "bert": lambda: hf.BertConfig(**_BERT),
    "camembert": lambda: hf.CamembertConfig(**_BERT),
    "roberta": lambda: hf.RobertaConfig(**_BERT),
    "xlm-roberta": lambda: hf.XLMRobertaConfig(**_BERT),
    "electra": lambda: hf.ElectraConfig(**_BERT, embedding_size=16),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=ROWS, dim=32, n_layers=LAYERS, n_heads=4, hidden_dim=48,
        max_position_embeddings=40, initializer_range=0.2,
    ),
    "mpnet": lambda: hf.MPNetConfig(**_BERT),
    # Windows of a few tokens, so that texts of the tests are longer than they are.
    "modernbert": lambda: hf.ModernBertConfig(
        **_BERT, local_attention=4, pad_token_id=0, layer_types=[
            "full_attention", "sliding_attention", "sliding_attention"
        ],
    ),
    "llama": lambda: hf.LlamaConfig(**_DECODER),
    "mistral": lambda: hf.MistralConfig(**_DECODER, sliding_window=4),
    "qwen2": lambda: hf.Qwen2Config(
        **{k: v for k, v in _DECODER.items() if k != "head_dim"},
        use_sliding_window=True, sliding_window=4, max_window_layers=1,
    ),
    "qwen3": lambda: hf.Qwen3Config(**_DECODER),
    "gemma": lambda: hf.GemmaConfig(**_DECODER),
}  # fmt: skip
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def write_family(family: str, directory: Path, tokenizer: Path, *, shards: str = "1GB") -> Path:
    """A model directory with random weights, norms and biases included."""
    directory.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModel.from_config(CONFIGS[family]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(directory, max_shard_size=shards)
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    return directory


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask ``[4, 11]`` of texts of 11, 7, 3 and 1 tokens, padded with 0."""
    lengths = torch.tensor([11, 7, 3, 1])
    mask = torch.arange(11)[None, :] < lengths[:, None]
    ids = torch.randint(5, ROWS, (4, 11), generator=torch.Generator().manual_seed(1))
    return ids.masked_fill(~mask, 0), mask
