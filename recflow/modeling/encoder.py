"""The text encoder: a Hugging Face transformer, pooling, unit length.

The transformer is driven layer by layer, so that the hidden states below the lowest trainable
layer can be computed once and kept, and so that layers whose heads and feed-forward channels were
removed run through the same code. What recflow adds to the transformer (learnt pooling, bottleneck
adapters, a projection of the vectors) is its submodule ``recflow``: one file holds all weights, and
those of the pretrained model keep their Hugging Face names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from recflow.core.errors import ArtifactError, ConfigError
from recflow.modeling import attention
from recflow.modeling.architectures import (
    Architecture,
    Bert,
    LayerArguments,
    LayerShape,
    find_architecture,
)
from recflow.modeling.layout import CONFIG_NAME, WEIGHTS_NAME
from recflow.modeling.low_rank import factorise, ranks_of
from recflow.modeling.packing import pack, unpack
from recflow.modeling.pooling import BottleneckAdapter, build_pooling, resolve_pooling
from recflow.modeling.texts import TOKENIZER_NAME, TextTokenizer, Vectors, pad_tokens

SHARDS_NAME = "model.safetensors.index.json"

ADDITIONS = "recflow"
"""Submodule of the transformer with everything that is not of the pretrained model."""

# Embedding tables are padded to a multiple of 128 for faster matrix products, and some models
# reserve rows for special tokens to come, up to 0.3 % of the table (Qwen2.5, Qwen3).
_VOCABULARY_PADDING = 128
_RESERVED_SHARE = 0.005
_POOLER = "pooler."


class TextEncoder(nn.Module):
    """Token ids to unit vectors.

    Attributes:
        transformer: The Hugging Face model, without pooler; holds all weights.
        architecture: Drives it.
        pooling: Name of the pooling.
    """

    def __init__(
        self, transformer: nn.Module, pooling: str = "auto", *, projection: int | None = None
    ) -> None:
        """Wrap a transformer; learnt pooling starts out as the mean.

        Args:
            transformer: A Hugging Face model without pooler.
            pooling: Name of the pooling.
            projection: Width of the vectors where a learnt projection, at first random, is to give
                them another than the hidden states have.

        Raises:
            ConfigError: The architecture is not supported, or the pooling does not fit it.
        """
        super().__init__()
        config: Any = transformer.config
        self.architecture: Architecture = find_architecture(config.model_type)(transformer)
        self.pooling = resolve_pooling(pooling, causal=self.architecture.causal)
        self.transformer = transformer
        learnt_pooling = build_pooling(self.pooling, int(config.hidden_size))
        additions = nn.ModuleDict({"pooling": learnt_pooling, "adapters": nn.ModuleDict()})
        if projection is not None:
            additions["projection"] = nn.Linear(int(config.hidden_size), projection, bias=False)
        transformer.add_module(ADDITIONS, additions)
        self._checkpointing = False

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.transformer.config

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, lowest first."""
        return self.architecture.layers

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def dimension(self) -> int:
        """Width of the vectors; that of the hidden states where there is no projection."""
        return self.width if self.projection is None else self.projection.out_features

    @property
    def longest_text(self) -> int:
        """Most tokens the encoder has positions for."""
        return self.architecture.longest_text

    @property
    def adapters(self) -> nn.ModuleDict:
        """Bottleneck adapters by the number of the layer they follow, as text."""
        return cast("nn.ModuleDict", self.transformer.get_submodule(f"{ADDITIONS}.adapters"))

    @property
    def learnt_pooling(self) -> nn.Module:
        """The pooling; it has weights where :attr:`pooling` is ``attention``."""
        return self.transformer.get_submodule(f"{ADDITIONS}.pooling")

    @property
    def projection(self) -> nn.Linear | None:
        """From pooled hidden states to vectors, where these have another width."""
        additions = cast("nn.ModuleDict", self.transformer.get_submodule(ADDITIONS))
        return cast("nn.Linear", additions["projection"]) if "projection" in additions else None

    @property
    def top(self) -> list[nn.Module]:
        """What follows the last layer: final norm, pooling, projection, where there are any."""
        modules = (self.architecture.final_norm, self.learnt_pooling, self.projection)
        return [module for module in modules if module is not None]

    def add_adapter(self, layer: int, width: int) -> None:
        """Put a bottleneck adapter of ``width`` behind a layer."""
        self.adapters[str(layer)] = BottleneckAdapter(self.width, width).to(self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Embedding output ``[texts, tokens, width]`` of token ids ``[texts, tokens]``."""
        return self.architecture.embed(ids)

    def run_layers(self, hidden: Tensor, mask: Tensor, start: int, stop: int) -> Tensor:
        """Run layers ``start`` to ``stop - 1``.

        Args:
            hidden: Input of layer ``start``, ``[texts, tokens, width]``.
            mask: True where there is a token, ``[texts, tokens]``; padding is on the right.
            start: First layer.
            stop: One past the last layer.
        """
        arguments = self.architecture.layer_arguments(hidden, mask)
        for number in range(start, stop):
            if self._checkpointing and torch.is_grad_enabled():
                hidden = cast(
                    "Tensor",
                    checkpoint(
                        self._run_layer, number, hidden, arguments[number], use_reentrant=False
                    ),
                )
            else:
                hidden = self._run_layer(number, hidden, arguments[number])
        return hidden

    def _run_layer(self, number: int, hidden: Tensor, arguments: LayerArguments) -> Tensor:
        output = self.layers[number](hidden, **arguments)
        hidden = output[0] if isinstance(output, tuple) else output
        name = str(number)
        return self.adapters[name](hidden) if name in self.adapters else hidden

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Final norm where the family has one, pooling, projection where there is one, unit length.

        Args:
            hidden: Output of the last layer, ``[texts, tokens, width]``.
            mask: True where there is a token, ``[texts, tokens]``; each text has at least one.

        Returns:
            Unit vectors ``[texts, dimension]`` float32.
        """
        norm = self.architecture.final_norm
        normed = hidden if norm is None else norm(hidden)
        pooled = self.learnt_pooling(normed.to(torch.float32), mask)
        if self.projection is not None:
            pooled = self.projection(pooled).to(torch.float32)  # autocast makes it bfloat16
        return functional.normalize(pooled, dim=-1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors ``[texts, dimension]`` of token ids ``[texts, tokens]``."""
        hidden = self.run_layers(self.embed(ids), mask, 0, len(self.layers))
        return self.pool(hidden, mask)

    def use_checkpointing(self, on: bool) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them."""
        self._checkpointing = on

    @property
    def attends_openly(self) -> bool:
        """Whether attention of short texts is not fused; see :mod:`recflow.modeling.attention`."""
        return self.config._attn_implementation == attention.NAME

    def use_open_attention(self, on: bool) -> None:
        """Choose between open and fused attention, where the family has both."""
        if self.config._attn_implementation in (attention.NAME, attention.FUSED):
            self.config._attn_implementation = attention.NAME if on else attention.FUSED

    def compile_layers(self, start: int) -> None:
        """Compile the layers from ``start`` on with ``torch.compile``, for any number of tokens.

        Raises:
            ConfigError: There is no C++ compiler.
        """
        from torch._inductor import config as inductor  # slow to import, and rarely needed

        compiler = str(inductor.cpp.cxx[-1])
        if shutil.which(compiler) is None:
            raise ConfigError.of(
                "compile",
                True,
                f"false where there is no {compiler}: install a C++ compiler (g++, package "
                "build-essential) or name one in CXX",
            )
        for layer in self.layers[start:]:
            layer.compile(dynamic=True)


@contextmanager
def torch_threads(threads: int | None) -> Generator[None]:
    """Let torch use this many threads inside the block; ``None`` leaves it as it is."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mixed_precision(device: torch.device | str = "cpu", wanted: bool = True) -> torch.autocast:
    """Autocast to bfloat16 where the device multiplies it natively; else a no-op.

    Vectors keep a cosine of .9999 to float32; matrices multiply two to three times as fast.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=wanted and _multiplies_bfloat16(kind))


def _multiplies_bfloat16(kind: str) -> bool:
    """Whether this kind of device multiplies bfloat16 natively."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    return kind == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def hold_in_bfloat16(encoder: TextEncoder) -> None:
    """Keep matrices and embedding tables in bfloat16 where the processor multiplies it.

    Half the memory, and autocast need not round the matrices again at every call. Elsewhere the
    weights stay in float32, which is faster there.
    """
    if _multiplies_bfloat16(encoder.device.type):
        for module in encoder.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.to(torch.bfloat16)


class TorchRuntime:
    """Executes an encoder with PyTorch, in bfloat16 where the processor has it."""

    def __init__(self, encoder: TextEncoder, threads: int | None, *, mixed: bool = True) -> None:
        """Prepare.

        Args:
            encoder: Used in evaluation mode, on the device where it is.
            threads: Threads torch may use; ``None`` leaves that as it is.
            mixed: Whether bfloat16 may be used; else float32.
        """
        self._encoder, self._threads, self._mixed = encoder.eval(), threads, mixed
        self.dimension = encoder.dimension

    def __call__(self, tokens: list[list[int]]) -> Vectors:
        """Encode one padded batch."""
        device = self._encoder.device
        ids, mask = (torch.from_numpy(array).to(device) for array in pad_tokens(tokens))
        with (
            torch_threads(self._threads),
            torch.inference_mode(),
            mixed_precision(device, self._mixed),
        ):
            return self._encoder(ids, mask).cpu().numpy()


def load_pretrained(directory: Path, *, pooling: str = "auto") -> TextEncoder:
    """Load a Hugging Face model directory, refusing what would be initialised at random.

    Args:
        directory: Holds ``config.json``, ``tokenizer.json`` and ``model.safetensors``, or its
            shards with ``model.safetensors.index.json``.
        pooling: Name of the pooling; ``auto`` is the mean for encoders, the last token for
            decoders. The weights of ``attention`` start out as the mean.

    Raises:
        ArtifactError: The directory, its weights, or some of them are missing, or the tokenizer
            belongs to another vocabulary.
        ConfigError: The architecture is not supported, or the pooling does not fit it.
    """
    _require_files(directory)
    architecture = find_architecture(_model_type(directory / CONFIG_NAME))
    with _quiet_transformers():
        try:
            model, loading = AutoModel.from_pretrained(
                directory,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,
                **architecture.model_arguments,
            )
        except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
            raise ArtifactError(f"{directory} cannot be loaded as an encoder: {error}") from error
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(_POOLER))
    if missing:
        raise ArtifactError(
            f"the weights in {directory} lack {len(missing)} tensors, e.g. {missing[:3]}; "
            "they would be random. Use the complete model."
        )
    encoder = TextEncoder(model, pooling).eval()
    check_vocabulary(encoder, TextTokenizer(directory / TOKENIZER_NAME, max_tokens=8))
    return encoder


def _require_files(directory: Path) -> None:
    """Raise ArtifactError unless the files of a base model are there."""
    wanted = [CONFIG_NAME, TOKENIZER_NAME]
    if not (directory / SHARDS_NAME).is_file():
        wanted.append(WEIGHTS_NAME)
    for name in wanted:
        if not (directory / name).is_file():
            raise ArtifactError(
                f"{directory / name} is missing; a base model is a directory with "
                f"{CONFIG_NAME}, {TOKENIZER_NAME}, and {WEIGHTS_NAME} or its shards with "
                f"{SHARDS_NAME}"
            )


def _model_type(file: Path) -> object:
    """The ``model_type`` of a ``config.json``."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON: {error}") from error
    return config.get("model_type") if isinstance(config, dict) else None


def check_vocabulary(encoder: TextEncoder, tokenizer: TextTokenizer) -> None:
    """Raise unless the tokenizer's vocabulary can be the encoder's.

    Each token needs a row of the embedding table; rows without a token may be padding and room for
    special tokens to come: fewer than 128, or than 0.5 % of the table.

    Raises:
        ArtifactError: The sizes cannot belong together.
    """
    rows = int(encoder.config.vocab_size)
    most_unused = max(_VOCABULARY_PADDING, round(rows * _RESERVED_SHARE))
    if not 0 <= rows - tokenizer.vocabulary_size < most_unused:
        raise ArtifactError(
            f"{tokenizer.path} has {tokenizer.vocabulary_size} tokens but the encoder has "
            f"embeddings for {rows}: the tokenizer belongs to another model"
        )


def describe_encoder(encoder: TextEncoder) -> dict[str, Any]:
    """JSON description from which :func:`build_encoder` makes the same modules."""
    config = json.loads(encoder.config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(key, None)
    layers = encoder.architecture.shapes if isinstance(encoder.architecture, Bert) else []
    return {
        "transformer": config,
        "pooling": encoder.pooling,
        "adapters": {
            number: cast("BottleneckAdapter", adapter).width
            for number, adapter in encoder.adapters.items()
        },
        "layers": [{"heads": shape.heads, "channels": shape.channels} for shape in layers],
        "projection": None if encoder.projection is None else encoder.dimension,
        "ranks": ranks_of(encoder.transformer),
    }


def build_encoder(description: dict[str, Any]) -> TextEncoder:
    """Make an encoder of the described sizes; its weights hold anything until they are loaded.

    A description without the key ``projection`` is of an encoder that has none, one without
    ``ranks`` of an encoder without low-rank matrices.

    Raises:
        ArtifactError: The description is not one of :func:`describe_encoder`.
    """
    try:
        raw = dict(description["transformer"])
        architecture = find_architecture(raw["model_type"])
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        with _quiet_transformers(), no_init_weights():
            transformer = AutoModel.from_config(config, **architecture.model_arguments)
        projection = description.get("projection")
        encoder = TextEncoder(
            transformer,
            description["pooling"],
            projection=None if projection is None else int(projection),
        )
        adapters = {int(number): int(width) for number, width in description["adapters"].items()}
        shapes = [LayerShape(int(s["heads"]), int(s["channels"])) for s in description["layers"]]
    except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise ArtifactError(f"the encoder's description cannot be used: {error!r}") from error
    if not adapters.keys() <= set(range(len(encoder.layers))):
        raise ArtifactError(
            f"adapters behind the layers {sorted(adapters)} of {len(encoder.layers)} layers"
        )
    for number, width in adapters.items():
        encoder.add_adapter(number, width)
    if isinstance(encoder.architecture, Bert):
        if len(shapes) != len(encoder.layers):
            raise ArtifactError(f"{len(shapes)} layer sizes for {len(encoder.layers)} layers")
        for index, shape in enumerate(shapes):
            encoder.architecture.resize(index, shape)
    try:
        ranks = {str(name): int(rank) for name, rank in description.get("ranks", {}).items()}
        factorise(encoder.transformer, ranks)
    except (AttributeError, TypeError, ValueError, ConfigError) as error:
        raise ArtifactError(f"the encoder's ranks cannot be used: {error!r}") from error
    return encoder.eval()


def layer_of(encoder: TextEncoder, parameter_name: str) -> int:
    """Which layer a weight belongs to, for learning rates that decay from layer to layer.

    Args:
        encoder: The encoder.
        parameter_name: A name of ``encoder.named_parameters()`` or ``encoder.state_dict()``.

    Returns:
        0 for embeddings and what all layers share, 1 to ``len(encoder.layers)`` for the layers
        and the adapters behind them, one more for the final norm, the pooling and the projection.
    """
    modules = {module: name for name, module in encoder.named_modules()}
    if any(parameter_name.startswith(f"{modules[module]}.") for module in encoder.top):
        return len(encoder.layers) + 1
    for module in (encoder.layers, encoder.adapters):
        prefix = f"{modules[module]}."
        if parameter_name.startswith(prefix):
            return int(parameter_name.removeprefix(prefix).split(".")[0]) + 1
    return 0


def weights_digest(encoder: TextEncoder, below: int) -> str:
    """SHA-256 of what the input of layer ``below`` depends on.

    That is the configuration, and the weights of the embeddings and of the layers below; not those
    of the layers from ``below`` on, nor of the pooling and the projection.
    """
    description = describe_encoder(encoder)
    adapters = {n: width for n, width in description["adapters"].items() if int(n) < below}
    content = [description["transformer"], description["layers"][:below], adapters]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, value in sorted(encoder.state_dict().items()):
        if layer_of(encoder, name) <= below:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_encoder(encoder: TextEncoder, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights under their Hugging Face names; sparse matrices packed.

    Args:
        encoder: Its weights are float32.
        path: File to write.
        dtype: What the weights are rounded to; :func:`load_weights` widens them again.

    Raises:
        ArtifactError: LoRA's matrices are still beside those of the encoder.
    """
    state = encoder.transformer.state_dict()
    if any(".base_layer." in name for name in state):
        raise ArtifactError(f"{path} is not written: merge the encoder's LoRA matrices first")
    rounded = {name: value.detach().to(dtype).contiguous() for name, value in state.items()}
    tensors, metadata = pack(rounded)
    save_file(tensors, path, metadata=metadata or None)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load ``path`` into ``module``; every weight must be there, with its shape, and no other.

    Raises:
        ArtifactError: The file is missing, damaged, or of another model.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; rebuild the model")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        module.load_state_dict(unpack(load_file(path), metadata), strict=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path} does not hold the weights of this model: {error}") from error


@contextmanager
def _quiet_transformers() -> Generator[None]:
    """Silence the loading report and the progress bar; what is missing is checked above."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
