"""HTML page and text table of a hand-made evaluation."""

import dataclasses
from html.parser import HTMLParser
import re

import numpy as np
import pytest

from taskexpert_jax import tasks
from taskexpert_jax.evaluation import results
from taskexpert_jax.evaluation.extremes import Extremes
from taskexpert_jax.evaluation.gate_statistics import GateSummary
from taskexpert_jax.evaluation.results import ClassScore, Evaluation
from taskexpert_jax.report import charts, evaluation_page, gate_maps, markup
from taskexpert_jax.tasks.metrics.boundary.scores import THRESHOLDS, BoundaryCounts

NAMES = ("semseg", "depth", "normals", "edge", "human_parts", "sal")
TASKS = tasks.build(NAMES, loss_weights=dict.fromkeys(NAMES, 1.0), semseg_classes=("wall", "<bed> & bath", "door"))
VOID = {"meta", "img", "br"}
NASTY = 'scene <1> & "2"'


class Page(HTMLParser):
    """A page's text and elements; an assertion fails on unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag, **attributes):
        return [attrs for name, attrs in self.elements if name == tag and attributes.items() <= attrs.items()]


def counts():
    """Counts whose precision rises and recall falls with the threshold; nothing is above the last one."""
    steps = np.arange(THRESHOLDS.size)
    sum_p = 2_000 - 15 * steps
    matched = 900 - steps**2 // 20
    matched[-1] = sum_p[-1] = 0
    return BoundaryCounts(
        *(np.asarray(row, np.int64)[None] for row in (matched, np.full_like(steps, 1_000), matched, sum_p))
    )


def evaluation():
    extremes = {}
    for task in TASKS:
        ranked = extremes[task.name] = Extremes(task.published(["edge/odsF"]))
        for position in range(10):
            uris = tuple(f"data:image/png;base64,{task.name}{position}{part}" for part in "ipl")
            ranked.offer(position / 2, position, NASTY if position == 9 else f"id {position}", lambda uris=uris: uris)
    metrics = {"edge/odsF": 73.25, "edge/loss_plain": 0.0625, "semseg/pixel_accuracy": 81.5}
    metrics |= {f"{task.name}/{task.main_metric}": 10.0 + i for i, task in enumerate(TASKS) if task.name != "edge"}
    weights = np.tile([0.5, 0.125, 0.25, 0.125], (len(TASKS), 2, 1))
    scores = (
        ClassScore(0, "wall", 75.0, 90, 90, 80),
        ClassScore(1, "<bed> & bath", 12.5, 90, 90, 20),
        ClassScore(2, "door", 0.0, 0, 5, 0),
    )
    facts = {
        "version": "0.1.0 (abc1234)",
        "workdir": "runs/<one>",
        "checkpoint": "best",
        "step": 700,
        "examples": 10,
        "seconds": 1.5,
        "variant": "tiny",
        "dataset": {"name": "scenes", "split": "val", "fingerprint": ""},
        "date": "2026-01-31T12:00:00+00:00",
        "devices": "1 cpu",
        "versions": {"jax": "0"},
    }
    return Evaluation(
        tasks=TASKS,
        facts=facts,
        metrics=metrics,
        best_constant={name: 1.5 for name in metrics if name != "edge/odsF"},
        per_class={"semseg": scores},
        boundaries={"edge": counts()},
        gates=GateSummary(("expert 1", "expert 2", "expert 3", "memory"), weights, np.full((len(TASKS), 2), 0.875)),
        extremes=extremes,
    )


FOUND = evaluation()
TEXT = evaluation_page.html(FOUND)
PAGE = Page(TEXT)


def test_the_page_needs_nothing_but_itself():
    assert TEXT.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", TEXT, re.IGNORECASE)
    assert all(attrs["src"].startswith("data:image/") for attrs in PAGE.all("img"))
    targets = {attrs["href"] for attrs in PAGE.all("a")}
    assert targets == {f"#{attrs['id']}" for attrs in PAGE.all("section")}


def test_the_footer_has_version_and_commit():
    assert "TaskExpert-JAX 0.1.0 (abc1234); jax 0." in PAGE.text


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_every_task_has_its_section_with_its_number_and_its_examples(task):
    (_,) = PAGE.all("section", id=task.name)
    published = task.published(FOUND.metrics)
    assert f"{published.title} {FOUND.metrics[f'{task.name}/{published.metric}']:.4g}" in PAGE.text
    shown = [attrs["src"] for attrs in PAGE.all("img") if f",{task.name}" in attrs["src"]]
    low, high = [0, 1, 2, 3], [9, 8, 7, 6]
    order = low + high if published.higher_is_better else high + low  # the worst first
    assert [uri.rpartition(",")[2] for uri in shown] == [f"{task.name}{n}{part}" for n in order for part in "ipl"]


def test_names_from_outside_are_escaped():
    assert "<1>" not in TEXT and "<bed>" not in TEXT and "<one>" not in TEXT
    assert "<bed> & bath" in PAGE.text and "runs/<one>" in PAGE.text
    assert f"prediction of {NASTY}" in {attrs["alt"] for attrs in PAGE.all("img")}


def test_only_the_published_metrics_are_marked():
    assert len(PAGE.all("tr", class_="published")) == 0  # the attribute is `class`
    assert len(PAGE.all("tr", **{"class": "published"})) == len(TASKS)
    assert "odsF ↑" in PAGE.text and "loss_plain" in PAGE.text and "rmse ↓" in PAGE.text


def test_classes_are_listed_from_the_best_and_those_not_labelled_last():
    bars = [float(attrs["width"]) for attrs in PAGE.all("rect", **{"class": "bar"})]
    assert bars == [75.0, 12.5, 0.0]
    names = [text for text in PAGE.text if text in ("wall", "<bed> & bath", "door", "none")]
    assert names == ["wall", "<bed> & bath", "door", "none"]


def test_the_curve_marks_its_best_point_where_it_is():
    table = counts().table()[:, 0].astype(float)
    recall, precision = table[0] / table[1], table[2] / np.maximum(table[3], 1)
    f = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    best = int(f.argmax())
    assert 0 < best < 99
    assert f"F {100 * f[best]:.1f} at threshold {THRESHOLDS[best]:g}" in PAGE.text
    (point,) = PAGE.all("circle")
    (curve,) = PAGE.all("polyline", **{"class": "curve"})
    corners = [tuple(map(float, corner.split(","))) for corner in curve["points"].split()]
    assert len(corners) == THRESHOLDS.size - 1  # at the last threshold nothing is left
    assert corners[best] == (float(point["cx"]), float(point["cy"]))
    # Axes: recall to the right, precision upwards, both linear over the length of their axis.
    (x0, y0), (x1, y1) = corners[0], corners[90]
    assert x0 > x1 and y0 > y1
    chart = charts.precision_recall([0.0, 1.0, 0.5], [0.0, 1.0, 0.25], 1, title="t", best_label="b")
    ends = Page(markup.to_html(chart)).all("polyline", **{"class": "curve"})[0]["points"].split()
    right, upper = map(float, ends[0].split(","))
    half, quarter = map(float, ends[1].split(","))
    lines = Page(markup.to_html(chart)).all("line")
    left, lower = min(float(line["x1"]) for line in lines), max(float(line["y1"]) for line in lines)
    assert half == pytest.approx((left + right) / 2, abs=0.1)
    assert quarter == pytest.approx(lower + (upper - lower) / 4, abs=0.1)


def test_gate_weights_are_coloured_on_one_scale_from_0_to_1():
    cells = [attrs for attrs in PAGE.all("td") if attrs.get("class") == "weight"]
    assert len(cells) == len(TASKS) * 2 * 4
    colours = gate_maps.weight_colours()
    for cell, weight in zip(cells[:4], (0.5, 0.125, 0.25, 0.125), strict=True):
        assert f"background: {gate_maps.hexadecimal(colours[round(255 * weight)])};" in cell["style"]
    assert cells[1]["title"] == "semantic segmentation, tap 1, expert 2: 0.1250; even weights: 0.2500"
    # The entropy of the mean weights is 1.75 of 2 bits, the mean entropy the same share: no pixel differs.
    assert TEXT.count("<td>0.88</td><td>0.00</td>") == len(TASKS) * 2 and "memory" in PAGE.text


def test_a_page_without_gates_boundaries_or_examples_says_less():
    bare = dataclasses.replace(
        FOUND, gates=None, boundaries={}, extremes={task.name: Extremes(task.published([])) for task in TASKS}
    )
    page = Page(evaluation_page.html(bare))
    assert "Gates" in page.text and not page.all("table", **{"class": "means"})
    assert not page.all("img") and not page.all("polyline")


def test_the_texts_table_has_the_published_metric_of_each_task_first():
    lines = results.table(results.rows(TASKS, FOUND.metrics, FOUND.best_constant)).splitlines()
    assert lines[0].split() == ["task", "metric", "model", "best", "constant"]
    assert lines[1].split() == ["semantic", "segmentation", "mIoU", "↑", "*", "10", "1.5"]
    assert lines[2].split() == ["pixel_accuracy", "81.5", "1.5"]
    (edge,) = [index for index, line in enumerate(lines) if line.startswith("boundaries")]
    assert lines[edge].split() == ["boundaries", "odsF", "↑", "*", "73.25", "-"]
    assert lines[edge + 1].split() == ["loss_plain", "0.0625", "1.5"]
