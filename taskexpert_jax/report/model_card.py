"""Model card of a released model: Markdown with the metadata that the Hugging Face hub reads."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

from ml_collections import ConfigDict

from taskexpert_jax.evaluation import results
from taskexpert_jax.tasks import from_config

_PAPER = "https://arxiv.org/abs/2307.15324"
_TAGS = ("taskexpert", "multi-task-learning", "dense-prediction", "jax", "flax")
# What the built-in data sets are, and what a model that was trained on one of them does not know.
_DATA = {
    "scenes": "procedurally rendered rooms, no photographs",
    "nyud": "NYUD-v2, photographs of rooms",
    "nyud13": "NYUv2 with 13 classes, photographs of rooms",
    "cityscapes": "Cityscapes, photographs of streets",
    "pascal_context": "PASCAL-Context, photographs from the web",
}
_LIMITS = {"scenes": "Trained on rendered scenes only, on no photograph: predictions for photographs are not usable."}
_CITATION = """\
```bibtex
@inproceedings{ye2023taskexpert,
  title     = {TaskExpert: Dynamically Assembling Multi-Task Representations with Memorial Mixture-of-Experts},
  author    = {Ye, Hanrong and Xu, Dan},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2023}
}
```"""


@dataclasses.dataclass(frozen=True)
class Card:
    """Content of a model card.

    Attributes:
      name: name of the model.
      where: folder or address that commands and code load it from.
      config: the run's config, without paths of the machine.
      step: training step of the parameters.
      which: the checkpoint: best, latest or a step.
      parameters: number of parameters.
      size: bytes of the arrays.
      evaluation: content of metrics.json of an evaluation of these parameters; None: not evaluated.
      reason: why it is not evaluated.
      license: identifier of the licence; "unknown": not stated.
      note: further text, Markdown.
    """

    name: str
    where: str
    config: ConfigDict
    step: int
    which: str
    parameters: int
    size: int
    evaluation: Mapping[str, Any] | None
    reason: str
    license: str
    note: str = ""


def text(card: Card) -> str:
    """The model card as Markdown, with YAML front matter."""
    tasks = from_config(card.config)
    titles = [task.title for task in tasks]
    several = f"{', '.join(titles[:-1])} and {titles[-1]}" if len(titles) > 1 else titles[0]
    sections = [
        f"# {_cell(card.name)}",
        f"One forward pass predicts {several} from an RGB image. The model is a [TaskExpert]({_PAPER}) "
        f"`{_cell(card.config.variant)}` with {card.parameters / 1e6:.1f} M parameters, trained with TaskExpert-JAX.",
        *([card.note.strip()] if card.note.strip() else []),
        "## Tasks\n\n" + _tasks(card),
        "## Results\n\n" + _results(card),
        "## Use\n\n" + _use(card),
        "## Data\n\n" + _data(card),
        "## Training\n\n" + _training(card),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(card)),
        "## Licence\n\n" + _licence(card),
        "## Citation\n\nTaskExpert-JAX is an independent implementation of:\n\n" + _CITATION,
    ]
    return f"{_front_matter(card)}\n" + "\n\n".join(sections) + "\n"


def _front_matter(card: Card) -> str:
    """The YAML block; text in it is quoted as JSON, which is YAML too."""
    tasks = from_config(card.config)
    tags = [*_TAGS, *(task.title.replace(" ", "-") for task in tasks)]
    lines = ["library_name: taskexpert-jax", f"license: {_quoted(card.license)}"]
    if any(task.class_names for task in tasks):
        lines.append("pipeline_tag: image-segmentation")
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    if metrics := list(_metrics(card)):
        data = card.config.dataset.name
        lines += ["model-index:", f"- name: {_quoted(card.name)}", "  results:"]
        lines += ["  - task:", "      type: image-segmentation", "    dataset:"]
        lines += [f"      type: {_quoted(data)}", f"      name: {_quoted(data)}", "    metrics:", *metrics]
    return "\n".join(["---", *lines, "---", ""])


def _metrics(card: Card) -> Iterator[str]:
    for row in _rows(card):
        if row.published and math.isfinite(row.value):
            yield f"    - type: {_quoted(f'{row.task.name}/{row.metric}')}"
            yield f"      name: {_quoted(f'{row.task.title}: {row.published.title}')}"
            yield f"      value: {row.value:.6g}"


def _rows(card: Card) -> list[results.Row]:
    """Rows of the table of results; none without an evaluation."""
    if card.evaluation is None:
        return []
    metrics, constants = (
        {name: math.nan if value is None else float(value) for name, value in card.evaluation[key].items()}
        for key in ("metrics", "best_constant")
    )
    return results.rows(from_config(card.config), metrics, constants)


def _tasks(card: Card) -> str:
    rows = []
    for task in from_config(card.config):
        classes = f"; {len(task.class_names)} classes: {', '.join(task.class_names)}" if task.class_names else ""
        rows.append((f"`{task.name}`", task.title, f"{task.kind.array_form}{classes}"))
    return _table(("key", "task", "array"), rows)


def _results(card: Card) -> str:
    if card.evaluation is None:
        return f"Not evaluated: {card.reason}."
    of, settings = card.evaluation["dataset"], card.evaluation["eval"]
    views = "several views averaged" if settings.get("flip") or settings.get("scales", [1.0]) != [1.0] else "one view"
    rows = []
    for row in _rows(card):
        mark = f" {row.published.arrow}" if row.published else ""
        name = f"**{row.published.title}{mark}**" if row.published else row.metric
        constant = "-" if row.constant is None or math.isnan(row.constant) else f"{row.constant:.4g}"
        rows.append((row.task.title, name, f"{row.value:.4g}", constant))
    return (
        f"{card.evaluation['examples']} examples of the split `{_cell(of['split'])}` of `{_cell(of['name'])}` "
        f"(fingerprint `{_cell(of['fingerprint'])}`), {views}; evaluated at step {card.step}, "
        f"{card.evaluation['date'][:10]}. Published metrics are bold. The best constant is the best prediction that is "
        "the same at every pixel.\n\n" + _table(("task", "metric", "model", "best constant"), rows)
    )


def _use(card: Card) -> str:
    task = from_config(card.config)[0].name
    evaluate = f"--model={card.where}"
    if "data_dir" in card.config.dataset:
        evaluate += " --config.dataset.data_dir=DATA"
    return (
        f"```python\nimport taskexpert_jax\n\nrun = taskexpert_jax.load_run({_quoted(card.where)})\n"
        f'prediction = run.predict("image.jpg")          # arrays by task, at the size of the image\n'
        f'prediction[{_quoted(task)}]\nrun.draw(prediction, "image.jpg")["montage"].save("montage.png")\n```\n\n'
        f"```sh\ntaskexpert predict --model={card.where} --images=FILE_OR_FOLDER\ntaskexpert evaluate {evaluate}\n"
        "sha256sum --check SHA256SUMS      # in the folder\n```\n\n"
        "`--config.model.pretrained` of a training takes it too: the backbone starts from this model's."
    )


def _data(card: Card) -> str:
    of = card.config.dataset
    rows = [
        ("data set", f"`{of.name}`{f': {_DATA[of.name]}' if of.name in _DATA else ''}"),
        ("trained on", f"split `{of.train_split}`"),
        ("fingerprint", f"`{of.fingerprint}`" if of.fingerprint else "not recorded"),
        ("image size", f"{of.image_size[0]}x{of.image_size[1]} pixels"),
    ]
    if of.downscale != 1:
        rows.append(("images reduced to", f"{of.downscale:g} of their size"))
    return _table(("", ""), rows)


def _training(card: Card) -> str:
    config, optimizer = card.config, card.config.optimizer
    weights = ", ".join(f"{name} {config.loss_weights[name]:g}" for name in config.tasks)
    averaged = f"; moving average of the parameters with decay {optimizer.ema_decay:g}" if optimizer.ema_decay else ""
    rows = [
        ("parameters of", f"step {card.step} of {config.num_steps} ({card.which}){averaged}"),
        ("batch size", str(config.batch_size)),
        (
            "optimiser",
            f"{optimizer.algorithm}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule} decay, "
            f"{optimizer.warmup_steps} warm-up steps, weight decay {optimizer.weight_decay:g}",
        ),
        ("backbone", f"starts from `{config.model.pretrained}`" if config.model.pretrained else "starts from random"),
        ("loss weights", weights),
        ("computed in", config.dtype),
        ("seed", str(config.seed)),
    ]
    return (
        "`config.json` has every setting; paths of the training machine are left out.\n\n"
        + _table(("", ""), rows)
        + f"\n\n`model.safetensors` has the parameters and batch statistics in float32 ({card.size / 2**20:.1f} MiB), "
        "without the state of the optimiser."
    )


def _limits(card: Card) -> Iterator[str]:
    of = card.config.dataset
    size = f"{of.image_size[0]}x{of.image_size[1]}"
    if of.name in _LIMITS:
        yield _LIMITS[of.name]
    else:
        yield f"Trained on `{_cell(of.name)}` only: other places, cameras and kinds of images are predicted less well."
    yield f"Larger images are reduced to {size} pixels unless `image_size` asks for sliding windows."
    yield "Wrong predictions do not show themselves: do not rely on them where an error does harm."


def _licence(card: Card) -> str:
    if card.license == "unknown":
        return "Not stated by those who released the model: ask them before you use it."
    return f"`{card.license}`, as stated by those who released the model."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(of: str) -> str:
    """Text for a cell or a line: names of others may hold signs of Markdown tables or HTML."""
    return of.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _quoted(of: str) -> str:
    return json.dumps(of, ensure_ascii=False)
