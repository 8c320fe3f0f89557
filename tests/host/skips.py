"""The one table of the tests that we skip, with the reason; Transformers' own skips carry their reasons themselves."""

# name in ARCHITECTURES, or "*" -> {test name, or its beginning and "*": reason}
SKIPS: dict[str, dict[str, str]] = {
    "hf_moe": {
        "test_reverse_loading_mapping": (
            "the checkpoint layout of a free composition covers every kind of experts, and each must occur in the "
            "model; hf_moe_hybrid has them all and runs the test"
        ),
    },
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
