"""The page is whole by itself: well-formed, nothing from elsewhere, and pictures that show the numbers."""

import base64
import re
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hf_moe.analysis import html_report
from hf_moe.analysis.charts import EMPTY, FLAGGED, STEPS, picture, shade
from hf_moe.analysis.report import nice_limit
from hf_moe.analysis.units import count, layer_labels, size

sys.path.insert(0, str(Path(__file__).parent))
import reports


def parse(page: str) -> ElementTree.Element:
    doctype, _, rest = page.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    return ElementTree.fromstring(rest)


def pixels(uri: str) -> list[list[int]]:
    """Entries of the palette, read back by the PNG standard."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, position = {}, 8
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        chunks[kind] = data[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack(">I", data[position + 8 + length : position + 12 + length])
        assert checksum == zlib.crc32(kind + chunks[kind])
        position += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 3) and len(chunks[b"PLTE"]) == 3 * len(chunks[b"tRNS"]) <= 768
    raw = zlib.decompress(chunks[b"IDAT"])
    lines = [raw[(width + 1) * row : (width + 1) * (row + 1)] for row in range(height)]
    assert all(line[0] == 0 for line in lines)
    return [list(line[1:]) for line in lines]


@pytest.mark.parametrize("routed", [True, False])
def test_well_formed_and_nothing_from_elsewhere(routed):
    page = html_report(reports.inspection(routed=routed))
    root = parse(page)
    for element in root.iter():
        assert element.tag not in ("script", "link", "iframe", "object", "embed", "img", "base")
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action"):
                assert value.startswith("data:image/png;base64,")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", re.sub(r'href="data:[^"]*"', "", page))
    assert ("Expert load" in page) == routed


def test_text_is_escaped():
    root = parse(html_report(reports.inspection()))
    assert [element.text for element in root.iter("h1")] == [reports.inspection().model]
    assert "code <b>" in [element.text for element in root.iter("h3")] and not list(root.iter("b"))


def test_the_pictures_show_the_numbers():
    found = reports.inspection()
    assert found.routing is not None
    images = [pixels(element.attrib["href"]) for element in parse(html_report(found)).iter("image")]
    loads, *others = images
    assert len(images) == 1 + 3 + 2  # loads, co-activation per layer, preferences per domain
    for row, layer in zip(loads, found.routing.layers, strict=True):
        assert row == [FLAGGED if share == 0 else round(min(share * 8 / 4, 1) * STEPS) for share in layer.loads]
    assert loads[1][3] == FLAGGED and others[-1][1][3] == FLAGGED
    for rows, layer in zip(others, found.routing.layers):
        largest = max(max(map(max, each.coactivation)) for each in found.routing.layers)
        assert rows == [[round(value / largest * STEPS) for value in row] for row in layer.coactivation]


def test_one_domain_has_no_comparison_and_one_expert_no_pairs():
    found = reports.inspection(num_layers=1)
    assert found.routing is not None
    alone = replace(found.routing.layers[0], coactivation=[[0.0] * 8] * 8, divergence=None)
    page = html_report(replace(found, routing=replace(found.routing, tokens={"all": 9}, layers=[alone])))
    parse(page)
    assert "Divergence" not in page and "one expert only" in page and "None: every expert was chosen" in page


def test_layers_of_different_sizes_share_a_picture():
    found = reports.inspection(num_layers=2)
    assert found.routing is not None
    layers = [reports.layer_routing(1, 4, []), reports.layer_routing(2, 6, [])]
    page = html_report(replace(found, routing=replace(found.routing, layers=layers)))
    loads = pixels(next(parse(page).iter("image")).attrib["href"])
    assert loads[0][4:] == [EMPTY, EMPTY]


def test_shades_and_scales():
    assert [shade(value, 2.0) for value in (0, 1, 2, 9, -1, -9)] == [
        0,
        STEPS // 2,
        STEPS,
        STEPS,
        3 * STEPS // 2,
        2 * STEPS,
    ]
    assert pixels(picture([[0, FLAGGED], [1, 2]])) == [[0, FLAGGED], [1, 2]]
    assert [nice_limit(value) for value in (0, 0.0003, 0.07, 0.1, 0.6, 1)] == pytest.approx(
        [1e-4, 5e-4, 0.1, 0.1, 1, 1]
    )
    assert [count(n) for n in (12, 1234, 46_702_792_704)] == ["12", "1.23k", "46.7B"]
    assert [size(n) for n in (0, 640, 131072, 3 * 2**30)] == ["0 B", "640 B", "128 KiB", "3 GiB"]
    assert layer_labels(["model.layers.3.mlp", "model.layers.10.mlp"]) == ["3", "10"]
    assert layer_labels(["a.layers.3.mlp", "b.layers.3.mlp"]) == ["a.layers.3.mlp", "b.layers.3.mlp"]
