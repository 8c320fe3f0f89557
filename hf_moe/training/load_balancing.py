"""Balance losses for any trainer and any MoE, ours or native: their gradient is put into the backward pass itself.

Trainer adds a native model's balance loss once per micro-batch and process, TRL's trainers skip the model's own loss
and apply Mixtral's formula, preference trainers have another loss altogether. Here the gradient does not travel
through the loss: an identity at the router's weights (native) or at the last hidden states (ours) adds it on the way
back, weighted by this micro-batch's part of the optimizer step. It is the same whatever the trainer makes of the loss.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

from ..modeling import DecoderModel, RouterCall, watch_routers
from ..modeling.losses import BALANCE_LOSSES, router_z_loss, share_of_labels, weighted_losses
from ..modeling.ops.injection import inject
from ..modeling.router_calls import CurrentRows, scores
from .balancing import count_ahead, empty_loads
from .native import NativeLoads


class StepShare:
    """This micro-batch's weight in an optimizer step; the weights of a step sum to the number of processes.

    Data-parallel trainers average gradients over the processes, so that the balance loss of a step is the mean over
    its micro-batches weighted by, whichever is known: their tokens (`CountsAhead`), their label tokens (`labels` and
    `num_items_in_batch` of Trainer and SFTTrainer), or equal parts of `gradient_accumulation_steps`.
    """

    def __init__(self, accumulation: int, across_devices: bool) -> None:
        self.accumulation, self.across_devices = accumulation, across_devices
        self.tokens_in_step: float | None = None  # over all processes
        self.rows = CurrentRows()
        self.inputs: Mapping[str, Any] = {}

    def follow(self, model: Any) -> list[Any]:
        """Remember what the model and its decoder are called with; returns the hooks' handles."""
        return [self.rows.follow(model), model.register_forward_pre_hook(self.remember, with_kwargs=True)]

    def remember(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every forward pass of the whole model."""
        self.inputs = {name: kwargs.get(name) for name in ("labels", "num_items_in_batch", "shift_labels")}

    def __call__(self) -> torch.Tensor | float:
        """The weight of the forward pass that runs."""
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        labels, items = self.inputs.get("labels"), self.inputs.get("num_items_in_batch")
        if self.tokens_in_step is not None:
            return self.tokens_here() * (processes / self.tokens_in_step)
        if labels is not None and items is not None:
            return share_of_labels(labels, items, self.inputs.get("shift_labels")) * (
                processes if self.across_devices else 1
            )
        return 1 / self.accumulation

    def tokens_here(self) -> torch.Tensor | float:
        """Real tokens of this micro-batch."""
        context = self.rows.context
        if context.token_mask is not None:
            return context.token_mask.sum()
        assert context.shape is not None
        return float(context.shape[0] * context.shape[1])


class OwnTerm:
    """Takes what the decoder's routers report out of the loss, and sends its gradient through the hidden states."""

    def __init__(self, decoders: list[DecoderModel], share: StepShare) -> None:
        self.share = share
        self.handles = [decoder.register_forward_hook(self.deliver) for decoder in decoders]

    def deliver(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After every forward pass of a decoder."""
        losses, output.router_losses = output.router_losses, None  # the language model adds nothing then
        if losses is None or not decoder.training:
            return output
        if torch.is_grad_enabled() and losses.requires_grad:
            total = weighted_losses(losses, decoder.config)
            output.last_hidden_state = inject(output.last_hidden_state, total * self.share())
        output["aux_loss"] = output.aux_loss.detach()  # a figure for the log
        if output.router_logits is not None:
            output["router_logits"] = tuple(output.router_logits)  # TRL gets the loss with them: now the figure
        return output


class NativeTerm:
    """Gives every router of a native model a balance loss of its own, and takes the gradient out of the model's."""

    def __init__(self, model: Any, loss: str, coef: float, z_loss_coef: float, share: StepShare) -> None:
        self.loss, self.coef, self.z_loss_coef, self.share = loss, coef, z_loss_coef, share
        self.handles = watch_routers(model, self.deliver)
        # watched last, so called first
        self.loads = NativeLoads(model) if loss == "global" else None

    def deliver(self, call: RouterCall) -> tuple[torch.Tensor, torch.Tensor] | None:
        """After every call of a router, and after it has been counted."""
        if not (
            call.layer.learns_choice and call.gate.training and torch.is_grad_enabled() and call.logits.requires_grad
        ):
            return None
        context = replace(call.context, token_mask=call.token_mask)
        balance = BALANCE_LOSSES[self.loss](
            scores(call),
            call.indices,
            torch.ones_like(call.weights) if self.loss != "importance" else call.weights,
            context,
            loads=self.loads.loads.get(call.layer.name) if self.loads else None,
            num_zero_experts=call.layer.num_zero_experts,
        )
        total = self.coef * balance
        if self.z_loss_coef:
            total = total + self.z_loss_coef * router_z_loss(call.logits, context.token_mask)
        # the model's own formula reads the logits that the gate returns: without a gradient it only reports
        return call.logits.detach(), inject(call.weights, total * self.share())


class LoadBalancing(TrainerCallback):
    """Trains with a balance loss per MoE layer, in Trainer and TRL's trainers, on our models and on native ones.

    It replaces the model's own term, whose value is still reported where the trainer does (JetMoE's attention experts
    are no MoE layers and keep theirs: `aux_loss_coef=0.0` in the config switches it off). Its coefficient does not
    depend on gradient accumulation, the number of processes, padding or packing: the losses of the micro-batches are
    averaged by their numbers of label tokens where the trainer tells them, else evenly. With the mixin `CountsAhead`
    they are averaged by their tokens, and `global` and `sequence` are exactly those of one large batch.

    Args:
        loss: a name in `modeling.losses.BALANCE_LOSSES`: `switch` (each micro-batch), `sequence` (DeepSeek-V3),
            `global` (the optimizer step, https://arxiv.org/abs/2501.11873), `importance`...
        coef: its coefficient; a layer in perfect balance has the loss 1, and layers add up. None: the config's
            `router_aux_loss_coef`, 0.001 where it has none. Mixtral's formula, which native models use it with, pools
            the layers and is K times as large: multiply by K / (number of MoE layers) for a term of that size.
        z_loss_coef: coefficient of the router z-loss (https://arxiv.org/abs/2202.08906). None: the config's
            `router_z_loss_coef`, 0 where it has none.

    Raises:
        ValueError: unknown loss, negative coefficients, fp16 (its gradients are scaled behind our back; use bf16), a
            model whose MoE layers are not known or that has none.
    """

    def __init__(self, loss: str = "global", coef: float | None = None, z_loss_coef: float | None = None) -> None:
        if loss not in BALANCE_LOSSES:
            raise ValueError(f"loss={loss!r} is unknown; choose from {sorted(BALANCE_LOSSES)}.")
        for name, value in (("coef", coef), ("z_loss_coef", z_loss_coef)):
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must be at least 0.")
        self.loss, self.coef, self.z_loss_coef = loss, coef, z_loss_coef
        self.share: StepShare | None = None
        self.term: OwnTerm | NativeTerm | None = None
        self.handles: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args is not None and args.fp16:
            raise ValueError("LoadBalancing cannot follow the loss scale of fp16=True; train with bf16=True.")
        self.remove()
        accumulation = args.gradient_accumulation_steps if args is not None else 1
        self.share = StepShare(accumulation, bool(args is None or args.average_tokens_across_devices))
        decoders = [module for module in model.modules() if isinstance(module, DecoderModel)]
        if decoders:
            for decoder in decoders:
                self.choose(decoder.config)
            self.term = OwnTerm(decoders, self.share)
        else:
            self.term = self.native_term(model)
        self.handles = [*self.share.follow(model), *self.term.handles]
        empty_loads(model)

    def choose(self, config: Any) -> None:
        """Our models read from their config what to report, and keep there what they were trained with."""
        config.router_balance_loss = self.loss
        config.router_aux_loss_coef = config.router_aux_loss_coef if self.coef is None else self.coef
        config.router_z_loss_coef = config.router_z_loss_coef if self.z_loss_coef is None else self.z_loss_coef

    def native_term(self, model: Any) -> NativeTerm:
        """The losses of a native model."""
        assert self.share is not None
        config = model.config.get_text_config()
        coef = getattr(config, "router_aux_loss_coef", 0.001) if self.coef is None else self.coef
        z_loss_coef = getattr(config, "router_z_loss_coef", 0.0) if self.z_loss_coef is None else self.z_loss_coef
        return NativeTerm(model, self.loss, coef, z_loss_coef, self.share)

    @property
    def loads(self) -> NativeLoads | None:
        """What a native model's routers have counted for the global loss."""
        return self.term.loads if isinstance(self.term, NativeTerm) else None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        empty_loads(model)
        if self.loads is not None:
            self.loads.empty()
        if self.share is not None:
            self.share.tokens_in_step = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the model."""
        if self.loads is not None:
            self.loads.remove()
        for handle in self.handles:
            handle.remove()
        self.handles, self.term = [], None


class CountsAhead(Trainer):
    """Makes the losses of `LoadBalancing` those of one large batch: `class MyTrainer(CountsAhead, SFTTrainer): ...`.

    The tokens of all micro-batches of an optimizer step are counted before the first is trained on, so that each gets
    its weight. For the global-batch loss a forward pass over all of them counts assignments as well: the paper's
    running counts (https://arxiv.org/abs/2501.11873, §3) let an early micro-step see fewer tokens than a late one.
    Without accumulation no pass is added. Trainers whose batches hold no `input_ids` go on as without the mixin.
    """

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        balancing = [c for c in self.callback_handler.callbacks if isinstance(c, LoadBalancing)]
        if not balancing or not all("input_ids" in batch for batch in batches):
            return batches, num_items
        tokens = torch.tensor([sum(map(real_tokens_in, batches))], device=self.args.device)
        in_step = float(self.accelerator.gather(tokens).sum())  # pyright: ignore[reportAttributeAccessIssue]
        for callback in balancing:
            if callback.share is not None and in_step:
                callback.share.tokens_in_step = in_step
        if len(batches) > 1 and any(callback.loss == "global" for callback in balancing):
            self.count_assignments(batches, balancing)
        return batches, num_items

    def count_assignments(self, batches: list, balancing: list[LoadBalancing]) -> None:
        """A forward pass over all micro-batches, without gradients."""
        model = self.model_wrapped
        assert model is not None
        for callback in balancing:
            if callback.loads is not None:
                callback.loads.empty()
        model.train()
        with self.compute_loss_context_manager():
            count_ahead(model, map(self.inputs_to_count, batches))
        for callback in balancing:
            if callback.loads is not None:
                callback.loads.counts_ahead = True

    def inputs_to_count(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the model has to see of a micro-batch."""
        inputs = self._prepare_inputs(dict(batch))
        return {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}


def real_tokens_in(batch: Mapping[str, Any]) -> int:
    """Tokens of a micro-batch without the padding that a two-dimensional `attention_mask` tells."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if torch.is_tensor(mask) and mask.dim() == 2 else batch["input_ids"].numel()
