"""HTML page of a gate inspection: mean weights, how to read the maps, and the maps of each image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from taskexpert_jax.evaluation import gate_findings
from taskexpert_jax.evaluation.gate_findings import Inspection
from taskexpert_jax.evaluation.gate_statistics import GateSummary
from taskexpert_jax.images import data_uri
from taskexpert_jax.models.decoders.decoder import MEMORY
from taskexpert_jax.report import gate_maps, gate_table, page
from taskexpert_jax.report.markup import Element, element, sentence
from taskexpert_jax.tasks import Task

MOST_IMAGES = 24  # images on the page; each takes up to 0.8 MB (measured with noise at 425x560, four tasks)

_READING = (
    (
        "Nearly uniform",
        "entropy near 1, and all maps have the same uniform colour: the gates do not select, and the decoder is close "
        "to the plain mean of the experts. The map of the largest weights still shows a winner, by a small margin: "
        "check the weights too.",
    ),
    (
        "Static",
        "variation near 0 while entropy is below 1, and each map has one flat colour: the task prefers some expert "
        "slots, independently of the image. A fixed mixture would do the same.",
    ),
    (
        "Dynamic",
        "variation clearly above 0, and maps follow regions or borders of the image: the gates depend on location. "
        "To find out whether that improves the predictions, compare with a run with static gates.",
    ),
    (
        "Collapsed",
        "one expert slot near 1 everywhere: the others are not used at this tap and receive little gradient.",
    ),
    (
        "Dominated by the memory",
        "the memory's map is the brightest: the task feature comes mostly from the memory and little from the experts "
        "of this tap. If the memory has all the weight at the last tap, the prediction does not use that tap's "
        "experts. At the first tap the memory is still the same for every image.",
    ),
)


def html(found: Inspection, sections: Sequence[Element], folder: str) -> str:
    """The page as HTML.

    Args:
      found: the inspection.
      sections: sections of the images that are shown, see `image_section`.
      folder: folder with the maps of all images, relative to the page.
    """
    facts = found.facts
    title = f"Inside {facts['variant']}, trained on {facts['dataset']['name']}"
    hidden = len(found.images) - len(sections)
    note = (
        f"{hidden} of {len(found.images)} images are not shown here; their maps are in {folder}/." if hidden else None
    )
    header = [_facts(found), _warnings(found), _links(found, len(sections))]
    means = page.section("means", "Mean weights", *gate_table.content(found.gates, found.tasks))
    main = [means, _reading(), *sections, element("p", note, class_="faint") if note else None]
    return page.html(title, header, main, facts, style="gates_page.css")


def _facts(found: Inspection) -> Element:
    facts, model = found.facts, found.facts["model"]
    gate, memory = model["gate"], model["memory"]
    extra = [f"top {gate['top_k']}"] if gate["top_k"] else []
    if gate.get("temperature", 1.0) != 1.0:
        extra.append(f"temperature {gate['temperature']:g}")
    sees = [] if found.granularity in ("static", "uniform") else [f"input {gate['input']}"]
    read = "not read" if memory["read"] == "none" else f"read {memory['read']}"
    entries = {
        "images": str(facts["examples"]),
        "gates": ", ".join([f"granularity {found.granularity}", *sees, *extra]),
        "experts": f"{model['experts']}, at {model['taps']} taps",
        "memory": f"{read}, write {memory['write']}, init {memory['init']}",
        "inspected": page.date(facts),
    }
    return page.facts_list(facts, entries)


def _warnings(found: Inspection) -> Element:
    notes = [text for text in (gate_findings.by_design(found),) if text]
    alarms = [f"Warning: {text}." for text in gate_findings.warnings(found)]
    quiet = "No warning: no gate is nearly uniform, collapsed or constant over pixels, and every expert slot is used."
    texts = notes + alarms or [quiet]
    return element("ul", *(element("li", text) for text in texts), class_="findings")


def _links(found: Inspection, shown: int) -> Element:
    links: list[Element | str] = [element("a", "mean weights", href="#means"), " · "]
    links.append(element("a", "how to read the maps", href="#reading"))
    for number, name in enumerate(list(found.images)[:shown], start=1):
        links += [" · ", element("a", name, href=f"#image-{number}")]
    return element("nav", element("p", *links), aria_label="sections")


def _reading() -> Element:
    entries = []
    for name, text in _READING:
        entries += [element("dt", name), element("dd", text)]
    explanation = element(
        "p",
        "A map shows the weight of one expert slot at every token of the image, from 0 (dark) to 1 (bright) on all "
        "maps. At each token the weights of all slots sum to 1. Each tap has its own experts: expert 1 of one tap is "
        "unrelated to expert 1 of another.",
    )
    return page.section("reading", "How to read the maps", explanation, element("dl", *entries, class_="reading"))


def image_section(
    number: int,
    name: str,
    image: np.ndarray,
    predictions: dict[str, np.ndarray],
    weights: np.ndarray,
    gates: GateSummary,
    tasks: Sequence[Task],
) -> Element:
    """Section of the page for one image.

    Args:
      number: index of the image, from 1.
      name: name of the image's folder.
      image: the model's input without padding, (h, w, 3) uint8.
      predictions: coloured predictions by task, (h, w, 3) uint8.
      weights: (S, T, h, w, slots) float32, at the image's pixels.
      gates: mean weights over the image.
      tasks: the tasks.
    """
    maps = [[[_map_uri(of[..., k]) for k in range(of.shape[-1])] for of in weights[:, t]] for t in range(len(tasks))]
    details = [_task_details(task, maps[t], gates, t, name) for t, task in enumerate(tasks)]
    if MEMORY in gates.slots:
        details.insert(0, _memory_details(tasks, maps, gates, name))
    text = "Below: the expert slot with the largest weight at each token. Caption: the slot that wins most pixels."
    shown = element("img", src=_photo_uri(image), alt=f"the image {name}", class_="picture")
    intro = element("div", shown, element("div", element("p", text), _key(gates.slots)), class_="intro")
    winners = _winners(tasks, predictions, weights, gates.slots, name)
    section = page.section(f"image-{number}", name, intro, winners, *details)
    section.set("style", f"--ratio: {image.shape[1] / image.shape[0]:.3f}")
    return section


def _key(slots: Sequence[str]) -> Element:
    """Legend: the colour of each expert slot."""
    colours = gate_maps.choice_colours(slots)
    entries = []
    for slot, colour in zip(slots, colours, strict=True):
        swatch = element("span", class_="swatch", style=f"background: {gate_maps.hexadecimal(colour)}")
        entries.append(element("li", swatch, slot))
    return element("ul", *entries, class_="key")


def _winners(
    tasks: Sequence[Task],
    predictions: dict[str, np.ndarray],
    weights: np.ndarray,
    slots: Sequence[str],
    name: str,
) -> Element:
    """One row per task: its prediction, and for each tap the map of the expert slots with the largest weight."""
    colours = gate_maps.choice_colours(slots)
    heads = ["prediction", *(f"tap {tap + 1}" for tap in range(len(weights)))]
    bodies = []
    for t, task in enumerate(tasks):
        sharp = None if task.kind.jpeg else "pixelated"
        cells = [_image_cell(_prediction_uri(task, predictions[task.name]), f"{task.title} of {name}", "", sharp)]
        for tap in range(len(weights)):
            winners = weights[tap, t].argmax(axis=-1)
            shares = np.bincount(winners.ravel(), minlength=len(slots)) / winners.size
            first = int(shares.argmax())
            parts = (f"{of} {share:.0%}" for of, share in zip(slots, shares.tolist(), strict=True) if share >= 0.005)
            tooltip = f"{task.title}, tap {tap + 1}, largest weight: {', '.join(parts)} of the pixels"
            uri = _png_uri(winners.astype(np.uint8), colours)
            cells.append(_image_cell(uri, tooltip, f"{slots[first]} {shares[first]:.0%}"))
        bodies.append(_task_rows(task, cells))
    return _table(heads, bodies)


def _task_rows(task: Task, cells: Sequence[Element]) -> Element:
    """A task's name, and its images in the row below: next to them it would leave too little width on a phone."""
    name = element("th", sentence(task.title), scope="rowgroup", colspan=len(cells))
    return element("tbody", element("tr", name), element("tr", *cells))


def _memory_details(
    tasks: Sequence[Task], maps: Sequence[Sequence[Sequence[str]]], gates: GateSummary, name: str
) -> Element:
    """Maps of the memory's weight: one row per task, one column per tap."""
    taps = gates.weights.shape[1]
    bodies = []
    for t, task in enumerate(tasks):
        cells = [_map_cell(maps[t][s][-1], task, s, MEMORY, gates.weights[t, s, -1], name) for s in range(taps)]
        bodies.append(_task_rows(task, cells))
    return _details("Weight of the memory, all tasks", _table([f"tap {tap + 1}" for tap in range(taps)], bodies))


def _task_details(task: Task, maps: Sequence[Sequence[str]], gates: GateSummary, index: int, name: str) -> Element:
    """Maps of one task: one row per tap, one column per expert slot."""
    rows = []
    for tap, of_tap in enumerate(maps):
        means = gates.weights[index, tap].tolist()
        shown = zip(of_tap, gates.slots, means, strict=True)
        cells = (_map_cell(uri, task, tap, slot, mean, name) for uri, slot, mean in shown)
        rows.append(element("tr", element("th", str(tap + 1), scope="row"), *cells))
    table = _table(["tap", *gates.slots], [element("tbody", *rows)])
    return _details(f"{sentence(task.title)}: all weights", table)


def _details(summary: str, table: Element) -> Element:
    return element("details", element("summary", summary), table, gate_table.scale())


def _table(heads: Sequence[str], bodies: Sequence[Element]) -> Element:
    """A table of images in columns of equal width, except for a column of tap numbers."""
    head = element("tr", *(element("th", name, scope="col", class_="tap" if name == "tap" else None) for name in heads))
    style = f"--columns: {len(heads)}"
    table = element("table", element("thead", head), *bodies, class_="maps", style=style)
    return page.scrolling(table)


def _map_cell(uri: str, task: Task, tap: int, slot: str, mean: float, name: str) -> Element:
    text = f"{task.title}, tap {tap + 1}, {slot}: mean weight {mean:.4f} over {name}"
    return _image_cell(uri, text, f"{mean:.2f}")


def _image_cell(uri: str, text: str, caption: str, kind: str | None = "map") -> Element:
    image = element("img", src=uri, alt=text, title=text, class_=kind)
    return element("td", image, element("span", caption, class_="faint") if caption else None)


def _map_uri(weights: np.ndarray) -> str:
    return _png_uri(gate_maps.steps(weights), gate_maps.weight_colours())


def _png_uri(indices: np.ndarray, colours: np.ndarray) -> str:
    """A palette PNG: indices (h, w) uint8 into the colours."""
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    return data_uri(image, lossless=True)


def _photo_uri(rgb: np.ndarray) -> str:
    return data_uri(Image.fromarray(rgb), lossless=False)


def _prediction_uri(task: Task, rgb: np.ndarray) -> str:
    """A coloured prediction; lossless if its colours are classes, which JPEG would mix."""
    return data_uri(Image.fromarray(rgb), lossless=not task.kind.jpeg)
