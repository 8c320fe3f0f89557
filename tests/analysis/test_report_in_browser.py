"""The page in a real browser: every plot has a size, and nothing makes the page scroll sideways.

`CHROMIUM` names an executable that is not on the path.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

from hf_moe.analysis import html_report

sys.path.insert(0, str(Path(__file__).parent))
import reports

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
MEASURE = """() => ({
  scroll: document.documentElement.scrollWidth,
  client: document.documentElement.clientWidth,
  text: getComputedStyle(document.body).color,
  sizes: [...document.querySelectorAll('svg, image')].map(e => {
    const box = e.getBoundingClientRect(); return Math.min(box.width, box.height); }),
  outside: [...document.querySelectorAll('h1, h2, h3, p, dl, .box, footer')].filter(e => {
    const box = e.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth; }).length,
})"""


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with sync_api.sync_playwright() as playwright:
        executable = found or playwright.chromium.executable_path
        if not Path(executable).is_file():
            pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path, and playwright has none of its own")
        options = ["--no-sandbox", "--disable-gpu", "--no-zygote"]
        running = playwright.chromium.launch(executable_path=executable, args=options)
        yield running
        running.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("sizes", [(3, 8), (48, 128)], ids=["small", "large"])
def test_plots_render_and_nothing_overflows(browser, width, scheme, sizes, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(html_report(reports.inspection(*sizes)), encoding="utf-8")
    page, requests = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    found = page.evaluate(MEASURE)
    assert found["scroll"] <= found["client"] == width and found["outside"] == 0
    assert len(found["sizes"]) == 2 * (1 + sizes[0] + 2) + 1 and min(found["sizes"]) > 20
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    assert (found["text"] == "rgb(29, 33, 38)") == (scheme == "light")
    shot = page.screenshot(full_page=True)
    assert shot.startswith(b"\x89PNG") and len(shot) > 30_000  # a blank page takes a tenth of that
    page.close()
