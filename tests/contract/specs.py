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
    "mixture_of_heads": {"type": "mixture_of_heads", "num_experts": 2, "router": {"type": "top_k", "top_k": 2}},
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
    "sparsity_aware": {"type": "sparsity_aware"},
    "random": {"type": "random", "inference": "all"},  # otherwise two calls differ
    "frozen": {"type": "frozen"},
    "decoupled": {"type": "decoupled", "top_k": 2},
    "prototype": {"type": "prototype", "top_k": 2},
    "uncertainty": {"type": "uncertainty"},
    "pre_gated": {"type": "pre_gated", "top_k": 2},
    "modality": {"type": "modality"},
    "condition": {"type": "condition", "condition_size": 6},
    "grouped_top_k": {"type": "grouped_top_k", "top_k": 2, "num_groups": 2, "learned_scale": True},
    "top_p": {"type": "top_p"},
    "relu_norm": {"type": "relu_norm", "chunk_size": 4},
    # sampling is tested with fixed draws, in tests/published/test_sparse_mixer.py
    "sparse_mixer": {"type": "sparse_mixer", "top_k": 3, "top_p": 0.7, "sample": False, "always_experts": 1},
    # noise is tested with fixed draws, in tests/published/test_noisy_top_k.py
    "noisy_top_k": {"type": "noisy_top_k", "network": "mlp", "noise": False, "scale": 2.0},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "swiglu": {"type": "swiglu", "intermediate_size": 16},
    "latent": {"type": "latent", "intermediate_size": 16, "latent_size": 8, "experts_per_group": 2},
    "mlp": {"type": "mlp", "intermediate_size": 16},
    "feature_modulated": {"type": "feature_modulated", "intermediate_size": 16, "adaptor_size": 8},
    "ternary": {"type": "ternary", "intermediate_size": 16, "activation_bits": None},  # rounding magnifies noise
    "identity": {"type": "identity"},
    "compressed": {"type": "compressed", "intermediate_size": 16, "num_main_experts": 1},
}


def fits(router: str, experts: str) -> bool:
    """Whether the router understands the weights of the experts, if it reads them."""
    return router != "sparsity_aware" or experts in ("swiglu", "mlp")


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
FEED_FORWARDS: dict[str, dict[str, Any]] = {  # every kind but `moe`
    "mlp": MLP,
    "ungated_mlp": UNGATED_MLP,
    "monet": {"type": "monet", "num_keys": 5, "num_heads": 2, "expert_size": 4, "top_k": 2},
    "chain_of_experts": {**moe(), "type": "chain_of_experts", "shared_intermediate_size": 8},
    "pooled_moe": {**moe(), "type": "pooled_moe", "num_experts": 2},
    "routed_ffn": {"type": "routed_ffn", "intermediate_size": 64},
    "peer": {"type": "peer", "num_keys": 4, "key_size": 8, "num_heads": 2, "top_k": 3},
    "spark": {"type": "spark", "intermediate_size": 48, "top_k": 8},
    "ultra_mem": {
        "type": "ultra_mem",
        "num_keys": 4,
        "value_size": 8,
        "intermediate_size": 32,
        "pre_value_size": 6,
        "share_ratio": 0.5,
        "top_k": 3,
        "key_size": 8,
    },
}
PRODUCT = {}
# Every router, every kind of experts and every feed-forward behind attention; then every mixer with three routers. The
# parts that a loop does not run over take turns.
for number, router in enumerate(ROUTERS):
    experts = list(EXPERTS)[number % len(EXPERTS)]
    experts = experts if fits(router, experts) else "mlp"
    PRODUCT[f"pre_norm-attention-{router}-{experts}"] = {"b": block(ATTENTION, moe(router, experts))}
for number, experts in enumerate(EXPERTS):
    router = list(ROUTERS)[(number + 1) % len(ROUTERS)]
    router = router if fits(router, experts) else "top_k"
    PRODUCT[f"parallel-attention-{router}-{experts}"] = {"b": block(ATTENTION, moe(router, experts), "parallel")}
for name, feed_forward in FEED_FORWARDS.items():
    PRODUCT[f"pre_norm-attention-{name}"] = {"b": block(ATTENTION, feed_forward)}
for number, (mixer, turn) in enumerate(itertools.product(MIXERS, range(3))):
    kind, router = BLOCKS[number % len(BLOCKS)], list(ROUTERS)[number % len(ROUTERS)]
    experts = list(EXPERTS)[(number + turn) % len(EXPERTS)]
    experts = experts if fits(router, experts) else "swiglu"
    PRODUCT[f"{kind}-{mixer}-{router}-{experts}"] = {"b": block(MIXERS[mixer], moe(router, experts), kind)}
AMF = {  # Hunyuan-TurboS: attention, Mamba-2, feed-forward, each with a residual of its own
    "a": {"type": "mixer_only", "mixer": {**ATTENTION, "qk_norm": True}},
    "mf": block(MIXERS["mamba2"], moe()),
}
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 100.0}
CAPPED = {**ATTENTION, "logit_softcapping": 1.0}
VARIANTS = {  # options, and stacks of different blocks
    "dense": {"b": block(ATTENTION, {"type": "mlp", "intermediate_size": 48})},
    "qk_norm-biases": {"b": block({**ATTENTION, "qk_norm": True, "qkv_bias": True, "output_bias": True}, moe())},
    "sliding": {"b": block({**ATTENTION, "sliding": True}, moe())},
    "hybrid-sliding-nope": {
        "a": block({**ATTENTION, "sliding": True}, moe()),
        "b": block({**ATTENTION, "rotary": False}, moe()),
    },
    "post_norm": {"b": block({**ATTENTION, "qk_norm": "full"}, moe(), "post_norm")},  # OLMo 2
    "hybrid-sandwich": {  # Gemma 2 and 3 in one; the cap is low enough to matter
        "a": block({**CAPPED, "qk_norm": True, "sliding": True, "rope_parameters": LOCAL_ROPE}, moe(), "sandwich"),
        "b": block(CAPPED, MLP, "sandwich"),
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
    "top_k-sigmoid": {
        "b": block(
            ATTENTION,
            {
                **moe(),
                "router": {
                    **ROUTERS["top_k"],
                    "scoring": "sigmoid",
                    "selection_bias": True,
                    "scale": 2.5,
                    "num_groups": 2,
                    "bias": True,
                },
            },
        )
    },
    "top_p-null": {"b": block(ATTENTION, {**moe("top_p"), "num_zero_experts": 2, "zero_expert_type": "null"})},
    "recurrent-rnn": {"b": block(ATTENTION, {**moe(), "router": {**ROUTERS["recurrent"], "cell": "rnn"}})},
    "recurrent-lstm": {"b": block(ATTENTION, {**moe(), "router": {**ROUTERS["recurrent"], "cell": "lstm"}})},
    "latent-down": {"b": block(ATTENTION, {**moe(), "experts": {**EXPERTS["latent"], "factorize_down": True}})},
    "decoupled-concatenated": {
        "b": block(ATTENTION, {**moe(), "router": {**ROUTERS["decoupled"], "combination": "concatenated"}})
    },
    "modality-family": {"b": block(ATTENTION, {**moe(), "router": {**ROUTERS["modality"], "candidates": "family"}})},
    "shared_expert": {"b": block(ATTENTION, moe(shared_intermediate_size=8))},
    "shared_expert-gated": {"b": block(ATTENTION, moe(shared_intermediate_size=8, shared_gate=True))},
    "shared_experts-gated": {
        "b": block(ATTENTION, moe(shared_intermediate_size=8, num_shared_experts=2, shared_gate=True))
    },
    "mlp-biases": {
        "b": block(ATTENTION, {**moe(), "experts": {**EXPERTS["mlp"], "activation": "gelu", "bias": True}})
    },
    "ternary-packed": {"b": block(ATTENTION, {**moe(), "experts": {**EXPERTS["ternary"], "packed": True}})},
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
    "hybrid-shortcut_moe": {"b": {**block(MIXERS["lightning_attention"], moe(), "shortcut_moe"), "dense": MLP}},
    "shortcut_moe-latent": {
        "b": {
            **block(MIXERS["latent_attention"], {**moe("recurrent", "latent"), "num_zero_experts": 1}, "shortcut_moe"),
            "dense": UNGATED_MLP,
        }
    },
    "monet-shared": {
        "a": block(ATTENTION, {**FEED_FORWARDS["monet"], "decomposition": "horizontal"}),
        "b": block(ATTENTION, {**FEED_FORWARDS["monet"], "own_router": False}),
    },
    "chain-own_residual": {
        "b": block(ATTENTION, {**FEED_FORWARDS["chain_of_experts"], "include_input": True}, "own_residual")
    },
    "chain-recurrent": {"b": block(ATTENTION, {**FEED_FORWARDS["chain_of_experts"], "router": ROUTERS["recurrent"]})},
    "widenet": {"b": block(ATTENTION, moe(), "widenet")},
    "hybrid-widenet-pool": {
        "a": block(MIXERS["lightning_attention"], moe("recurrent", "latent"), "widenet"),
        "b": block(MIXERS["mamba2"], {**FEED_FORWARDS["pooled_moe"], "layers_per_pool": 1}),
    },
    "ultra_mem-delayed": {  # version 1
        "a": block(
            ATTENTION,
            {
                "type": "ultra_mem",
                "num_keys": 4,
                "value_size": 8,
                "intermediate_size": 32,
                "top_k": 3,
                "key_size": 8,
                "num_heads": 2,
                "key_expansion": 2,
                "separate_projections": True,
                "delayed": True,
            },
        ),
        "b": block(ATTENTION, {"type": "memory_receiver", "intermediate_size": 32}),
    },
    "dense-then-recurrent": {
        "a": block(ATTENTION, {"type": "mlp", "intermediate_size": 48}),
        "b": block(ATTENTION, moe("recurrent")),
    },
}
ROWS = {**PRODUCT, **VARIANTS}
# for what takes seconds and does not depend on what mixer stands before a feed-forward
FEED_FORWARD_ROWS = {
    name: row
    for name, row in ROWS.items()
    if name.startswith("pre_norm-attention-") or (name in VARIANTS and not name.startswith("hybrid"))
}
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
