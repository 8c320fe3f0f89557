"""Makes routers choose what they chose before: in recomputation, and for rollouts that another pass has made.

Letters: B rows, T tokens of a row, N = B T, L MoE layers, K experts per token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback

from ..modeling import MoeLayer, moe_layers
from ..modeling.router_calls import CurrentRows

TOP_K = (torch.topk, torch.Tensor.topk)
FREE = -1  # in place of an expert's id: the router chooses by itself


class Choice(TorchFunctionMode):
    """Watches for the one `topk` by which a router chooses its experts, and may answer it with other experts.

    The router's own code computes everything else, so that weights follow from today's logits by whatever formula the
    router has: softmax, sigmoid, group-limited, with or without a selection bias.
    """

    def __init__(self, number: int, top_k: int, pinned: torch.Tensor | None = None) -> None:
        super().__init__()
        self.number, self.top_k, self.pinned = number, top_k, pinned
        self.chosen: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in TOP_K or args[0].dim() != 2 or args[0].shape[1] != self.number:
            return result
        if result.indices.shape != (args[0].shape[0], self.top_k):
            return result
        if self.pinned is not None:
            indices = self.pinned.to(result.indices).where(self.pinned.to(result.indices) != FREE, result.indices)
            result = torch.return_types.topk((args[0].gather(1, indices), indices))
        self.chosen.append(result.indices)
        return result


class RoutingReplay(TrainerCallback):
    """Records which experts tokens were sent to, and sends them there again.

    1. Activation checkpointing runs a layer twice, and a router may choose differently the second time: a stochastic
       one by its nature, any other where kernels round differently. The gradient then goes through other experts than
       the loss came from. As a callback of any trainer, or by `pin_recomputation()`, each checkpointed layer chooses
       again what it chose. Needs non-reentrant checkpointing.
    2. In reinforcement learning the engine that generates and the policy that learns may route differently
       (https://arxiv.org/abs/2510.11370, rollout routing replay): `record()` a rollout, or take `routed_experts` from
       vLLM or SGLang, and `replay()` it in the policy's forward pass. Weights come from the policy's logits, with
       their gradient.

    Args:
        model: ours or native, of a type that `moe_layers` knows, whose routers choose a fixed number of experts by
            their scores. As a callback it may be left out: the trainer's model is taken.

    Raises:
        ValueError: no MoE layers; routers that do not choose by one `topk` (raised when they run).
    """

    def __init__(self, model: Any = None) -> None:
        self.layers: list[MoeLayer] = []
        self.plain: list[tuple[nn.Module, Any]] = []  # routers, and what already stood in for their forward
        self.rows = CurrentRows()
        self.given: Callable[[nn.Module], torch.Tensor | None] | None = None
        self.taken: Callable[[nn.Module, torch.Tensor], None] | None = None
        self.handles: list[Any] = []
        self.model: Any = None
        if model is not None:
            self.attach(model)

    def attach(self, model: Any) -> None:
        """Put the replay around the routers of a model; without anything to record or to replay it does nothing."""
        self.detach()
        self.model, self.layers = model, list(moe_layers(model))
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no MoE layers whose routing could be replayed.")
        self.handles = [self.rows.follow(model)]
        for layer in self.layers:
            for gate in (layer.gate, *layer.later_gates):
                self.plain.append((gate, vars(gate).get("forward")))
                gate.forward = self.wrap(layer, gate, gate.forward)

    def detach(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()
        for gate, patched in self.plain:
            if patched is None:
                del gate.forward  # the attribute of the instance; the class's method shows again
            else:
                gate.forward = patched
        self.handles, self.plain, self.layers = [], [], []

    def wrap(self, layer: MoeLayer, gate: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A router's forward pass that records or replays."""
        number = layer.num_experts + layer.num_zero_experts

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.given is None and self.taken is None:
                return forward(*args, **kwargs)
            pinned = self.given(gate) if self.given is not None else None
            with Choice(number, layer.top_k, pinned) as choice:
                output = forward(*args, **kwargs)
            if len(choice.chosen) != 1:
                raise ValueError(
                    f"{type(gate).__name__} of {layer.name!r} does not choose its experts by one topk: its routing "
                    "cannot be replayed."
                )
            if self.taken is not None:
                self.taken(gate, choice.chosen[0])
            return output

        return run

    # 1. recomputation

    def pin_recomputation(self, **options: Any) -> None:
        """Switch on activation checkpointing that repeats the routing of the forward pass.

        Args:
            options: further ones of `torch.utils.checkpoint.checkpoint`; non-reentrant it must be.
        """
        if options.pop("use_reentrant", False):
            raise ValueError("Routing is replayed in non-reentrant checkpointing only: use_reentrant=False.")
        wrapped = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        settings = {**options, "use_reentrant": False, "context_fn": self.contexts}
        wrapped.activation_checkpointing_enable(settings)

    def contexts(self) -> tuple[Any, Any]:
        """For one checkpointed layer: around its forward pass, and around its recomputation."""
        record: dict[nn.Module, list[torch.Tensor]] = {}
        return self.remembering(record), self.repeating(record)

    @contextmanager
    def remembering(self, record: dict[nn.Module, list[torch.Tensor]]) -> Iterator[None]:
        """Note what is chosen, beside what is recorded or replayed anyway."""
        before = self.taken

        def take(gate: nn.Module, chosen: torch.Tensor) -> None:
            record.setdefault(gate, []).append(chosen.detach())
            if before is not None:
                before(gate, chosen)

        self.taken = take
        try:
            yield
        finally:
            self.taken = before

    @contextmanager
    def repeating(self, record: dict[nn.Module, list[torch.Tensor]]) -> Iterator[None]:
        """Choose what was noted, call by call."""
        given, taken, calls = self.given, self.taken, {gate: iter(choices) for gate, choices in record.items()}
        self.given, self.taken = lambda gate: next(calls[gate]), None
        try:
            yield
        finally:
            self.given, self.taken = given, taken

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.model is not model:
            self.attach(model)
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            self.pin_recomputation(**(args.activation_checkpointing_kwargs or {}))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()
        self.model = None

    # 2. rollouts

    @contextmanager
    def record(self) -> Iterator["Recording"]:
        """Record all forward passes inside the `with` block, those of `generate` among them."""
        recording = Recording(self.first_gates())
        before, self.taken = self.taken, lambda gate, chosen: recording.take(gate, chosen, self.rows)
        try:
            yield recording
        finally:
            self.taken = before

    @contextmanager
    def replay(self, routed_experts: torch.Tensor) -> Iterator[None]:
        """Send the tokens of every forward pass inside the `with` block where they went before.

        The backward pass belongs inside as well if activations are checkpointed without `pin_recomputation`.

        Args:
            routed_experts: (B, T, L, K) ids, as inference engines return them; -1 lets the router choose. With fewer
                tokens than the forward pass (the last one that was generated has not been routed), the rest is free.

        Raises:
            ValueError: another number of rows, layers or experts per token, too many tokens, or unknown ids.
        """
        self.check(routed_experts)
        numbers = {gate: number for number, gate in enumerate(self.first_gates())}

        def give(gate: nn.Module) -> torch.Tensor:
            rows, time = self.rows.context.shape or (1, 0)
            if (rows, routed_experts.shape[1]) > (routed_experts.shape[0], time) or rows != routed_experts.shape[0]:
                raise ValueError(
                    f"routed_experts are of {tuple(routed_experts.shape[:2])} rows and tokens, the forward pass of "
                    f"{(rows, time)}."
                )
            chosen = routed_experts[:, :, numbers[gate]]
            missing = time - chosen.shape[1]
            return nn.functional.pad(chosen, (0, 0, 0, missing), value=FREE).flatten(0, 1)

        before, self.given = self.given, give
        try:
            yield
        finally:
            self.given = before

    def first_gates(self) -> Sequence[nn.Module]:
        """The router of every layer; layers with several cannot be told apart in a table of L layers."""
        if several := [layer.name for layer in self.layers if layer.later_gates]:
            raise ValueError(f"{several[0]!r} has several routers: rollouts of such a model cannot be replayed.")
        return [layer.gate for layer in self.layers]

    def check(self, routed_experts: torch.Tensor) -> None:
        """Raise `ValueError` if a table cannot be of this model."""
        top_k, number = self.layers[0].top_k, min(layer.num_experts + layer.num_zero_experts for layer in self.layers)
        if routed_experts.dim() != 4 or routed_experts.shape[2:] != (len(self.layers), top_k):
            raise ValueError(
                f"routed_experts have shape {tuple(routed_experts.shape)}; this model needs (rows, tokens, "
                f"{len(self.layers)}, {top_k}): MoE layers and experts per token."
            )
        if routed_experts.is_floating_point() or routed_experts.min() < FREE or routed_experts.max() >= number:
            raise ValueError(f"routed_experts must be whole numbers from {FREE} to {number - 1}.")


class Recording:
    """What was chosen while it was recorded."""

    def __init__(self, gates: Sequence[nn.Module]) -> None:
        self.gates = gates
        self.chosen: dict[nn.Module, list[torch.Tensor]] = {gate: [] for gate in gates}

    def take(self, gate: nn.Module, chosen: torch.Tensor, rows: CurrentRows) -> None:
        """Add one call, of (N, K)."""
        batch, time = rows.context.shape or (1, len(chosen))
        self.chosen[gate].append(chosen.detach().view(batch, time, -1))

    @property
    def routed_experts(self) -> torch.Tensor:
        """(B, T, L, K) ids of all recorded passes, one behind the other in time: a prompt and then token by token.

        The last token that `generate` returns was never run, so T is one less than the length of the sequence.
        """
        if not all(self.chosen.values()):
            raise ValueError("Nothing has been recorded: run the model inside `with replay.record() as recording`.")
        return torch.stack([torch.cat(self.chosen[gate], dim=1) for gate in self.gates], dim=2)
