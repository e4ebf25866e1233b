"""The table of a set's mean gate weights, for pages: a row a tap of a task, a column an expert slot or the memory."""

from collections.abc import Sequence

import numpy as np

from taskexpert_jax.evaluation.gate_findings import variation
from taskexpert_jax.evaluation.gate_statistics import GateSummary
from taskexpert_jax.models.decoders.taskexpert import MEMORY
from taskexpert_jax.report import gate_maps, page
from taskexpert_jax.report.markup import Element, element, sentence
from taskexpert_jax.tasks import Task


def content(gates: GateSummary, tasks: Sequence[Task]) -> list[Element]:
    """The table with its explanation above and the scale of its colours below."""
    explanation = element(
        "p",
        "Mean weight of each choice (an expert, or the memory) when a task's feature is assembled, at each tap, over "
        "the pixels of all images (padding left out). Entropy is the mean of a pixel's, as a share of the largest "
        "possible: 0 where one choice takes all, 1 where all weigh the same. Variation is how much the weights differ "
        "between pixels (Jensen-Shannon divergence, as a share of the same): 0 where every pixel has the same.",
    )
    return [explanation, page.scrolling(_table(gates, tasks)), scale()]


def scale() -> Element:
    """The colours of the weights from 0 to 1."""
    stops = ", ".join(gate_maps.hexadecimal(colour) for colour in gate_maps.weight_colours()[::15])
    ticks = (element("span", text) for text in ("weight 0", "0.5", "1"))
    return element(
        "div",
        element("div", class_="bar", style=f"background: linear-gradient(to right, {stops})"),
        element("div", *ticks, class_="ticks"),
        class_="scale",
    )


def _table(gates: GateSummary, tasks: Sequence[Task]) -> Element:
    choices, weights, entropy = gates
    spread = variation(gates)
    even = 1 / len(choices)
    bodies = []
    for task, of_task, of_entropy, of_spread in zip(tasks, weights, entropy, spread, strict=True):
        lines = [element("tr", element("th", sentence(task.title), scope="rowgroup", colspan=len(choices) + 3))]
        for tap, of_tap in enumerate(of_task):
            cells = [
                _weight_cell(weight, f"{task.title}, tap {tap + 1}, {name}: {weight:.4f}; even weights: {even:.4f}")
                for name, weight in zip(choices, of_tap.tolist(), strict=True)
            ]
            numbers = [element("td", page.number(value, ".2f")) for value in (of_entropy[tap], of_spread[tap])]
            lines.append(element("tr", element("th", str(tap + 1), scope="row"), *cells, *numbers))
        bodies.append(element("tbody", *lines))
    return element("table", _head(choices), *bodies, class_="means")


def _head(choices: Sequence[str]) -> Element:
    """Two rows: the experts' numbers stand below a title of their own."""
    experts = len(choices) - (MEMORY in choices)
    above: list[Element] = [element("th", "tap", scope="col", rowspan=2)]
    above.append(element("th", "weight of expert", scope="colgroup", colspan=experts, class_="group"))
    above += [element("th", name, scope="col", rowspan=2) for name in (*choices[experts:], "entropy", "variation")]
    below = (element("th", str(k + 1), scope="col", class_="group") for k in range(experts))
    return element("thead", element("tr", *above), element("tr", *below))


def _weight_cell(weight: float, tooltip: str) -> Element:
    colour = gate_maps.weight_colours()[gate_maps.steps(np.array(weight))]
    style = f"background: {gate_maps.hexadecimal(colour)}; color: {gate_maps.ink_on(colour)}"
    return element("td", f"{weight:.2f}", class_="weight", style=style, title=tooltip)
