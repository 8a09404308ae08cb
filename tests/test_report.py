"""The report page: its parts, its faithfulness to what it is given, and that it makes no external request."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from pcs_trainer import version
from pcs_trainer.cli.progress import Progress, line_of
from pcs_trainer.report.figures import curve_svg, data_uri, heat, ticks
from pcs_trainer.report.page import page, write_report
from pcs_trainer.units import bytes_text, time_text
from PIL import Image
from trainer_cases import cache, trainer

__all__ = ["cache"]

VOID = {"meta", "link", "img", "input", "br", "line", "polyline"}
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


class Checked(HTMLParser):
    """Every tag closed in order; every address that the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [given[k] for k in ("src", "href", "action", "srcset") if given.get(k) is not None]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            assert "alt" in given

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def picture(value: int = 90) -> np.ndarray:
    return np.full((64, 64, 3), value, np.uint8)


def full() -> dict:
    rng = np.random.default_rng(0)
    steps = list(range(1, 41))
    loss = [1 / s + 0.1 for s in steps]
    probe = {"step": [5.0, 10.0], "held_out": [0.5, 0.4], "drift": [0.01, 0.042]}
    return {
        "title": "A <mug> & more",
        "lead": "Four photos.",
        "photos": [picture(), picture(120)],
        "sheet": {
            "columns": ["Base model", "TextBoost"],
            "rows": [
                {"prompt": "a <mug> mug on the beach", "cells": [picture(), picture(200)]},
                {"prompt": "a <mug> mug at night", "cells": [picture(), None]},
            ],
        },
        "numbers": {"columns": ["method", "trainable parameters"], "rows": [["TextBoost", 24704]]},
        "curves": [{"name": "TextBoost", "steps": steps, "loss": loss, "smoothed": loss, "probe": probe}],
        "attention": {
            "items": [{"label": "TextBoost", "picture": picture(), "maps": [rng.random((16, 16)) for _ in range(6)]}]
        },
        "timings": [{"name": "training", "seconds": 75.0}],
        "memory": [{"name": "TextBoost", "parts": {"weights": 23_000_000, "nothing": 0}}],
        "proof": [{"name": "TextBoost", "checks": [{"what": "gradients agree", "passed": True}]}],
        "settings": [{"name": "TextBoost", "values": {"steps": 250, "augment": True}}],
        "environment": {"torch": "2.13"},
        "failures": ["Custom Diffusion: training failed: no space"],
    }


def test_every_part_is_there_and_every_tag_is_closed():
    data = full()
    found = Checked(page(data))
    assert set(data) - {"title", "lead"} <= set(found.ids)
    text = " ".join(found.text)
    for said in (
        "A <mug> & more",
        "a <mug> mug on the beach",
        "24,704",
        "1 min 15 s",
        "23.0 MB",
        "no space",
        "moved by 4.2%",
        "held-out",
    ):
        assert said in text
    assert "nothing" not in text  # a component of no bytes is no component


def test_the_page_names_no_address_outside_itself():
    text = page(full())
    for address in Checked(text).addresses:
        assert address.startswith(("data:", "#")), address[:80]
    assert "://" not in re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", text)
    assert "@import" not in text and "url(" not in text


def test_a_section_without_data_is_left_out():
    found = Checked(page({"title": "T", "photos": [picture()]}))
    assert "photos" in found.ids and "curves" not in found.ids and "memory" not in found.ids


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chart": []}, "no section 'chart'"),
        ({"title": ""}, "needs a title"),
        ({"sheet": {"columns": ["a"], "rows": [{"prompt": "p", "cells": []}]}}, "0 pictures for 1 columns"),
        ({"photos": [np.zeros((4, 4), np.uint8)]}, "must be uint8"),
        ({"attention": {"items": [{"label": "x", "picture": picture(), "maps": [np.full((2, 2), np.nan)]}]}}, "finite"),
    ],
)
def test_wrong_data_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        page({"title": "T"} | change)


def test_the_version_is_the_distributions_and_its_absence_is_a_sentence(monkeypatch):
    assert version.own_version() == importlib.metadata.version("pcs_kernels")

    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", nothing)
    assert "pcs_kernels is not installed. Fix: pip install" in version.own_version()
    assert "pcs_kernels is not installed" in page(
        {"title": "T", "photos": [picture()]}
    )  # a page is written all the same


def test_a_failed_write_leaves_the_old_page(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", {"title": "first"})
    with pytest.raises(ValueError):
        write_report(path, {"title": ""})
    assert "<title>first</title>" in path.read_text()
    assert os.listdir(path.parent) == ["report.html"]


def test_pictures_come_back_as_they_went_in():
    exact = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    head, _, body = data_uri(exact).partition(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))), exact)
    large = data_uri(Image.new("RGB", (1500, 900)))
    assert large.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))).size == (640, 384)


def test_a_map_is_brightest_where_it_is_largest():
    grid = np.zeros((8, 8))
    grid[2, 5] = 3.0
    shown = np.asarray(heat(grid, 64)).astype(int)
    bright = shown[..., :3].sum(-1)
    assert np.unravel_index(bright.argmax(), bright.shape)[0] // 8 == 2
    assert np.unravel_index(bright.argmax(), bright.shape)[1] // 8 == 5
    assert bright.min() < 150 < 600 < bright.max()


def test_curves_leave_out_what_is_not_finite_and_keep_spikes_inside():
    y = [1.0, float("nan"), 0.5, 900.0, *[0.4] * 200]
    drawn = curve_svg("x", [{"label": "loss", "x": list(range(len(y))), "y": y, "colour": 0}])
    points = re.search(r'points="([^"]+)"', drawn)[1].split()
    assert len(points) == len(y) - 1
    assert all(0 <= float(v) <= 400 for p in points for v in p.split(","))
    with pytest.raises(ValueError, match="finite"):
        curve_svg("x", [{"label": "loss", "x": [1], "y": [float("nan")], "colour": 0}])


def test_numbers_in_words():
    assert [time_text(s) for s in (0.04, 9.96, 61, 7500)] == ["0.0 s", "10.0 s", "1 min 01 s", "2 h 05 min"]
    assert [bytes_text(b) for b in (12, 64_300, 5_000_000, 6_130_000_000)] == ["12 B", "64.3 KB", "5.0 MB", "6.13 GB"]
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_progress_line_says_all_and_leaves_out_the_unknown():
    data = {"loss": 0.5, "smoothed": 0.4, "subject": 0.3, "prior": None, "its_per_second": 0.05, "seconds_left": 70}
    line = line_of("textboost", 3, 9, data)
    assert line == "textboost 3/9  loss 0.5000  smoothed 0.4000  20.0 s/it  left 1 min 10 s"
    assert "smoothed 0.4000  subject 0.3000  prior 0.2000  20" in line_of("x", 3, 9, data | {"prior": 0.2})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_and_off_it():
    pytest.importorskip("rich")
    for stream, live in ((Terminal(), True), (io.StringIO(), False)):
        with Progress("textboost", stream) as progress:
            for step in range(1, 4):
                progress.count(step, 3, loss=0.5, smoothed=0.4, its_per_second=2.0, peak_memory=5_000_000)
            progress.say("[3/3] saved: out/[x].png")
        shown = stream.getvalue()
        assert "3/3" in shown and "2.00 it/s" in shown and "5.0 MB" in shown and "out/[x].png" in shown
        assert ("\x1b[" in shown) is live


PROBE = """<script>
const slider = document.querySelector(".slider input"), answer = {};
const lit = () => [...document.querySelectorAll(".stack img + img")].flatMap((map, i) =>
  getComputedStyle(map).opacity === "1" ? [i] : []);
answer.first = lit();
slider.value = 2;
slider.dispatchEvent(new Event("input"));
answer.second = lit();
answer.said = document.querySelector("output").textContent;
answer.wide = document.documentElement.scrollWidth - window.innerWidth;
document.querySelector("button.zoom").click();
answer.large = document.getElementById("large").open;
addEventListener("load", () => {
  answer.asked = performance.getEntriesByType("resource").map(entry => entry.name).filter(n => !n.startsWith("data:"));
  document.documentElement.setAttribute("data-answer", JSON.stringify(answer));
});
</script></body>"""


def in_browser(text: str, folder) -> dict:
    """What the probe found in a headless Chromium, in a window of a phone's kind."""
    path = folder / "report.html"
    path.write_text(text.replace("</body>", PROBE))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--window-size=520,900"]
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-answer="([^"]+)"', done.stdout)
    assert found, done.stderr[-500:]
    return json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the page is parsed by the other tests")
def test_in_a_browser_the_slider_works_and_nothing_is_asked_for(tmp_path):
    answer = in_browser(page(full()), tmp_path)
    assert answer["first"] == [5] and answer["second"] == [2] and answer["said"] == "step 3 of 6"
    assert answer["wide"] <= 0 and answer["large"] is True
    assert answer["asked"] == []
    # The probe would see a request: one is put in, and the page's own policy taken out.
    outside = '<main><img alt="" src="http://127.0.0.1:9/nowhere.png">'
    asking = re.sub(r"<meta http-equiv[^>]+>", "", page(full())).replace("<main>", outside)
    assert len(in_browser(asking, tmp_path)["asked"]) == 1


@pytest.mark.slow
def test_what_is_drawn_beside_the_steps_is_told_with_the_time_left(model, tmp_path):
    """Class images before step 1 and the report's images after it, the latter at the size of the training."""
    from pcs_trainer.report.run_report import STEPS, write_run_report

    events, told = [], []
    settings = dict(prior_weight=1.0, prior_images=3, prior_steps=4, resolution=32, steps=2, prior_folder=None)
    t = trainer(model, "custom_diffusion", tmp_path, **settings)
    concept = t.train(on_event=events.append)
    counted = [e.data for e in events if e.kind == "progress"]
    assert [d["done"] for d in counted] == [1, 2, 3] and {d["total"] for d in counted} == {4}
    assert counted[-1]["seconds_left"] > 0 and "class images 1/4" in str(
        next(e for e in events if e.kind == "progress")
    )

    def tell(done, total, label, seconds_left):
        told.append((done, total, label))

    page = write_run_report(tmp_path, model, t, concept, [e for e in events if e.kind != "step"], 1.0, tell)
    assert told == [(n, 2 * STEPS, "report") for n in range(1, 2 * STEPS)] and page.is_file()
