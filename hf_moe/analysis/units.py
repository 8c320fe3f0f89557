"""Numbers as people read them, on the terminal and in reports."""


def count(number: float) -> str:
    """`46.7B`, `1.2M`, `950`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes as `12.3 GiB`, `128 KiB`, `640 B`."""
    for unit, letter in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.4g} {letter}"
    return f"{number:g} B"


def layer_labels(names: list[str]) -> list[str]:
    """Numbers of layers from their paths; whole paths where two would have the same number."""
    numbers = [next((step for step in name.split(".") if step.isdigit()), name) for name in names]
    return numbers if len({*numbers}) == len(numbers) else names
