"""Half-precision copies of the matrices, for models without gradient: sampler, reference, LoRA's frozen base.

Autocast casts a float32 matrix to half precision wherever it is used; without a gradient, again for each token that
is decoded. Cast once, the products are exactly the same numbers. Everything else (embeddings, norms, the residual
stream) stays as it is, and shared: a twin costs two bytes for each weight of a matrix, and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D


def halve(model: Any, dtype: torch.dtype, tied: bool = False, trained: bool = True) -> None:
    """Cast the matrices that autocast would cast, in place. A head that shares its weights with the embedding keeps
    them, unless `tied`: then it gets a copy of its own. With `trained=False` what has a gradient stays."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and (tied or id(module.weight) not in embeddings):
            for name, parameter in list(module.named_parameters(recurse=False)):
                # Not float32: halved before, or packed in 4 bits.
                if parameter.dtype == torch.float32 and (trained or not parameter.requires_grad):
                    setattr(module, name, Parameter(parameter.detach().to(dtype), requires_grad=False))


@contextmanager
def half_twin(model: Any, dtype: torch.dtype | None) -> Iterator[Any]:
    """The model for a sampler: its twin in this half precision, or the model itself where that is None.

    The twin is made from the current weights and thrown away afterwards: while completions are sampled there are no
    gradients, and their memory is more than the twin takes.
    """
    if dtype is None:
        yield model
        return
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    halve(twin, dtype, tied=True)
    yield twin
