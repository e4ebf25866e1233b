"""The evaluation as a page: one HTML file with everything in it, for screens light and dark, phones and paper."""

import math
import pathlib

import numpy as np

from taskexpert_jax.evaluation import gate_statistics, results
from taskexpert_jax.evaluation.extremes import Entry
from taskexpert_jax.evaluation.results import ClassScore, Evaluation
from taskexpert_jax.report import charts
from taskexpert_jax.report.markup import Element, element, footer, page, sentence
from taskexpert_jax.tasks import Task
from taskexpert_jax.tasks.metrics.boundary.scores import THRESHOLDS, BoundaryCounts, curve

_STYLE = pathlib.Path(__file__).with_name("evaluation_page.css")


def html(found: Evaluation) -> str:
    """The page's text."""
    facts = found.facts
    title = f"{facts['variant']} on {facts['dataset']['name']}"
    sections = [_metrics(found), *(_task(found, task) for task in found.tasks), _gates(found)]
    root = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", f"Evaluation: {title}"),
            element("style", _STYLE.read_text()),
        ),
        element(
            "body",
            element("header", element("h1", f"Evaluation of {title}"), _facts(found), _overview(found)),
            element("main", *sections),
            footer(found.facts, "What was evaluated, and how"),
        ),
        lang="en",
    )
    return page(root)


def _facts(found: Evaluation) -> Element:
    facts = found.facts
    dataset = facts["dataset"]
    entries = [
        ("run", facts["workdir"]),
        ("checkpoint", f"step {facts['step']} ({facts['checkpoint']})"),
        ("examples", f"{facts['examples']} of split {dataset['split']}"),
        ("evaluated", f"{facts['date'].replace('T', ' ').replace('+00:00', ' UTC')}, {facts['seconds']:g} s"),
        ("devices", facts["devices"]),
        ("data", dataset["fingerprint"][:16] or "no fingerprint"),
    ]
    parts = (element("div", element("dt", name), element("dd", value)) for name, value in entries)
    return element("dl", *parts, class_="facts")


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _overview(found: Evaluation) -> Element:
    """The published numbers, each a link to its task."""
    cards = []
    for row in results.rows(found.tasks, found.metrics, found.best_constant):
        if row.published:
            link = element(
                "a",
                element("span", row.task.title, class_="title"),
                element("span", _number(row.value), class_="value"),
                element("span", f"{row.published.title} {row.published.arrow}", class_="faint"),
                href=f"#{row.task.name}",
            )
            cards.append(element("li", link))
    others = element("p", element("a", "all metrics", href="#metrics"), " · ", element("a", "gates", href="#gates"))
    return element("nav", element("ul", *cards, class_="cards"), others, aria_label="sections")


def _metrics(found: Evaluation) -> Element:
    columns = (("metric", "name"), ("model", None), ("best constant", None))
    head = element("tr", *(element("th", name, scope="col", class_=kind) for name, kind in columns))
    rows = results.rows(found.tasks, found.metrics, found.best_constant)
    bodies = []
    for task in found.tasks:
        lines = [
            element("tr", element("th", sentence(task.title), scope="rowgroup", colspan=len(columns), class_="name"))
        ]
        for row in rows:
            if row.task is task:
                name = f"{row.metric} {row.published.arrow}" if row.published else row.metric
                numbers = (element("td", _number(value)) for value in (row.value, row.constant))
                marked = "published" if row.published else None
                lines.append(element("tr", element("td", name, class_="name"), *numbers, class_=marked))
        bodies.append(element("tbody", *lines))
    table = element("table", element("thead", head), *bodies, class_="metrics")
    return element(
        "section",
        element("h2", "All metrics"),
        element(
            "p",
            "The published metric of each task is marked: ↑ higher is better, ↓ lower is better. The best constant is "
            "the one value that, given to every pixel, scores best: what a model must beat.",
        ),
        element("div", table, class_="scroll"),
        id="metrics",
    )


def _task(found: Evaluation, task: Task) -> Element:
    published = task.published(found.metrics)
    name = f"{task.name}/{published.metric}"
    direction = "higher is better" if published.higher_is_better else "lower is better"
    constant = found.best_constant.get(name)
    compared = "" if constant is None else f"; the best constant has {_number(constant)}"
    value = element("strong", f"{published.title} {_number(found.metrics[name])}")
    parts: list[Element] = [element("h2", sentence(task.title)), element("p", value, f", {direction}{compared}.")]
    if task.name in found.per_class:
        parts += _classes(task, found.per_class[task.name])
    if task.name in found.boundaries:
        parts += _curve(found.boundaries[task.name])
    return element("section", *parts, *_extremes(found, task), id=task.name)


def _classes(task: Task, scores: tuple[ClassScore, ...]) -> list[Element]:
    from taskexpert_jax.tasks import drawing

    colours = drawing.colour(task, np.arange(len(scores), dtype=np.uint8)[None])[0]
    items = []
    for score in sorted(scores, key=lambda score: (score.labelled == 0, -score.iou)):
        red, green, blue = (int(part) for part in colours[score.index])
        unseen = score.labelled == 0
        items.append(
            element(
                "li",
                element("span", class_="swatch", style=f"background: rgb({red} {green} {blue})"),
                element("span", score.name, class_="name", title=score.name),
                charts.bar(score.iou / 100),
                element("span", "none" if unseen else f"{score.iou:.1f}", class_="value"),
                class_="unseen" if unseen else None,
            )
        )
    note = " “None”: not in the ground truth; it counts as 0." if any(score.labelled == 0 for score in scores) else ""
    return [
        element("h3", "IoU of each class"),
        element("p", "In percent, pooled over the set." + note, class_="faint"),
        element("ul", *items, class_="classes"),
    ]


def _curve(counts: BoundaryCounts) -> list[Element]:
    precision, recall, f = curve(counts)
    best = int(f.argmax())
    chart = charts.precision_recall(
        recall.tolist(),
        precision.tolist(),
        best,
        title="Precision and recall of boundaries",
        best_label=f"F {100 * f[best]:.1f} at threshold {THRESHOLDS[best]:g}",
    )
    return [
        element("h3", "Precision and recall of boundaries"),
        element("p", "Over the thresholds, pooled over the set; along a dotted line F is the same.", class_="faint"),
        chart,
    ]


def _extremes(found: Evaluation, task: Task) -> list[Element]:
    ranked = found.extremes[task.name]
    names = ("image", "prediction", "ground truth")
    sides = [
        element(
            "div",
            element("h3", title),
            element("div", *(element("span", name) for name in names), class_="three heads"),
            *(_example(task, entry, ranked.score.title) for entry in entries),
        )
        for title, entries in (("Worst examples", ranked.worst), ("Best examples", ranked.best))
        if entries
    ]
    if not sides:
        return []
    classes = ", over the classes that it has" if task.class_names else ""
    note = f"Ranked by the {ranked.score.title} of the single image{classes}. {task.kind.caption}"
    return [element("div", *sides, class_="ends"), element("p", note, class_="faint")]


def _example(task: Task, entry: Entry, score: str) -> Element:
    sharp = None if task.kind.jpeg else "pixelated"
    shown = zip(entry.pictures, ("image", "prediction", "ground truth"), (None, sharp, sharp), strict=True)
    images = (element("img", src=uri, alt=f"{name} of {entry.example_id}", class_=kind) for uri, name, kind in shown)
    caption = element("figcaption", f"{entry.example_id}: {score} {_number(entry.score)}")
    return element("figure", element("div", *images, class_="three"), caption)


def _gates(found: Evaluation) -> Element:
    if found.gates is None:
        return element(
            "section",
            element("h2", "Gates"),
            element("p", "Not collected: the predictions are averaged over several views of each image."),
            id="gates",
        )
    choices, weights, entropy = found.gates
    largest = float(weights.max())
    tables = [
        element("div", _gate_table(task, choices, of_task, spread, largest), class_="scroll")
        for task, of_task, spread in zip(found.tasks, weights, entropy, strict=True)
    ]
    of_memory = " and of the memory" if gate_statistics.MEMORY in choices else ""
    return element(
        "section",
        element("h2", "Gates"),
        element(
            "p",
            f"Mean weight of each expert{of_memory} when a task's feature is assembled, at each tap, over the pixels "
            "of the set: the stronger the colour, the larger the weight. Entropy is that of a pixel's weights, as a "
            "share of the largest possible: 0 where one of them takes all, 1 where all weigh the same.",
        ),
        element("div", *tables, class_="gates"),
        id="gates",
    )


def _gate_table(
    task: Task, choices: tuple[str, ...], weights: np.ndarray, entropy: np.ndarray, largest: float
) -> Element:
    """A row a tap: its weights, as a heat map whose strongest colour is `largest`, and their entropy."""
    experts = len(choices) - (gate_statistics.MEMORY in choices)
    above: list[Element] = [element("th", "tap", scope="col", rowspan=2)]
    above.append(element("th", "weight of expert", scope="colgroup", colspan=experts, class_="group"))
    above += [element("th", name, scope="col", rowspan=2) for name in (*choices[experts:], "entropy")]
    below = (element("th", str(k + 1), scope="col", class_="group") for k in range(experts))
    head = element("thead", element("tr", *above), element("tr", *below))
    lines = []
    for tap, (of_tap, spread) in enumerate(zip(weights.tolist(), entropy.tolist(), strict=True), start=1):
        cells = []
        for weight in of_tap:
            share = weight / largest
            kind = "weight strong" if share > 0.6 else "weight"
            cells.append(element("td", f"{weight:.2f}", class_=kind, style=f"--weight: {share:.3f}"))
        spread_text = "–" if math.isnan(spread) else f"{spread:.2f}"
        lines.append(element("tr", element("th", str(tap), scope="row"), *cells, element("td", spread_text)))
    body = element("tbody", *lines)
    return element("table", element("caption", sentence(task.title)), head, body)
