"""Routing by the type of a token: experts of a modality (MoIIE) or of a language family (Post-MoE).

MoIIE (https://arxiv.org/abs/2508.09779): a token of type m chooses among the experts that only its type uses and
those that all share, by a gate of its own type. Post-MoE (https://arxiv.org/abs/2410.10626): one gate over all, but in
training the expert of the token's family is always among the chosen ones.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling
from transformers import initialization as init

from ..context import NO_CONTEXT, ForwardContext
from .base import Router, Routing, layers_routed_by

CANDIDATES = ("pools", "family")


class Modality(Router):
    """Top-k router whose candidates depend on `context.inputs["token_type_ids"]` (B, T); absent means all are type 0.

    Args:
        num_types: how many types M there are: ids are 0 to M - 1.
        top_k: experts per token.
        normalize: divide the k probabilities by their sum.
        candidates: `pools` (MoIIE): the softmax runs over the token's candidates only; `family` (Post-MoE): over all
            E, and in training the last of the k is replaced by expert m unless that is chosen already. Outside
            training types then play no role.
        num_private_experts: with `pools`, the experts P of each type alone. Defaults to MoIIE's share, E / 2M (a
            quarter for two types). Type m owns experts m P to (m + 1) P - 1, and those from M P on are shared; MoIIE's
            code has the shared ones in the middle.
    """

    reads_inputs = ("token_type_ids",)

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        num_experts: int,
        *,
        num_types: int = 2,
        top_k: int = 2,
        normalize: bool = True,
        candidates: str = "pools",
        num_private_experts: int | None = None,
    ) -> None:
        super().__init__(config, layer_idx, num_experts)
        self.top_k, self.normalize, self.candidates, self.num_types = top_k, normalize, candidates, num_types
        self.num_private = num_experts // (2 * num_types) if num_private_experts is None else num_private_experts
        # ids are the same in every layer; looking at their values makes a GPU wait
        self._checks_ids = layer_idx == min(layers_routed_by(config, "modality"), default=layer_idx)
        shape = (num_experts,)
        if candidates == "pools":
            shape = (num_types, num_experts - (num_types - 1) * self.num_private)
        self.weight = nn.Parameter(torch.empty(*shape, config.hidden_size))

    @classmethod
    def check(cls, config: Any, *, candidates: str, **options: Any) -> None:
        if candidates not in CANDIDATES:
            raise ValueError(f"candidates={candidates!r} is unknown; choose from {list(CANDIDATES)}.")

    @classmethod
    def check_number(cls, num_experts: int, spec: dict[str, Any]) -> None:
        super().check_number(num_experts, spec)
        types, private = spec["num_types"], spec["num_private_experts"]
        if types < 1:
            raise ValueError(f"num_types={types} must be at least 1.")
        if spec["candidates"] == "family":
            if types > num_experts:
                raise ValueError(f"num_types={types} families need an expert each; there are {num_experts} experts.")
            return
        private = num_experts // (2 * types) if private is None else private
        if not 0 <= private <= num_experts // types:
            raise ValueError(
                f"num_private_experts={private} for each of {types} types; with num_experts={num_experts} it must be "
                f"0 to {num_experts // types}."
            )
        if spec["top_k"] > (number := num_experts - (types - 1) * private):
            raise ValueError(
                f"top_k={spec['top_k']}; a token has {number} candidates ({private} of its type, "
                f"{number - private} shared): use 1 to {number}."
            )

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, std=std)

    def forward(
        self, tokens: torch.Tensor, state: torch.Tensor | None = None, context: ForwardContext = NO_CONTEXT
    ) -> Routing:
        types = self.types(tokens, context)  # (N,)
        logits = F.linear(tokens, self.weight) if self.candidates == "family" else self.pool_logits(tokens, types)
        scores = self.scores(logits)
        weights, indices = scores.topk(self.top_k, dim=-1)
        if self.candidates == "family" and self.training:
            missing = (indices != types[:, None]).all(-1, keepdim=True)
            last = types[:, None].where(missing, indices[:, -1:])
            indices = torch.cat([indices[:, :-1], last], -1)
            weights = scores.gather(1, indices)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, weights.to(tokens.dtype), indices)

    def losses(self, routing: Routing, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        """(3,) as for every router; but with `pools` the balance loss is the average, over the types that occur, of
        the loss among a type's tokens and C candidates: 1 at perfect balance, C at collapse. MoIIE adds the types up,
        so its 0.001 for each is here 0.001 times their number. The global-batch loss does not tell types apart."""
        losses = super().losses(routing, context)
        if self.candidates == "family" or context.balance == "global":
            return losses
        types, total, occurring = self.types(routing.logits, context), losses.new_zeros(()), losses.new_zeros(())
        for number in range(self.num_types):
            mask = types == number if context.token_mask is None else (types == number) & context.token_mask
            occurs = mask.any().to(losses.dtype)
            total = total + occurs * super().losses(routing, replace(context, token_mask=mask))[0]
            occurring = occurring + occurs
        share = self.weight.shape[1] / self.num_experts  # the loss counts all E experts, of which C can be chosen
        return torch.stack([share * total / occurring.clamp(min=1), losses[1], losses[2]])

    def types(self, tokens: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """(N,) the type of each token.

        Raises:
            ValueError: ids of another shape, or out of range (not looked at in a compiled graph).
        """
        ids = context.inputs.get("token_type_ids")
        if ids is None:
            return torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
        if ids.numel() != tokens.shape[0]:
            raise ValueError(f"token_type_ids has shape {tuple(ids.shape)}; it needs one id for each token.")
        if self._checks_ids and not is_compiling() and ((ids < 0) | (ids >= self.num_types)).any():
            raise ValueError(
                f"token_type_ids has values from {ids.min()} to {ids.max()}; this router knows 0 to "
                f"{self.num_types - 1} (num_types={self.num_types})."
            )
        return ids.flatten().to(tokens.device)

    def pool_logits(self, tokens: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """(N, E) logits of each token's candidates, -inf elsewhere."""
        by_type = torch.einsum("nd,mcd->nmc", tokens, self.weight)
        own = by_type.gather(1, types[:, None, None].expand(-1, 1, by_type.shape[-1])).squeeze(1)  # (N, C)
        private = types[:, None] * self.num_private + torch.arange(self.num_private, device=types.device)
        shared = torch.arange(self.num_types * self.num_private, self.num_experts, device=types.device)
        candidates = torch.cat([private, shared.expand(len(types), -1)], -1)
        return own.new_full((len(types), self.num_experts), float("-inf")).scatter(1, candidates, own)
