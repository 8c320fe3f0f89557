"""Muon for mixtures: every expert of a stack is a matrix of its own (https://arxiv.org/abs/2502.16982).

`M = mu M + (1 - mu) G`, `O = NewtonSchulz(G + mu (M - G))`, `W = W (1 - lr wd) - lr c O` with torch's conventions
(`torch.optim.Muon`, which refuses stacks). Letters: E experts, A rows, B columns.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..modeling import moe_layers
from .parameters import group_of_each

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
}


def orthogonalized(matrices: torch.Tensor, steps: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """Newton-Schulz's quintic iteration for each matrix of (..., A, B), in bfloat16; a matrix of zeros stays zeros.

    Its singular values end near 1, not at 1 (0.7 to 1.2): the coefficients are for speed.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    shape, x = x.shape, x.flatten(0, -3) if x.dim() > 2 else x[None]
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.view(shape).mT if tall else x.view(shape)


class Muon(torch.optim.AdamW):
    """Muon for the groups that have `muon=True`, AdamW for the others; `muon_groups` makes them.

    A parameter of a Muon group is a matrix (A, B) or a stack of matrices (E, A, B). Fused gate and up projections are
    two matrices each: a group's `fused_pair` says whether they lie side by side (`chunk`) or take turns
    (`interleave`), and along which dimension.

    Args:
        params: groups. A Muon group may have `momentum` (0.95), `nesterov` (True), `adjust_lr_fn` and
            `fused_pair`.
        lr, weight_decay: of groups without their own.
        adjust_lr_fn: `match_rms_adamw`, with which AdamW's learning rate and weight decay fit, or `original`.
        options: AdamW's.

    Raises:
        ValueError: an unknown adjustment, a Muon parameter with other than two or three dimensions.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        adjust_lr_fn: str = "match_rms_adamw",
        **options: Any,
    ) -> None:
        if adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"adjust_lr_fn={adjust_lr_fn!r} is unknown; choose from {sorted(ADJUSTMENTS)}.")
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)
        for group in self.param_groups:
            if not group.setdefault("muon", False):
                continue
            group.setdefault("adjust_lr_fn", adjust_lr_fn)
            group.setdefault("momentum", 0.95)
            group.setdefault("nesterov", True)
            group.setdefault("fused_pair", None)
            if wrong := [tuple(p.shape) for p in group["params"] if p.dim() not in (2, 3)]:
                raise ValueError(f"A parameter of shape {wrong[0]} is neither a matrix nor a stack: not for Muon.")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self.update(parameter, group)
        return loss

    def update(self, parameter: torch.Tensor, group: Mapping[str, Any]) -> None:
        """One step of one matrix or stack."""
        state, momentum, grad = self.state[parameter], group["momentum"], parameter.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
            state["step"] = torch.zeros(())  # AdamW asks every parameter's state for it when it is loaded
        buffer = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for weight, piece in zip(pieces(parameter, group["fused_pair"]), pieces(update, group["fused_pair"])):
            scale = ADJUSTMENTS[group["adjust_lr_fn"]](*piece.shape[-2:])
            weight.add_(orthogonalized(piece).to(weight.dtype), alpha=-group["lr"] * scale)


def pieces(tensor: torch.Tensor, fused: tuple[str, int] | None) -> tuple[torch.Tensor, ...]:
    """Views of the matrices that lie in a tensor side by side."""
    if fused is None:
        return (tensor,)
    how, dim = fused
    if how == "chunk":
        return tensor.chunk(2, dim=dim)
    even, odd = tensor.unflatten(dim, (-1, 2)).unbind(dim % tensor.dim() + 1)
    return even, odd


class MuonForMixtures:
    """For `Trainer(optimizer_cls_and_kwargs=(MuonForMixtures, {"lr": ..., "weight_decay": ...}))`.

    Keywords: `lr`, `adamw_lr` (the same unless given) for embeddings, head, norms, biases and routers,
    `weight_decay`, and those of `Muon`.
    """

    def __call__(self, model: Any, lr: float = 1e-3, adamw_lr: float | None = None, **options: Any) -> Muon:
        return Muon(muon_groups(model, lr, adamw_lr), lr=lr, **options)


def muon_groups(model: Any, lr: float, adamw_lr: float | None = None) -> list[dict[str, Any]]:
    """The parameters that train: matrices and stacks of experts for Muon; embeddings, head, routers, and what has one
    dimension for AdamW, the latter without weight decay."""
    kinds = group_of_each(model)
    fused = dict(fused_stacks(model))
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.dim() in (2, 3) and kinds[name] not in ("embeddings", "router", "norms")
        is_bias = parameter.dim() == 2 and kinds[name] == "experts"  # a bias per expert
        settings: dict[str, Any] = {"muon": is_matrix and not is_bias, "lr": lr}
        if settings["muon"]:
            settings["fused_pair"] = fused.get(parameter)
        else:
            settings["lr"] = lr if adamw_lr is None else adamw_lr
            if parameter.dim() == 1 or is_bias:
                settings["weight_decay"] = 0.0
        groups.setdefault(tuple(settings.items()), {**settings, "params": []})["params"].append(parameter)
    return list(groups.values())


def fused_stacks(model: Any) -> Iterator[tuple[nn.Parameter, tuple[str, int]]]:
    """Yield every stack of fused gate and up projections, and how they lie in it."""
    for layer in moe_layers(model):
        stack = getattr(layer.experts, "gate_up_proj", None)
        if isinstance(stack, nn.Parameter):
            how = "chunk" if getattr(layer.experts, "is_concatenated", True) else "interleave"
            yield stack, (how, -1 if layer.transposed else -2)
