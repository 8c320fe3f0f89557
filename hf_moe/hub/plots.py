"""The picture of a card: how much each expert was chosen."""

from pathlib import Path

from .card import PLOT
from .history import RECEIPT, read_json


def plot_expert_load(folder: Path) -> Path | None:
    """Draw the loads that a receipt holds, layers by experts, as `expert_load.png`.

    Returns:
        The file; None if the receipt holds no loads.

    Raises:
        ValueError: matplotlib is not installed.
    """
    receipt = read_json(folder / RECEIPT)
    loads = receipt["exactness"].get("expert_load") if receipt else None
    if not loads:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("The plot needs matplotlib: pip install 'hf_moe[plot]'.") from error
    rows = list(loads.values())
    figure = Figure(figsize=(7, 1.5 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="expert", ylabel="sparse layer", title="Share of the chosen slots")
    figure.colorbar(image, ax=axes)
    beside = folder / f".{PLOT}"
    figure.savefig(beside, dpi=150, format="png")
    return beside.replace(folder / PLOT)
