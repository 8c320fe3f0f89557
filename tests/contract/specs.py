"""The rows of the contract suite: a new part adds one line to a dict, an option worth its own row another."""

import itertools
from typing import Any

import torch

from hf_moe import HfMoeConfig, HfMoeForCausalLM

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"type": "attention"},
    "based": {"type": "based", "feature_dim": 4},
    "diff_qkv": {"type": "diff_qkv", "num_key_heads": 1, "query_size": 24},
    "gated_delta_net": {"type": "gated_delta_net", "num_heads": 2, "num_value_heads": 4, "value_head_dim": 12},
    "hyper_attention": {"type": "hyper_attention"},
    "kimi_delta_attention": {"type": "kimi_delta_attention", "gate": "bounded"},
    "latent_attention": {
        "type": "latent_attention",
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "lightning_attention": {"type": "lightning_attention"},
    "mamba2": {"type": "mamba2", "head_dim": 16, "state_size": 8, "num_groups": 2},
    "mixture_of_attention": {
        "type": "mixture_of_attention",
        "num_experts": 4,
        "heads_per_expert": 2,
        "router": {"type": "top_k", "top_k": 2},
    },
    "short_convolution": {"type": "short_convolution"},
    "soft_mixture_of_attention": {"type": "soft_mixture_of_attention", "num_experts": 3},
    "spark_attention": {"type": "spark_attention", "top_k": 3},
    "sparse_attention": {"type": "sparse_attention", "keep": 0.4, "codeword_size": 2},
    "switch_head": {"type": "switch_head", "num_heads": 2, "num_experts": 4},
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
UNGATED_MLP = {"type": "ungated_mlp", "intermediate_size": 48}
FEED_FORWARDS: dict[str, dict[str, Any]] = {"mlp": MLP, "ungated_mlp": UNGATED_MLP}  # every kind but `moe`
PRODUCT = {}
# Every router, every kind of experts and every feed-forward behind attention; then every mixer with three routers. The
# parts that a loop does not run over take turns.
for number, router in enumerate(ROUTERS):
    experts = list(EXPERTS)[number % len(EXPERTS)]
    PRODUCT[f"pre_norm-attention-{router}-{experts}"] = {"b": block(ATTENTION, moe(router, experts))}
for number, experts in enumerate(EXPERTS):
    router = list(ROUTERS)[(number + 1) % len(ROUTERS)]
    PRODUCT[f"parallel-attention-{router}-{experts}"] = {"b": block(ATTENTION, moe(router, experts), "parallel")}
for name, feed_forward in FEED_FORWARDS.items():
    PRODUCT[f"pre_norm-attention-{name}"] = {"b": block(ATTENTION, feed_forward)}
for number, (mixer, turn) in enumerate(itertools.product(MIXERS, range(3))):
    kind, router = BLOCKS[number % len(BLOCKS)], list(ROUTERS)[number % len(ROUTERS)]
    experts = list(EXPERTS)[(number + turn) % len(EXPERTS)]
    PRODUCT[f"{kind}-{mixer}-{router}-{experts}"] = {"b": block(MIXERS[mixer], moe(router, experts), kind)}
AMF = {  # Hunyuan-TurboS: attention, Mamba-2, feed-forward, each with a residual of its own
    "a": {"type": "mixer_only", "mixer": {**ATTENTION, "qk_norm": True}},
    "mf": block(MIXERS["mamba2"], moe()),
}
VARIANTS = {  # options, and stacks of different blocks
    "dense": {"b": block(ATTENTION, {"type": "mlp", "intermediate_size": 48})},
    "qk_norm-biases": {"b": block({**ATTENTION, "qk_norm": True, "qkv_bias": True, "output_bias": True}, moe())},
    "sliding": {"b": block({**ATTENTION, "sliding": True}, moe())},
    "hybrid-sliding-nope": {
        "a": block({**ATTENTION, "sliding": True}, moe()),
        "b": block({**ATTENTION, "rotary": False}, moe()),
    },
    "partial_rotary": {"b": block({**ATTENTION, "partial_rotary_factor": 0.5}, moe())},
    "hybrid-diff_qkv-latent": {
        "a": block({**MIXERS["diff_qkv"], "key_head_dim": 4, "top_values": 3}, {**UNGATED_MLP, "bias": True}),
        "b": block({**MIXERS["latent_attention"], "q_lora_rank": 8, "rotary": False, "output_gate": True}, moe()),
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
    "based-hedgehog": {
        "b": block({"type": "based", "feature_dim": 4, "feature_map": {"type": "hedgehog"}}, moe(), "parallel")
    },
    "based-rebased": {"b": block({"type": "based", "feature_dim": 4, "feature_map": {"type": "rebased"}}, moe())},
    "lightning-ring": {
        "b": block(
            {
                "type": "lightning_attention",
                "slopes": "ring",
                "scaled": True,
                "qk_norm": True,
                "partial_rotary_factor": 0.5,
                "group_norm_size": 4,
            },
            moe(),
        )
    },
    "hybrid-spark-sparse": {
        "a": block({**MIXERS["spark_attention"], "rotary": "head", "scale": "parts", "predictor_size": 2}, moe()),
        "b": block({**MIXERS["sparse_attention"], "keep": 3, "qk_norm": True, "qkv_bias": True}, moe()),
    },
    "hybrid-based": {
        "a": block(MIXERS["based"], moe()),
        "b": block({**ATTENTION, "sliding": True}, moe()),
    },
    "hybrid-amf": AMF,
    "dense-then-recurrent": {
        "a": block(ATTENTION, {"type": "mlp", "intermediate_size": 48}),
        "b": block(ATTENTION, moe("recurrent")),
    },
}
ROWS = {**PRODUCT, **VARIANTS}
# for what takes seconds and does not depend on what mixer stands before a feed-forward
FEED_FORWARD_ROWS = {name: row for name, row in ROWS.items() if name in VARIANTS or "-attention-" in name}
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
