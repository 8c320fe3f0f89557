"""BAM: attention experts beside feed-forward experts, the rest averaged (https://arxiv.org/abs/2408.08274)."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ..dense import Dense
from ..options import Options
from ..recipes import Concat, Mean, Recipe, Stack
from ..targets import Layout, Target
from .base import Exactness, Guarantee, Ingredients
from .btx import Btx


@dataclass(frozen=True, kw_only=True)
class Bam(Btx):
    """Attention and feed-forward experts, one to one.

    Args:
        share_key_value: one averaged set of keys and values for all attention experts, for a smaller cache.
    """

    name: ClassVar[str] = "bam"
    summary: ClassVar[str] = "N dense models; attention and feed-forward experts inherited one to one, rest averaged"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.08274"
    targets: ClassVar[tuple[str, ...] | None] = ("bam",)
    share_key_value: bool = False

    def layout(self, options: Options, dense: Dense, num_sources: int, target: Target) -> Layout:
        # the paper's defaults: top-1, and the feed-forward is multiplied by the chosen probability
        top_k = 1 if options.top_k is None else options.top_k
        options = replace(options, top_k=top_k, normalize=bool(options.normalize))
        layout = super().layout(options, dense, num_sources, target)
        return replace(layout, special={"share_key_value": self.share_key_value})

    def attention(self, ingredients: Ingredients, layer: int) -> dict[str, Recipe]:
        """Experts one after the other on the head axis, or one averaged set of keys and values."""
        count, head_dim = len(ingredients.sources), ingredients.dense.fields["head_dim"]
        prefix = f"model.layers.{layer}"
        gate = f"{prefix}.self_attn.gate.weight"
        plan = {gate: ingredients.fresh_rows((count, ingredients.dense.fields["hidden_size"]), gate)}
        for name in ingredients.dense.names:
            if not name.startswith("self_attn."):
                continue
            full, letter = f"{prefix}.{name}", name.removeprefix("self_attn.")[0]
            parts = tuple(ingredients.tensor(source, full) for source in range(count))
            if self.share_key_value and letter in "kv":
                plan[full] = Mean(parts)
            elif "norm" in name:
                plan[full] = Stack(parts, (count, 1, head_dim))
            else:
                plan[full] = Concat(parts, dim=1 if name == "self_attn.o_proj.weight" else 0)
        return plan

    def guarantee(self, layout: Layout, options: Options, target: Target) -> Guarantee:
        return Guarantee(Exactness.NEEDS_TRAINING, "the experts have never worked together")
