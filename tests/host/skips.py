"""The one table of the tests that we skip, with the reason; Transformers' own skips carry their reasons themselves."""

# name in ARCHITECTURES, or "*" -> {test name, or its beginning and "*": reason}
SKIPS: dict[str, dict[str, str]] = {}


def reason_to_skip(architecture: str, test: str) -> str | None:
    """The reason why `test` is skipped for `architecture`, or None."""
    for table in (SKIPS.get(architecture, {}), SKIPS.get("*", {})):
        for pattern, reason in table.items():
            if test == pattern or (pattern.endswith("*") and test.startswith(pattern[:-1])):
                return reason
    return None
