"""Charts as inline SVG; colours and fonts come from the page's style sheet."""

from collections.abc import Sequence

import numpy as np

from taskexpert_jax.report.markup import Element, element

_WIDTH, _HEIGHT = 460, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 40, 12, 48  # margins; the labels of the iso-F lines are in the right one
_F_LINES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def bar(share: float) -> Element:
    """A horizontal bar that fills a fraction of its cell; share: in [0, 1]."""
    return element(
        "svg",
        element("rect", class_="track", width=100, height=10),
        element("rect", class_="bar", width=round(100 * share, 2), height=10),
        class_="bar",
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        aria_hidden="true",  # the number is shown next to it
    )


def precision_recall(
    recall: Sequence[float], precision: Sequence[float], best: int, *, title: str, best_label: str
) -> Element:
    """Precision-recall curve with its best point marked, over iso-F lines.

    recall, precision: in [0, 1], in the order of the thresholds. best: index of the best threshold.
    """
    points = [(_x(r), _y(p)) for r, p in zip(recall, precision, strict=True)]
    # Where nothing exceeds the threshold, recall is 0 and precision undefined.
    shown = [point for point, r in zip(points, recall, strict=True) if r > 0]
    x, y = points[best]
    # The label stands on the side away from the curve, if there is room.
    left = recall[best] > 0.6
    return element(
        "svg",
        element("title", title),
        *_axes(),
        *(part for f in _F_LINES for part in _line_of_equal_f(f)),
        element("polyline", class_="curve", points=_path(shown)),
        element("circle", class_="best", cx=x, cy=y, r=5),
        element(
            "text",
            best_label,
            class_="best",
            x=x - 10 if left else x + 10,
            y=y - 12,
            text_anchor="end" if left else "start",
        ),
        class_="chart",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title}: {best_label}",
    )


def _x(recall: float) -> float:
    return round(_LEFT + recall * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(precision: float) -> float:
    return round(_HEIGHT - _BOTTOM - precision * (_HEIGHT - _TOP - _BOTTOM), 1)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _axes() -> list[Element]:
    parts = []
    for tick in np.linspace(0, 1, 6):
        x, y = _x(tick), _y(tick)
        parts.append(element("line", class_="grid", x1=_x(0), x2=_x(1), y1=y, y2=y))
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=_y(0), y2=_y(1)))
        parts.append(element("text", f"{tick:.1f}", x=_x(0) - 8, y=y + 4, text_anchor="end"))
        parts.append(element("text", f"{tick:.1f}", x=x, y=_y(0) + 18, text_anchor="middle"))
    parts.append(element("text", "recall", x=_x(0.5), y=_HEIGHT - 8, text_anchor="middle"))
    turned = f"rotate(-90 14 {_y(0.5):g})"
    parts.append(element("text", "precision", x=14, y=_y(0.5), text_anchor="middle", transform=turned))
    return parts


def _line_of_equal_f(f: float) -> list[Element]:
    """The iso-F line (harmonic mean of precision and recall equal to f), from precision 1 to recall 1."""
    # Logarithmic spacing, because the hyperbola has a pole at recall f / 2.
    recall = f / 2 + np.geomspace(f / (2 - f) - f / 2, 1 - f / 2, 40)
    precision = f * recall / (2 * recall - f)
    line = element(
        "polyline", class_="equal", points=_path([(_x(r), _y(p)) for r, p in zip(recall, precision, strict=True)])
    )
    name = f"F {f:.1f}" if f == _F_LINES[-1] else f"{f:.1f}"
    return [line, element("text", name, class_="equal", x=_x(1) + 5, y=_y(precision[-1]) + 4)]
