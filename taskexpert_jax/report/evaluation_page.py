"""HTML page of an evaluation: metrics, IoU per class, boundary curves, worst and best examples, mean gate weights."""

import numpy as np

from taskexpert_jax.evaluation import results
from taskexpert_jax.evaluation.extremes import Entry
from taskexpert_jax.evaluation.results import ClassScore, Evaluation
from taskexpert_jax.report import charts, page
from taskexpert_jax.report.markup import Element, element, sentence
from taskexpert_jax.tasks import Task, panels
from taskexpert_jax.tasks.metrics.boundary.scores import THRESHOLDS, BoundaryCounts, curve


def html(found: Evaluation) -> str:
    """The page as HTML."""
    facts = found.facts
    title = f"Evaluation of {facts['variant']} on {facts['dataset']['name']}"
    sections = [_metrics(found), *(_task(found, task) for task in found.tasks), _gates(found)]
    return page.html(title, [_facts(found), _overview(found)], sections, facts, style="evaluation_page.css")


def _facts(found: Evaluation) -> Element:
    facts = found.facts
    dataset = facts["dataset"]
    entries = {
        "examples": f"{facts['examples']} of split {dataset['split']}",
        "evaluated": f"{page.date(facts)}, {facts['seconds']:g} s",
        "devices": facts["devices"],
        "data": dataset["fingerprint"][:16] or "no fingerprint",
    }
    return page.facts_list(facts, entries)


def _number(value: float | None) -> str:
    return page.number(value, ".4g")


def _overview(found: Evaluation) -> Element:
    """The published metrics, each linked to its task's section."""
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
    explanation = element(
        "p",
        "The published metric of each task is marked: ↑ higher is better, ↓ lower is better. “Best constant” is the "
        "score of the constant prediction that is best by that metric, a baseline that any model should beat in it.",
    )
    return page.section("metrics", "All metrics", explanation, page.scrolling(table))


def _task(found: Evaluation, task: Task) -> Element:
    published = task.published(found.metrics)
    name = f"{task.name}/{published.metric}"
    direction = "higher is better" if published.higher_is_better else "lower is better"
    constant = found.best_constant.get(name)
    compared = "" if constant is None else f"; best constant prediction: {_number(constant)}"
    value = element("strong", f"{published.title} {_number(found.metrics[name])}")
    parts = [element("p", value, f", {direction}{compared}.")]
    if task.name in found.nonfinite:
        parts.append(element("p", f"{found.nonfinite[task.name].sentence()}: no metric of the task is a number."))
    if task.name in found.per_class:
        parts += _classes(task, found.per_class[task.name])
    if task.name in found.boundaries:
        parts += _curve(found.boundaries[task.name])
    return page.section(task.name, sentence(task.title), *parts, *_extremes(found, task))


def _classes(task: Task, scores: tuple[ClassScore, ...]) -> list[Element]:
    colours = panels.colour(task, np.arange(len(scores), dtype=np.uint8)[None])[0]
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
    note = " “None”: absent from the ground truth; counts as 0." if any(score.labelled == 0 for score in scores) else ""
    return [
        element("h3", "IoU per class"),
        element("p", "In percent, pooled over all images." + note, class_="faint"),
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
        element("p", "Over all thresholds, pooled over all images; F is constant along a dotted line.", class_="faint"),
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
    classes = ", over the classes in it" if task.class_names else ""
    note = f"Ranked by the {ranked.score.title} of each image{classes}. {task.kind.caption}"
    return [element("div", *sides, class_="ends"), element("p", note, class_="faint")]


def _example(task: Task, entry: Entry, score: str) -> Element:
    sharp = None if task.kind.jpeg else "pixelated"
    shown = zip(entry.pictures, ("image", "prediction", "ground truth"), (None, sharp, sharp), strict=True)
    images = (element("img", src=uri, alt=f"{name} of {entry.example_id}", class_=kind) for uri, name, kind in shown)
    caption = element("figcaption", f"{entry.example_id}: {score} {_number(entry.score)}")
    return element("figure", element("div", *images, class_="three"), caption)


def _gates(found: Evaluation) -> Element:
    if found.gates is None:
        text = "Not collected, because predictions are averaged over several views of each image."
        return page.section("gates", "Gates", element("p", text))
    from taskexpert_jax.report import gate_table  # matplotlib is slow to import, and training does not need it

    return page.section("gates", "Gates", *gate_table.content(found.gates, found.tasks))
