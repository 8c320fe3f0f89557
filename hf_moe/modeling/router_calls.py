"""Every call of every router of a model, ours or native, as one kind of event; balancing, metrics, replay read it.

Letters: B rows of T tokens, N = B T, E experts, K chosen per token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .anatomy import MoeLayer, moe_layers, unwrapped
from .context import NO_CONTEXT, ForwardContext
from .ops.recomputation import is_recomputed
from .packing import find_segments, padding_mask
from .routers.base import Routing


class GateOutput(NamedTuple):
    """What a gate decided."""

    logits: torch.Tensor  # (N, E)
    weights: torch.Tensor  # (N, K) combine weights
    indices: torch.Tensor  # (N, K)


@dataclass(frozen=True)
class RouterCall:
    """One call of one router, with its gradient graph.

    Args:
        layer: whose router it is.
        gate: the module that was called; of `chain_of_experts` it may be one of the later gates.
        logits: (N, E) as the gate returns them, experts without parameters behind the others.
        weights: (N, K) combine weights; a slot of weight 0 in one of our routers is not used.
        indices: (N, K) chosen experts.
        context: rows, padding and packed sequences of the forward pass.
        recomputed: whether activation checkpointing repeats a call that has been seen before.
    """

    layer: MoeLayer
    gate: nn.Module
    logits: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor
    context: ForwardContext
    recomputed: bool

    @property
    def token_mask(self) -> torch.Tensor | None:
        """(N,) False for padding, on the device of the logits; None if there is none."""
        mask = self.context.token_mask
        return None if mask is None else mask.to(self.logits.device)

    @property
    def sequence_ids(self) -> torch.Tensor:
        """(N,) equal for the tokens of one sequence, also where several are packed into a row."""
        return self.context.sequence_ids(self.logits)


# may return (logits, weights) to put in place of the gate's own
Watcher = Callable[[RouterCall], tuple[torch.Tensor, torch.Tensor] | None]


def watch_routers(model: Any, watcher: Watcher) -> list[Any]:
    """Call `watcher` after every call of a router.

    Args:
        model: of a type that `moe_layers` knows, also under the wrappers that trainers and PEFT put around it.
        watcher: gets a `RouterCall`. What it returns, `(logits, weights)`, replaces what the gate returned.

    Returns:
        Handles of the hooks; `remove()` each to leave the model as it was.
    """
    rows = CurrentRows()
    handles = [rows.follow(model)]
    for layer in moe_layers(model):
        if type(unwrapped(layer.gate)).__name__ == "DbrxRouter":
            raise ValueError(
                "DBRX's router returns logits only, and its block makes weights of them: it cannot be watched."
            )
        for gate in (layer.gate, *layer.later_gates):
            handles.append(gate.register_forward_hook(_hook(layer, watcher, rows), prepend=True))
    return handles


@contextmanager
def watched_routers(model: Any, watcher: Watcher) -> Iterator[None]:
    """`watch_routers` for the forward passes inside a `with` block."""
    handles = watch_routers(model, watcher)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class CurrentRows:
    """What the decoder was called with, for hooks that see flattened tokens only."""

    def __init__(self) -> None:
        self.context = NO_CONTEXT

    def follow(self, model: Any) -> Any:
        """Remember the rows of every forward pass; returns the hook's handle."""
        decoder = next(m for m in model.modules() if isinstance(m, PreTrainedModel) and m.base_model is m)
        return decoder.register_forward_pre_hook(self.remember, with_kwargs=True)

    def remember(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every forward pass of the decoder."""
        self.context = rows_of(args, kwargs)


def rows_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardContext:
    """Shape, padding and packed sequences of a decoder's arguments."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if tokens is None or tokens.dim() < 2:
        return NO_CONTEXT
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    real = padding_mask(mask, tokens.shape[1])
    packed = {name: kwargs.get(name) for name in ("position_ids", "cu_seq_lens_q", "seq_idx")}
    if packed["position_ids"] is not None and packed["position_ids"].dim() != 2:  # positions in an image
        packed["position_ids"] = None
    cached = kwargs.get("past_key_values") is not None
    segments = None if cached else find_segments(tokens, mask, **packed)
    return ForwardContext(
        token_mask=None if real is None else real.flatten(),
        segments=segments,
        shape=(tokens.shape[0], tokens.shape[1]),
    )


def _hook(layer: MoeLayer, watcher: Watcher, rows: CurrentRows) -> Callable[..., Any]:
    def called(gate: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        found = read_gate(gate, output)
        call = RouterCall(layer, gate, found.logits, found.weights, found.indices, rows.context, is_recomputed())
        changed = watcher(call)
        return None if changed is None else replace_in(gate, output, *changed)

    return called


def read_gate(gate: nn.Module, output: Any) -> GateOutput:
    """What a gate's forward pass returned, in one order.

    Raises:
        TypeError: a gate that returns something else.
    """
    if isinstance(output, Routing):
        return GateOutput(output.logits, output.weights, output.indices)
    if type(gate).__name__ == "JetMoeTopKGating":
        return _read_sorted(output)
    if type(gate).__name__ == "Llama4Router":  # weights of all experts, 0 for those not chosen
        weights, logits = output
        indices = logits.topk(gate.top_k, dim=-1).indices
        return GateOutput(logits, weights.gather(1, indices), indices)
    if type(gate).__name__ == "ZayaRouter":  # a token that skips the experts stands there as expert 0 with weight 0
        return GateOutput(output[0], output[1], output[2].masked_fill(output[1] == 0, gate.num_experts))
    if type(gate).__name__ == "Gemma4TextRouter":  # probabilities
        return GateOutput(output[0].log(), *output[1:])
    if isinstance(output, tuple) and len(output) >= 3 and output[1].shape == output[2].shape:
        return GateOutput(*output[:3])
    raise TypeError(f"{type(gate).__name__} does not return (logits, weights, indices): its calls cannot be read.")


def replace_in(gate: nn.Module, output: Any, logits: torch.Tensor, weights: torch.Tensor) -> Any:
    """The gate's output with other logits and weights."""
    if isinstance(output, Routing):
        return output._replace(logits=logits, weights=weights)
    if type(gate).__name__ == "JetMoeTopKGating":
        order, tokens, _, sizes, _ = output
        return order, tokens, weights.flatten()[order], sizes, logits
    if type(gate).__name__ == "Llama4Router":
        indices = output[1].topk(gate.top_k, dim=-1).indices
        return torch.zeros_like(output[0]).scatter(1, indices, weights), logits
    if type(gate).__name__ == "Gemma4TextRouter":
        return (logits.exp(), weights, *output[2:])
    return (logits, weights, *output[2:])


def _read_sorted(output: tuple[Any, ...]) -> GateOutput:
    """JetMoE's gate returns its slots sorted by expert: order (N K,), tokens, weights, numbers per expert, logits."""
    order, _, weights, sizes, logits = output
    slots = order.argsort()  # where each slot went
    experts = torch.arange(len(sizes), device=order.device)
    indices = experts.repeat_interleave(torch.tensor(sizes, device=order.device))[slots]
    shape = (logits.shape[0], -1)
    return GateOutput(logits, weights[slots].view(shape), indices.view(shape))


def scores(call: RouterCall) -> torch.Tensor:
    """(N, E) what the router gave every expert, in float32: softmax over all of them, sigmoid, or its own function."""
    logits = call.logits.float()
    if isinstance(getattr(call.gate, "scores", None), Callable):
        return call.gate.scores(call.logits)  # pyright: ignore[reportCallIssue] - ours
    if call.layer.scoring == "score_fn":
        return call.gate.score_fn(logits)  # pyright: ignore[reportCallIssue]
    return logits.sigmoid() if call.layer.scoring == "sigmoid" else logits.softmax(-1)
