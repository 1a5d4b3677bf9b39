"""Inner optimizers by the names in `run.toml`.

One or two optimizers of torch that the trainer sees as one. Their state is known by the names of parameters, and goes
in and out tensor by tensor as what it is for the whole parameter, so that a checkpoint fits however many ranks share
the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import SGD, AdamW, Optimizer

from shared.config import InnerTable
from shared.errors import ConfigError
from site_agent.training.muon import Muon

Rule = Callable[..., Optimizer]
FEW = 1 << 20
"""Elements that a core's cache holds, of parameters, gradients and moments."""
BETAS = (0.9, 0.95)
"""AdamW's βs as is usual for language models."""


class InnerOptimizer:
    """Optimizers of torch over named parameters, each of them in one."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        self._places = {
            name: (optimizer, parameter)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        self.rules = {name: type(optimizer).__name__ for name, (optimizer, _) in self._places.items()}
        """Of every trained parameter, by name: what steps it."""

    def set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def reset(self) -> None:
        """As if no step had been taken."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    def state(self, wanted: bool = True) -> Iterator[tuple[str, str, Any]]:
        """(parameter, key, value) of all state: copies on the CPU of whole tensors, and plain values.

        Where ranks share the model each tensor is gathered when its turn comes: all of them iterate to the end. Those
        that do not want it copy nothing, and are given None.
        """
        for name, (optimizer, parameter) in self._places.items():
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                if isinstance(whole, Tensor):
                    whole = whole.detach().to("cpu", copy=True) if wanted else None
                yield name, key, whole if wanted else None

    def load_state(self, state: Iterable[tuple[str, str, Any]]) -> None:
        """The inverse of `state`, in place of all that was there; of whole tensors each rank keeps its own part, and no
        rank asks another. Raises ValueError, and changes nothing, where they do not fit the parameters."""
        loaded: dict[str, dict[str, Any]] = {}
        for name, key, value in state:
            if name not in self._places:
                raise ValueError(f"there is no parameter {name} to train")
            loaded.setdefault(name, {})[key] = _placed(name, key, value, self._places[name][1])
        for optimizer in self.optimizers:
            names = [name for group in optimizer.param_groups for name in group["param_names"]]
            values = {index: loaded[name] for index, name in enumerate(names) if name in loaded}
            optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})


def _placed(name: str, key: str, value: Any, parameter: Tensor) -> Any:
    """A copy of this rank's part, on the parameter's mesh; torch moves the rest to its device."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:  # a count of steps
        return value.clone()
    if value.shape != parameter.shape:
        raise ValueError(f"{key} of parameter {name} is {list(value.shape)}, the parameter {list(parameter.shape)}")
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.to(parameter.device, copy=True)


def build_optimizer(inner: InnerTable, model: nn.Module) -> InnerOptimizer:
    """The optimizer over the model's trainable parameters. Weight decay acts on matrices only: norms and biases
    have nothing to shrink towards zero for. Raises ConfigError where Muon would have nothing to do."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if inner.optimizer == "sgd":
        return InnerOptimizer([_build(SGD, inner, trained)])
    if inner.optimizer == "adamw":
        return InnerOptimizer([_build(AdamW, inner, trained, betas=BETAS)])
    inside = hidden_matrices(model)
    if not inside:
        raise ConfigError(
            '[inner] optimizer: "muon" is for the matrices inside a network, and this model trains none besides '
            'embeddings and its output head; use "adamw"'
        )
    others = {name: parameter for name, parameter in trained.items() if name not in inside}
    matrices = {name: trained[name] for name in trained if name in inside}
    muon = Muon(_groups(inner, matrices), lr=inner.lr, weight_decay=inner.weight_decay)
    return InnerOptimizer([muon, _build(AdamW, inner, others, betas=BETAS)] if others else [muon])


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of what Muon is for: trainable matrices, except embeddings and the output head.

    The head is known by a side as long as an embedding has rows. Networks as wide as their vocabulary have many of
    those, so it is the last one that is not in a list of layers; or it is tied, and an embedding itself.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    tables = {id(module.weight) for module in embeddings}
    matrices = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dim() == 2 and min(parameter.shape) > 1 and id(parameter) not in tables
    }
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    heads = set()
    for rows in {module.num_embeddings for module in embeddings}:
        heads.update([name for name, p in matrices.items() if rows in p.shape and not name.startswith(layers)][-1:])
    return set(matrices) - heads


def _build(rule: Rule, inner: InnerTable, named: dict[str, nn.Parameter], **options: Any) -> Optimizer:
    groups = _groups(inner, named)
    for group in groups:
        group.update(kernel(rule, [parameter for _, parameter in group["params"]]))
    return rule(groups, lr=inner.lr, **options)


def _groups(inner: InnerTable, named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups by weight decay, and by mesh: a kernel over several tensors takes those of one."""
    groups: dict[tuple[bool, DeviceMesh | None], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named.items():
        groups.setdefault((parameter.dim() < 2, _mesh(parameter)), []).append((name, parameter))
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return [
        {"params": members, "weight_decay": 0.0 if vector else inner.weight_decay} for (vector, _), members in ordered
    ]


def kernel(rule: Rule, parameters: Sequence[Tensor]) -> dict[str, bool]:
    """Options of `rule` for its fastest implementation on these parameters, which are of one kind.

    On the CPU not fused AdamW, which rounds the last few elements of a tensor otherwise than those before them: ranks
    that share a model would end in other bits than one that has it alone. The others agree. Of them foreach is ten
    times faster on DTensors, and three times on few elements, where the time goes into calls; on more, its vectors do
    not fit into the caches.
    """
    like = parameters[0]
    if like.device.type == "cpu":
        few = sum(parameter.numel() for parameter in parameters) < FEW
        return {"fused": False, "foreach": few or isinstance(like, DTensor)}
    return fastest(rule, like.device, like.dtype, _mesh(like))


@cache
def fastest(rule: Rule, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh | None) -> dict[str, bool]:
    """Fused, else foreach, else plain: found by trying, because what torch can do where differs by version."""
    for choice in ({"fused": True}, {"foreach": True}):
        one = torch.zeros(1, device=device, dtype=dtype)
        if mesh is not None:
            one = DTensor.from_local(one, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter = nn.Parameter(one)
        parameter.grad = one.detach().clone()
        try:
            rule([parameter], lr=0.0, **choice).step()
        except RuntimeError:
            continue
        return choice
    return {"foreach": False}


def _mesh(parameter: Tensor) -> DeviceMesh | None:
    return parameter.device_mesh if isinstance(parameter, DTensor) else None
