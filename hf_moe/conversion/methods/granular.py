"""Fine-grained experts from copies or several models: Dynamic-DINO (https://arxiv.org/abs/2507.17436), with shared
experts as in DeepSeekMoE (https://arxiv.org/abs/2401.06066)."""

from dataclasses import dataclass
from typing import ClassVar

from ..dense import Dense
from ..neurons import FeedForward, Span
from ..options import Options
from ..recipes import Mean
from ..shards import check_cut, check_multiple, is_zero, refuse_zero_router
from ..targets import Layout, Target
from .base import DEFAULT_NUM_COPIES, Exactness, Guarantee, Ingredients, Method, common_layout

DEFAULT_GRANULARITY = 4


@dataclass(frozen=True, kw_only=True)
class Granular(Method):
    """N copies (or N models) cut into G shards; the first K of them are shared, R = G - K per copy are routed.

    Expert `n R + r` is shard `K + r` of copy n. Router rows are equal inside a copy unless `router_init="random"`, so
    that a token chooses all routed shards of a copy together. Shared shards of several models are averaged.
    """

    name: ClassVar[str] = "granular"
    summary: ClassVar[str] = "copies, or several models, cut into shards; some may be shared by all tokens"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.17436"
    most_sources: ClassVar[int | None] = None

    def layout(self, options: Options, dense: Dense, num_sources: int, target: Target) -> Layout:
        shards = options.granularity or DEFAULT_GRANULARITY
        check_cut("granularity", shards, dense.intermediate_size)
        shared = int(target.must_share) if options.shared_experts is None else options.shared_experts
        if shared >= shards:
            raise ValueError(f"shared_experts={shared} must be below granularity={shards}: some shards are routed")
        routed, width = shards - shared, dense.intermediate_size // shards
        copies = num_sources if num_sources > 1 else DEFAULT_NUM_COPIES
        tied = 1 if options.router_init == "random" else routed
        layout = common_layout(
            self,
            options,
            dense,
            target,
            num_experts=copies * routed,
            top_k=routed,
            expert_width=width,
            num_shared=shared,
            shared_width=width if shared else 0,
            tied=tied,
            special={"num_sources": num_sources},
        )
        if num_sources > 1 and layout.num_experts != copies * routed:
            raise ValueError(
                f"num_experts={layout.num_experts}, but {copies} sources with {routed} routed shards each make"
                f" {copies * routed}"
            )
        check_multiple("num_experts", layout.num_experts, routed, "the routed shards of a copy", 16 * routed)
        if tied > 1:
            check_multiple("top_k", layout.top_k, routed, "the routed shards of a copy", layout.num_experts)
            refuse_zero_router(options, layout.top_k, layout.num_experts)
        return layout

    def experts(self, ingredients: Ingredients, layer: int) -> list[FeedForward]:
        layout, sources = ingredients.layout, len(ingredients.sources)
        width, routed = layout.expert_width, routed_shards(ingredients.dense, layout)
        found = []
        for number in range(layout.num_experts):
            copy, shard = divmod(number, routed)
            part = Span((layout.num_shared + shard) * width, width)
            dense = ingredients.feed_forward(copy if sources > 1 else 0, layer)
            found.append(dense.take(part).scaled(routed / layout.gate_mass))
        return found

    def shared_expert(self, ingredients: Ingredients, layer: int) -> FeedForward | None:
        layout = ingredients.layout
        if not layout.num_shared:
            return None
        part = Span(0, layout.num_shared * layout.shared_width)
        several = [ingredients.feed_forward(source, layer).take(part) for source in range(len(ingredients.sources))]
        return several[0] if len(several) == 1 else FeedForward(*(Mean(same) for same in zip(*several, strict=True)))

    def guarantee(self, layout: Layout, options: Options, target: Target) -> Guarantee:
        if layout.special["num_sources"] > 1:
            return Guarantee(Exactness.NEEDS_TRAINING, "shards of several models, which have never worked together")
        if is_zero(options) and layout.top_k == layout.num_experts:
            return Guarantee(Exactness.EXACT, "all shards of all copies are active with equal gates")
        if layout.top_k < layout.num_experts and layout.tied == 1 and options.router_init == "random":
            return Guarantee(
                Exactness.NEEDS_TRAINING,
                "with a router row per shard no token gets one of each shard; router_init='tied' is exact",
            )
        if layout.normalize and layout.tied > 1:
            reason = "a token chooses all routed shards of a copy, whose sum with the shared ones is the dense model's"
            return Guarantee(Exactness.EXACT, reason)
        return Guarantee(Exactness.APPROXIMATE, "the gates of a token's shards add up to what is assumed only nearly")


def routed_shards(dense: Dense, layout: Layout) -> int:
    """R, the routed shards of a copy."""
    return dense.intermediate_size // layout.expert_width - layout.num_shared
