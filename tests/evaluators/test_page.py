"""A report as a page and as JSON: all that it says, nothing loaded, nothing that could be taken for markup."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import numpy as np

import streamrec as sr
from streamrec.evaluators import Window
from streamrec.storage import Store
from streamrec.testing._state import copy_state

WINDOWS = [
    Window(100.0 * n, 100.0 * (n + 1), 10, {"AUC": 0.7 + n / 100, "CTR": math.nan if n else 0.1}) for n in range(4)
]
REPORT = sr.Report(
    {"AUC": 0.71, "CTR": 0.1, "NE": math.nan, "AUC[country=<b>GB]": 0.6},
    {"events": 40, "late": 3, "early": 0},
    WINDOWS,
    2.0,
)


class Reader(HTMLParser):
    """What a browser would: the tags, balanced, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.lines: list[str] = []
        self.attributes: dict[str, str | None] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(attrs)
        if tag == "polyline":
            self.lines.append(dict(attrs)["points"] or "")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_says_all_and_loads_nothing() -> None:
    store = Store("memory://page", clock=lambda: 1_700_000_000.0)
    store.versions.write({"bias": 0.5}, {})
    store.served.pin(1, why="not worse than <0>")
    page = REPORT.to_html(title="A & B", decisions=store.served.history())
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert not {"script", "link", "img", "iframe"} & set(reader.tags) and not {"src", "href"} & set(reader.attributes)
    assert "b" not in reader.tags  # what a slice is called is no markup
    for said in (
        "A &amp; B",
        "0.7100",
        "undefined",
        "country=&lt;b&gt;GB",
        "late",
        "not worse than &lt;0&gt;",
        "2023-11-14",
    ):
        assert said in page
    assert "early" not in page
    # one picture: of the others too few windows tell
    (line,) = reader.lines
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert len(heights) == 4 and heights == sorted(heights, reverse=True)


def test_the_page_shows_intervals_and_what_was_predicted_against_what_happened() -> None:
    rng = np.random.default_rng(0)
    shown = [
        sr.Impression(f"i{n}", 10.0 * n, f"u{n % 9}", f"p{n % 5}", {"land": "NO" if n % 3 else "IT"})
        for n in range(600)
    ]
    metrics = [sr.AUC(), sr.LogLoss(), sr.GAUC(), sr.Slices(by="land", metrics=[sr.NormalizedEntropy()])]
    trainer = sr.OnlineTrainer(model=sr.FM(sr.Schema(sr.Id("item")), dim=4), metrics=metrics, window=2_000.0)
    trainer.push([sr.Labeled(one, float(rng.random() < 0.2 + 0.1 * (n % 5))) for n, one in enumerate(shown)])
    report = trainer.report()
    assert {*report.intervals} == {"AUC", "LogLoss", "GAUC", "NormalizedEntropy[land=NO]", "NormalizedEntropy[land=IT]"}
    assert [{*window.intervals} for window in report.windows] == [{*report.intervals}] * 3
    for low, high in [*report.intervals.values(), *report.windows[1].intervals.values()]:
        assert low < high
    told = json.loads(report.to_json())
    assert told["windows"][1]["intervals"]["GAUC"] == list(report.windows[1].intervals["GAUC"])
    assert sum(one["weight"] for one in told["curves"]["click"]) == 600
    low, high = report.intervals["NormalizedEntropy[land=NO]"]
    said = f"({low:,.4f} to {high:,.4f})"
    page = report.to_html()
    assert said in page[page.index("<h2>Slices") :] and said in str(report)
    reader = Reader()
    reader.feed(page)
    assert not reader.open and reader.tags.count("polygon") == 3
    curve = report.curves["click"]
    assert reader.tags.count("circle") == len(curve) > 3
    # a point that is right lies on the line: as far right as it is up
    most = max(max(one.predicted, one.high) for one in curve) * 1.05
    for one in curve:
        x, y = 62 + 300 * one.predicted / most, 10 + 300 * (1 - one.actual / most)
        assert f'cx="{x:.1f}" cy="{y:.1f}"' in page
    # and all of it after a resume
    twin = sr.OnlineTrainer(
        model=sr.FM(sr.Schema(sr.Id("item")), dim=4), metrics=[m.fresh() for m in metrics], window=2_000.0
    )
    twin.load_state_dict(copy_state(trainer.state_dict()))
    assert twin.report() == report


def test_an_empty_report_is_a_page_too() -> None:
    reader = Reader()
    reader.feed(sr.Report({}, {}).to_html())
    assert not reader.open and "svg" not in reader.tags


def test_json_has_all_of_it() -> None:
    told = json.loads(REPORT.to_json())
    assert told["metrics"]["NE"] is None and told["counts"] == dict(REPORT.counts) and told["seconds"] == 2.0
    assert [one["metrics"]["AUC"] for one in told["windows"]] == [window.metrics["AUC"] for window in WINDOWS]


def test_promotions_and_rollbacks_are_marked_where_they_were_decided() -> None:
    store = Store("memory://page-marks", clock=lambda: 1_700_000_000.0)
    for _ in range(2):
        store.versions.write({"bias": 0.5}, {})
    served = store.served
    served.pin(1, why="the first")  # before any event: no mark
    served.pin(2, why="not worse <than> 1", time=120.0)
    served.challenge(2, time=150.0)  # serves nothing else
    served.pin(1, why="version 2 is worse than 1", time=230.0)
    served.note("the learner goes back to the checkpoint of version 1", time=240.0)
    served.pin(2, why="outside of the picture", time=9_000.0)
    page = REPORT.to_html(decisions=served.history())
    auc = page[page.index("<h2>AUC</h2>") :]
    auc = auc[: auc.index("</svg>")]
    assert auc.count('class="up"') == 1 and auc.count('class="down"') == 2
    assert "version 2: not worse &lt;than&gt; 1" in auc and "is tried" not in auc and "outside" not in auc
    assert Reader().feed(page) is None
    # the pictures begin at 50 and end at 350, in the middles of their first and last windows
    places = [float(part.split('"')[0]) for part in auc.split('class="up" x1="')[1:]]
    left, right = 62.0, 850.0
    assert abs(places[0] - (left + (right - left) * (120 - 50) / 300)) < 0.1
