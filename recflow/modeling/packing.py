"""Sparse tensors on disk: one bit a weight that says whether it is zero, and the others in a row.

Half of the weights at zero make a float32 tensor 53 % as large: ``1/32 + 1/2``. Packing is exact,
down to the sign of a zero, and costs nothing once a file is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_KEY = "packed"  # of the file's metadata: the shape of each packed tensor
_MASK, _VALUES = ".packed_mask", ".packed_values"
_WORTH_IT = 0.9  # share of its size that a tensor may still have to be packed
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Pack the matrices that become clearly smaller by it.

    Returns:
        What to write instead: other tensors as they are, a packed one as its mask ``uint8`` and its
        values; and the metadata that :func:`unpack` needs, empty where nothing is packed.
    """
    written: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim < 2:
            written[name] = tensor
            continue
        flat = tensor.detach().cpu().contiguous().flatten()
        kept = flat.view(_BITS[flat.element_size()]) != 0
        size = int(kept.sum()) * flat.element_size() + math.ceil(len(flat) / 8)
        if size > _WORTH_IT * flat.element_size() * len(flat):
            written[name] = tensor
            continue
        shapes[name] = list(tensor.shape)
        written[name + _MASK] = torch.from_numpy(np.packbits(kept.numpy()))
        written[name + _VALUES] = flat[kept]
    return written, {_KEY: json.dumps(shapes, sort_keys=True)} if shapes else {}


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> dict[str, Tensor]:
    """What :func:`pack` was given.

    Args:
        tensors: Tensors of a file.
        metadata: The file's metadata.

    Raises:
        ValueError: A packed tensor is not whole.
    """
    whole = dict(tensors)
    shapes: dict[str, list[int]] = json.loads((metadata or {}).get(_KEY, "{}"))
    for name, shape in shapes.items():
        if name + _MASK not in whole or name + _VALUES not in whole:
            raise ValueError(f"{name} lacks its mask or its values")
        mask, values = whole.pop(name + _MASK), whole.pop(name + _VALUES)
        count = math.prod(shape)
        if mask.dtype != torch.uint8 or len(mask) != math.ceil(count / 8):
            raise ValueError(f"the mask of {name} is not that of {shape}")
        kept = torch.from_numpy(np.unpackbits(mask.numpy(), count=count)).bool()
        if int(kept.sum()) != len(values):
            raise ValueError(f"{name} has {len(values)} values for {int(kept.sum())} places")
        whole[name] = values.new_zeros(count).masked_scatter_(kept, values).view(shape)
    return whole
