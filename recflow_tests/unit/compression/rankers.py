"""Stored rankers whose encoder is of any family; their user model is that of a trained one."""

from pathlib import Path

import torch

from recflow.modeling.encoder import load_pretrained
from recflow.modeling.layout import read_ranker_config
from recflow.modeling.ranker import load_parts, save_ranker
from recflow_tests.unit.modeling.families import LAYERS, write_family


def ranker_of_family(
    family: str, trained: Path, base_model: Path, folder: Path, *, adapters: bool = False
) -> Path:
    """Attention pooling and, where asked, adapters; none of them at rest."""
    tokenizer = base_model / "tokenizer.json"
    directory = write_family(family, folder / "base", tokenizer)
    encoder = load_pretrained(directory, pooling="attention")
    if adapters:
        encoder.add_adapter(LAYERS - 1, 6)
    generator = torch.Generator().manual_seed(4)
    for parameter in encoder.transformer.get_submodule("recflow").parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    ranker = folder / "ranker"
    ranker.mkdir()
    parts = load_parts(trained, read_ranker_config(trained))
    save_ranker(ranker, encoder, tokenizer, parts)
    return ranker
