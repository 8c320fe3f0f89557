"""Plots as inline SVG, hand-written: colours of the page's light and dark theme, no library, nothing to load.

A heat map is one small picture, so that 60 layers of 256 experts stay a file that opens. Its colours are transparent
where there is little, so that they fit on either background.
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

Colour = tuple[int, int, int]
BLUE, ORANGE, RED = (46, 111, 219), (222, 120, 20), (214, 40, 57)
STEPS = 120  # shades of one colour
EMPTY, FLAGGED = 0, 2 * STEPS + 1  # palette entries: nothing there; to be seen
WIDTH, LEFT, TOP, BOTTOM = 820, 46, 6, 40


def palette(low: Colour, high: Colour) -> tuple[bytes, bytes]:
    """Colours and their opacity: entry 0 is nothing, 1 to STEPS go from transparent to `high`, the next ones to `low`,
    the last is red."""
    colours = [high, *[high] * STEPS, *[low] * STEPS, RED]
    ramp = [round(255 * step / STEPS) for step in range(1, STEPS + 1)]
    return b"".join(map(bytes, colours)), bytes([0, *ramp, *ramp, 255])


def picture(rows: Sequence[Sequence[int]], low: Colour = BLUE, high: Colour = BLUE) -> str:
    """Entries of the palette as a data URI of a PNG, one pixel each (PNG, third edition: colour type 3, 8 bits)."""
    width = len(rows[0])
    colours, opacity = palette(low, high)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, len(rows), 8, 3, 0, 0, 0)),
        (b"PLTE", colours),
        (b"tRNS", opacity),
        (b"IDAT", zlib.compress(b"".join(b"\0" + bytes(row) for row in rows), 9)),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def shade(value: float, limit: float) -> int:
    """The palette's entry for a value from `-limit` to `limit`; what lies beyond is cut."""
    step = round(min(abs(value) / limit, 1.0) * STEPS)
    return EMPTY if step == 0 else step if value > 0 else STEPS + step


def heat_map(
    rows: Sequence[Sequence[int]], labels: Sequence[str], title: str, low: Colour = BLUE, high: Colour = BLUE
) -> str:
    """Layers from top to bottom, experts from left to right.

    Args:
        rows: palette entries; rows may differ in length.
        labels: of the rows.
        title: what a screen reader says.
        low: colour of negative values; high: of positive ones.
    """
    columns = max(map(len, rows))
    full = [[*row, *[EMPTY] * (columns - len(row))] for row in rows]
    step = max(7.0, min(22.0, 420 / len(rows)))
    height, plot = step * len(rows), WIDTH - LEFT - 8
    every = math.ceil(13 / step)  # labels that do not touch
    texts = [
        text(LEFT - 8, TOP + step * (number + 0.5), label, "end")
        for number, label in enumerate(labels)
        if number % every == 0
    ]
    ticks = range(0, columns, max(1, -(-columns // 16)))
    texts += [text(LEFT + plot * (tick + 0.5) / columns, TOP + height + 12, str(tick), "middle") for tick in ticks]
    texts.append(text(LEFT + plot / 2, TOP + height + 30, "expert", "middle"))
    texts.append(
        f'<text transform="translate(9 {TOP + height / 2:.1f}) rotate(-90)" text-anchor="middle">layer</text>'
        if height > 40
        else ""
    )
    frame = f'x="{LEFT}" y="{TOP}" width="{plot}" height="{height:.1f}"'
    image = (
        f'<image {frame} preserveAspectRatio="none" href="{picture(full, low, high)}"/><rect class="frame" {frame}/>'
    )
    return svg(WIDTH, TOP + height + BOTTOM, title, image + "".join(texts))


def square(rows: Sequence[Sequence[int]], title: str) -> str:
    """A heat map without axes."""
    frame = 'x="0.5" y="0.5" width="199" height="199"'
    body = f'<image {frame} preserveAspectRatio="none" href="{picture(rows)}"/><rect class="frame" {frame}/>'
    return svg(200, 200, title, body, "small")


def bars(values: Sequence[float], labels: Sequence[str], title: str, highest: float) -> str:
    """One bar per layer, from 0 to `highest`, with what it stands for above where there is room."""
    plot, height = WIDTH - LEFT - 8, 160
    width = plot / len(values)
    parts = []
    for part in (0, 0.5, 1):
        y = TOP + 14 + height * (1 - part)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + plot}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 8, y, f"{highest * part:.2g}", "end"))
    every = max(1, -(-len(values) // 24))
    for number, (value, label) in enumerate(zip(values, labels, strict=True)):
        tall = height * min(value / highest, 1.0)
        x, y = LEFT + width * number, TOP + 14 + height - tall
        parts.append(
            f'<rect class="bar" x="{x + width * 0.15:.1f}" y="{y:.1f}" width="{width * 0.7:.1f}" height="{tall:.1f}"/>'
        )
        if number % every == 0:
            parts.append(text(x + width / 2, TOP + height + 26, label, "middle"))
        if len(values) <= 16:
            parts.append(text(x + width / 2, y - 8, f"{value:.3f}", "middle"))
    parts.append(text(LEFT + plot / 2, TOP + height + 44, "layer", "middle"))
    return svg(WIDTH, TOP + height + 54, title, "".join(parts))


def legend(stops: Sequence[tuple[int, str]], low: Colour = BLUE, high: Colour = BLUE) -> str:
    """Patches of palette entries and what they stand for."""
    colours, opacity = palette(low, high)
    items = []
    for entry, label in stops:
        red, green, blue = colours[3 * entry : 3 * entry + 3]
        patch = f'<i style="background:rgba({red},{green},{blue},{opacity[entry] / 255:.2f})"></i>'
        items.append(f"<span>{patch}{escape(label)}</span>")
    return f'<p class="legend">{"".join(items)}</p>'


def text(x: float, y: float, content: str, anchor: str) -> str:
    """A label whose middle is at this height."""
    return f'<text x="{x:.1f}" y="{y:.1f}" dominant-baseline="central" text-anchor="{anchor}">{escape(content)}</text>'


def svg(width: float, height: float, title: str, body: str, kind: str = "wide") -> str:
    """A drawing that scales with the page."""
    view = f'viewBox="0 0 {width:g} {height:.0f}"'
    said = escape(title)
    return f'<svg class="{kind}" {view} role="img" aria-label="{said}"><title>{said}</title>{body}</svg>'
