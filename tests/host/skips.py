"""The one table of the tests that we skip, with the reason; Transformers' own skips carry their reasons themselves."""

NO_EXPERTS = {
    "test_eager_matches_batched_and_grouped_inference*": "its feed-forwards are dense",
    "test_output_router_logits_from_config": "its feed-forwards are dense",
}

# entry, or "*" -> {test name, or its beginning and "*": reason}
SKIPS: dict[str, dict[str, str]] = {
    "based": {**NO_EXPERTS, "test_attention_outputs": "linear attention and convolutions have no attention maps"},
    "moa": NO_EXPERTS,
    "monet": {
        "test_hsdp_grad_accumulation*": "batch normalisation sees the parts of a batch, not the whole",
        "test_eager_matches_batched_and_grouped_inference*": "all tokens share the matrices of its experts",
    },
    "peer": {
        **NO_EXPERTS,
        "test_hsdp_grad_accumulation*": "batch normalisation sees the parts of a batch, not the whole",
    },
    "moge": {
        "test_fsdp2_expert_parallel_2d_vs_ddp": (
            "key biases have no gradient but rounding, of which Adam makes steps: after 20 of them a weight is 1.2e-5 "
            "apart where 1e-5 is allowed; without attention_bias it passes"
        ),
    },
    "moe_x": {
        "test_moe_parallel_plans_shard_experts": (
            "its router takes statistics over all weights of all experts, which no shard has"
        ),
    },
    "smoe_dropout": {
        "test_moe_parallel_plans_shard_experts": "biased experts have no parallel plan",
        "test_init_weights_can_init_buffers": "compares the buffers of two models; its frozen router is a random draw",
    },
    "thor": {
        "test_moe_parallel_plans_shard_experts": "biased experts have no parallel plan",
        "test_hsdp_grad_accumulation*": "each part of a batch draws experts of its own",
    },
    "peripheral_lm": NO_EXPERTS,
    "sigma": {
        **NO_EXPERTS,
        "test_model_rope_scaling_from_config*": (
            "freshly initialised queries, through three matrices, are too small for positions to show in the output"
        ),
    },
    "hf_moe_linear_hybrid": {
        "test_attention_outputs": "linear attention has no attention maps",
        "test_reverse_loading_mapping": "as for hf_moe",
    },
    "hf_moe_zero_experts": {
        "test_reverse_loading_mapping": "as for hf_moe",
        "test_eager_matches_batched_and_grouped_inference*": (
            "counts the calls of Transformers' own kernels, and listed rows run ours; "
            "test_experts_implementations_agree compares what they return"
        ),
    },
    "switchhead": NO_EXPERTS,
    "blockffn": {
        "test_fsdp2_expert_parallel_2d_vs_ddp": (
            "rounding switches experts at the edge of its ReLU on and off: gradient norms are equal for 5 steps, then "
            "3.4e-5 apart where 1e-5 is allowed"
        ),
        "test_eager_matches_batched_and_grouped_inference*": (
            "counts the calls of Transformers' own kernels, and the slots in use run ours as listed rows; "
            "test_experts_implementations_agree compares what they return"
        ),
    },
    "dynamic_moe": {
        "test_eager_matches_batched_and_grouped_inference*": (
            "counts the calls of Transformers' own kernels, and the slots in use run ours as listed rows; "
            "test_experts_implementations_agree compares what they return"
        ),
    },
    "ultramem": NO_EXPERTS,
    "hf_moe": {
        "test_reverse_loading_mapping": (
            "the checkpoint layout of a free composition covers every kind of experts, and each must occur in the "
            "model: more than two layers hold; bam, mole and moe_x run it for theirs, and the contract suite saves "
            "and loads them all"
        ),
    },
    "hf_moe_hybrid": {"test_reverse_loading_mapping": "as for hf_moe"},
    "mole": {
        "test_eager_matches_batched_and_grouped_inference*": (
            "counts the calls of Transformers' own kernels, and latent experts run ours; "
            "test_experts_implementations_agree compares what they return"
        ),
    },
}


def reason_to_skip(architecture: str, test: str) -> str | None:
    """The reason why `test` is skipped for `architecture`, or None."""
    for table in (SKIPS.get(architecture, {}), SKIPS.get("*", {})):
        for pattern, reason in table.items():
            if test == pattern or (pattern.endswith("*") and test.startswith(pattern[:-1])):
                return reason
    return None
