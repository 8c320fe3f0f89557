"""How a comparison is timed and what it leaves behind: pairs in turn, ratios pair by pair, medians with quartiles."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """What every section is told.

    Args:
        device: `cpu` or `cuda`.
        dtype: of weights and activations.
        repetitions: of each pair.
        quick: Small sizes: whether a section runs at all, not a figure to report.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    repetitions: int = 11
    quick: bool = False


@dataclass(frozen=True)
class Measurement:
    """One row of the report.

    Args:
        section: The table that it belongs to.
        work: What is done, with its sizes.
        peer: What it is compared with.
        ratio: Ours by the peer's: median, None where the peer is missing.
        low: Lower quartile of the ratio.
        high: Upper quartile.
        ours: Ours in `unit`, median.
        theirs: The peer's.
        unit: `ms`, `MiB`, `tokens/s`...
        bar: What the ratio has to reach, None where it is only reported.
        at_least: Whether the bar is a floor instead of a ceiling.
        note: A reason, above all why a peer is missing.
    """

    section: str
    work: str
    peer: str
    ratio: float | None
    low: float | None = None
    high: float | None = None
    ours: float | None = None
    theirs: float | None = None
    unit: str = "ms"
    bar: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the median reaches the bar; None without one."""
        if self.bar is None or self.ratio is None:
            return None
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar

    def as_row(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "passed": self.passed}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, median, high


def seconds(work: Work, device: str) -> float:
    """Wall time of one call, the device's queue emptied before and after."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def interleaved(works: dict[str, Work], options: Options, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each work, repetition by repetition in turn, so that a slow minute of the machine meets all."""
    for _ in range(warm_up):
        for work in works.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(2 if options.quick else options.repetitions):
        for name, work in works.items():
            times[name].append(seconds(work, options.device))
    return times


def compared(section: str, work: str, peer: str, ours: list[float], theirs: list[float], **more: Any) -> Measurement:
    """The row of two lists of seconds that belong together pair by pair; `more` are other fields."""
    low, ratio, high = quartiles([mine / other for mine, other in zip(ours, theirs, strict=True)])
    mine, other = (statistics.median(times) * 1e3 for times in (ours, theirs))
    return Measurement(section, work, peer, ratio, low, high, mine, other, **more)


def missing(section: str, work: str, peer: str, reason: str, bar: float | None = None) -> Measurement:
    """The row of a peer that is not there: reported, never skipped silently."""
    return Measurement(section, work, peer, None, bar=bar, note=f"missing: {reason}")
