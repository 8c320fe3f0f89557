"""The rows of the contract suite: a new part adds one line to a dict, an option worth its own row another."""

import itertools
from typing import Any

import torch

from hf_moe import HfMoeConfig, HfMoeForCausalLM

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"type": "attention"},
    "mixture_of_attention": {
        "type": "mixture_of_attention",
        "num_experts": 4,
        "heads_per_expert": 2,
        "router": {"type": "top_k", "top_k": 2},
    },
    "soft_mixture_of_attention": {"type": "soft_mixture_of_attention", "num_experts": 3},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {"type": "top_k", "top_k": 2},
    "soft": {"type": "soft"},
    "recurrent": {"type": "recurrent", "state_size": 8},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "swiglu": {"type": "swiglu", "intermediate_size": 16},
    "latent": {"type": "latent", "intermediate_size": 16, "latent_size": 8, "experts_per_group": 2},
}
BLOCKS = ("pre_norm", "parallel")  # with both halves; `mixer_only` stands among the variants


def moe(router: str = "top_k", experts: str = "swiglu", **options: Any) -> dict[str, Any]:
    """Spec of a sparse feed-forward."""
    return {"type": "moe", "num_experts": 4, "router": ROUTERS[router], "experts": EXPERTS[experts], **options}


def block(mixer: dict[str, Any], feed_forward: dict[str, Any], kind: str = "pre_norm") -> dict[str, Any]:
    """Spec of a block."""
    return {"type": kind, "mixer": mixer, "feed_forward": feed_forward}


ATTENTION = MIXERS["attention"]
SOFT_ATTENTION = MIXERS["soft_mixture_of_attention"]
MLP = {"type": "mlp", "intermediate_size": 48}
PRODUCT = {}  # every mixer with every router; blocks and experts take turns, so that they meet every mixer too
for number, (mixer, router) in enumerate(itertools.product(MIXERS, ROUTERS)):
    kind, experts = BLOCKS[number % len(BLOCKS)], list(EXPERTS)[number // len(BLOCKS) % len(EXPERTS)]
    PRODUCT[f"{kind}-{mixer}-{router}-{experts}"] = {"b": block(MIXERS[mixer], moe(router, experts), kind)}
VARIANTS = {  # options, and stacks of different blocks
    "dense": {"b": block(ATTENTION, {"type": "mlp", "intermediate_size": 48})},
    "qk_norm-biases": {"b": block({**ATTENTION, "qk_norm": True, "qkv_bias": True, "output_bias": True}, moe())},
    "sliding": {"b": block({**ATTENTION, "sliding": True}, moe())},
    "hybrid-sliding-nope": {
        "a": block({**ATTENTION, "sliding": True}, moe()),
        "b": block({**ATTENTION, "rotary": False}, moe()),
    },
    "shared_key_value": {"b": block({**SOFT_ATTENTION, "share_key_value": True}, moe(), "parallel")},
    "soft-qk_norm-bias": {"b": block({**SOFT_ATTENTION, "qk_norm": True, "qkv_bias": True}, moe())},
    "soft-shared-qk_norm": {"b": block({**SOFT_ATTENTION, "share_key_value": True, "qk_norm": True}, moe())},
    "soft-sliding": {"b": block({**SOFT_ATTENTION, "sliding": True}, moe())},
    "top_k-selected": {
        "b": block(ATTENTION, {**moe(), "router": {**ROUTERS["top_k"], "scoring": "softmax_selected"}})
    },
    "top_k-plain": {"b": block(ATTENTION, {**moe(), "router": {**ROUTERS["top_k"], "normalize": False}})},
    "recurrent-rnn": {"b": block(ATTENTION, {**moe(), "router": {**ROUTERS["recurrent"], "cell": "rnn"}})},
    "recurrent-lstm": {"b": block(ATTENTION, {**moe(), "router": {**ROUTERS["recurrent"], "cell": "lstm"}})},
    "latent-down": {"b": block(ATTENTION, {**moe(), "experts": {**EXPERTS["latent"], "factorize_down": True}})},
    "shared_expert": {"b": block(ATTENTION, moe(shared_intermediate_size=8))},
    "shared_expert-gated": {"b": block(ATTENTION, moe(shared_intermediate_size=8, shared_gate=True))},
    "dense-then-recurrent": {
        "a": block(ATTENTION, {"type": "mlp", "intermediate_size": 48}),
        "b": block(ATTENTION, moe("recurrent")),
    },
}
ROWS = {**PRODUCT, **VARIANTS}
# for what depends on the mixers alone: each by itself, and the stacks of several
MIXER_ROWS = {f"only-{name}": {"b": block(mixer, MLP)} for name, mixer in MIXERS.items()}
MIXER_ROWS |= {name: row for name, row in VARIANTS.items() if name.startswith("hybrid")}


def config(row: str, **overrides: Any) -> HfMoeConfig:
    """The tiny config of one row. A large init makes every part matter in the logits."""
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "sliding_window": 4,
        "pad_token_id": 0,
        "eos_token_id": None,
        "initializer_range": 0.2,
    }
    return HfMoeConfig(**{**sizes, "blocks": {**ROWS, **MIXER_ROWS}[row], **overrides})


def build(row: str, seed: int = 0, **overrides: Any) -> HfMoeForCausalLM:
    """A tiny model of one row, in eval mode."""
    torch.manual_seed(seed)
    return HfMoeForCausalLM(config(row, **overrides)).eval()


def tokens(rows: int = 2, length: int = 10, seed: int = 0) -> torch.Tensor:
    """(rows, length) ids without the padding id."""
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    """The same up to rounding in float32."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
