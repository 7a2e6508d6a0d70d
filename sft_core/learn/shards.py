"""Weights that ranks share out (FSDP2): each keeps its part of every tensor, of its gradient and of its moments.

A pass gathers the weights of one layer at a time. Whoever needs all of them, the sampler and a checkpoint, has them
gathered into a plain copy of the model. What gathers is called by all ranks at the same time.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from sft_core.config import OptimConfig
from sft_core.learn import ranks
from sft_core.learn.rows import Rows, Tokens
from sft_core.model.backbone import without_adapter
from sft_core.model.half import half_twin, halve
from sft_core.model.policy import Policy

T = TypeVar("T")

# Of models that return a part of their logits; what a model returns is not changed in place here.
VIEWS = "FSDP2-wrapped module .* returned a view tensor"


def in_parts(policy: Policy, config: OptimConfig) -> Policy:
    """The policy, under --parallel fsdp with this rank's part of the weights alone. Its model is changed in place."""
    if config.parallel != "fsdp" or ranks.world() == 1:
        return policy
    hollow = copy.deepcopy(policy.model, {id(p): _empty(p) for p in policy.model.parameters()})
    share_out(policy.model)
    return replace(policy, hollow=hollow)


def share_out(model: Any) -> None:
    """Keep this rank's part of the weights. Each layer's are gathered by themselves, and so are those around them."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    names = without_adapter(model)._no_split_modules or []
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for module in reversed(list(model.modules())):  # the inner ones first
        # Weights that several layers use, or an embedding that is the head, too, stay with those around the layers.
        if type(module).__name__ in names and all(uses[id(p)] == 1 for p in module.parameters()):
            fully_shard(module)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are sums, not means (which gloo in torch 2.8 does not know)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.computing = MethodType(lambda model, compute: compute(), model)
    register_fsdp_forward_method(model, "computing")


def is_shared(model: Any) -> bool:
    """Whether this rank holds a part of it only."""
    return hasattr(model, "computing")


def in_one_pass(model: Any, compute: Callable[[], T]) -> T:
    """Call `compute`, which uses parts of the model one after the other and returns tensors: a forward pass, although
    none of the model's own."""
    if not is_shared(model):
        return compute()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", VIEWS)
        computed: T = model.computing(compute)
    if not torch.is_grad_enabled():
        model.reshard()  # what a backward pass would do
    return computed


def passes(rows: Rows, size: int | Tokens, model: Any) -> Iterator[tuple[slice, Rows, bool]]:
    """This rank's micro-batches, and whether each counts: since all ranks pass theirs at the same time where weights
    are shared out, one with fewer of them than another passes its last again."""
    mine = list(rows.micro_batches(size))
    yield from ((*each, True) for each in mine)
    if is_shared(model):
        most = max(len(rows.ends(rows.part(i, ranks.world()), size)) - 1 for i in range(ranks.world()))
        again = mine[-1] if mine else (slice(0, 1), rows.cut(0, 1))
        yield from ((*again, False) for _ in range(most - len(mine)))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that each rank has whole, flat or not, what belongs to the place of `like`."""
    tensor = tensor.to(like.device).view(like.shape)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def model_to_sample(policy: Policy) -> Iterator[Any]:
    """The model as the sampler uses it: whole, and under autocast with matrices in half precision."""
    if policy.hollow is None:
        with half_twin(policy.model, policy.half_dtype) as model:
            yield model
    else:
        twin = copy.deepcopy(policy.hollow)
        if policy.half_dtype:
            halve(twin, policy.half_dtype, tied=True)
        yield _filled(twin, policy.model, policy.device)


def whole_policy(policy: Policy, everywhere: bool = False) -> Policy:
    """The policy with all weights, on the CPU, where they are shared out: on rank 0, elsewhere too only if asked."""
    if policy.hollow is None:
        return policy
    cpu = torch.device("cpu") if everywhere or ranks.first() else None
    return replace(policy, model=_filled(copy.deepcopy(policy.hollow), policy.model, cpu), hollow=None)


@torch.no_grad()
def load_weights(policy: Policy, read: Callable[[Policy], None]) -> None:
    """Let `read` change the weights of a policy that has them whole."""
    plain = whole_policy(policy, everywhere=True)
    read(plain)
    if plain is not policy:
        found = dict(plain.model.named_parameters())
        for name, parameter in policy.model.named_parameters():
            parameter.copy_(part_of(found[name], parameter))


@torch.no_grad()
def _filled(hollow: Any, model: Any, device: torch.device | None) -> Any:
    """Put the weights of a model into its hollow copy, in the copy's own dtypes; None: only help others to do so."""
    shared, made = dict(model.named_parameters(remove_duplicate=False)), dict[int, Parameter]()
    with ranks.at_once("weights"):
        for name, empty in list(hollow.named_parameters(remove_duplicate=False)):
            if id(empty) not in made:
                full = whole(shared[name])
                kept = full.to(device, empty.dtype) if device else empty.detach()
                made[id(empty)] = Parameter(kept, empty.requires_grad)
            module, _, leaf = name.rpartition(".")
            setattr(hollow.get_submodule(module), leaf, made[id(empty)])
    return hollow


def _empty(parameter: Parameter) -> Parameter:
    return Parameter(parameter.detach().to("meta"), parameter.requires_grad)
