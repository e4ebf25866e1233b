"""HTML table of mean gate weights: one row per task and tap, one column per expert slot."""

from collections.abc import Sequence

import numpy as np

from taskexpert_jax.evaluation.gate_findings import variation
from taskexpert_jax.evaluation.gate_statistics import GateSummary
from taskexpert_jax.models.decoders.decoder import MEMORY
from taskexpert_jax.report import gate_maps, page
from taskexpert_jax.report.markup import Element, element, sentence
from taskexpert_jax.tasks import Task


def content(gates: GateSummary, tasks: Sequence[Task]) -> list[Element]:
    """The table, with an explanation above and its colour scale below."""
    explanation = element(
        "p",
        "Mean gate weight of each expert slot (an expert or the memory) at each tap, over the pixels of all images, "
        "without padding. Entropy is averaged over pixels and divided by its maximum: 0 if one slot has all the "
        "weight, 1 if all slots have equal weight. Variation measures how much the weights differ between pixels "
        "(Jensen-Shannon divergence, divided by the same maximum): 0 if they are the same at every pixel.",
    )
    return [explanation, page.scrolling(_table(gates, tasks)), scale()]


def scale() -> Element:
    """Colour scale of the weights from 0 to 1."""
    stops = ", ".join(gate_maps.hexadecimal(colour) for colour in gate_maps.weight_colours()[::15])
    ticks = (element("span", text) for text in ("weight 0", "0.5", "1"))
    return element(
        "div",
        element("div", class_="bar", style=f"background: linear-gradient(to right, {stops})"),
        element("div", *ticks, class_="ticks"),
        class_="scale",
    )


def _table(gates: GateSummary, tasks: Sequence[Task]) -> Element:
    slots, weights, entropy = gates
    spread = variation(gates)
    even = 1 / len(slots)
    bodies = []
    for task, of_task, of_entropy, of_spread in zip(tasks, weights, entropy, spread, strict=True):
        lines = [element("tr", element("th", sentence(task.title), scope="rowgroup", colspan=len(slots) + 3))]
        for tap, of_tap in enumerate(of_task):
            cells = [
                _weight_cell(weight, f"{task.title}, tap {tap + 1}, {name}: {weight:.4f}; even weights: {even:.4f}")
                for name, weight in zip(slots, of_tap.tolist(), strict=True)
            ]
            numbers = [element("td", page.number(value, ".2f")) for value in (of_entropy[tap], of_spread[tap])]
            lines.append(element("tr", element("th", str(tap + 1), scope="row"), *cells, *numbers))
        bodies.append(element("tbody", *lines))
    return element("table", _head(slots), *bodies, class_="means")


def _head(slots: Sequence[str]) -> Element:
    """Two header rows; the experts' numbers are grouped below one title."""
    experts = len(slots) - (MEMORY in slots)
    above: list[Element] = [element("th", "tap", scope="col", rowspan=2)]
    above.append(element("th", "weight of expert", scope="colgroup", colspan=experts, class_="group"))
    above += [element("th", name, scope="col", rowspan=2) for name in (*slots[experts:], "entropy", "variation")]
    below = (element("th", str(k + 1), scope="col", class_="group") for k in range(experts))
    return element("thead", element("tr", *above), element("tr", *below))


def _weight_cell(weight: float, tooltip: str) -> Element:
    colour = gate_maps.weight_colours()[gate_maps.steps(np.array(weight))]
    style = f"background: {gate_maps.hexadecimal(colour)}; color: {gate_maps.ink_on(colour)}"
    return element("td", page.number(weight, ".2f"), class_="weight", style=style, title=tooltip)
