"""MkDocs hooks: pages from files outside docs/, reference pages, and links that work on the site and in the repository.

Reference pages exist on the site alone. Links that lead out of docs/ go to the repository if mkdocs.yml knows its
address, and are plain text otherwise.
"""

from collections.abc import Iterator, Mapping
import html
import json
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from taskexpert_jax.config import (
    BACKBONES,
    DATA_SETS,
    DECODERS,
    FIELDS,
    LOSS_WEIGHT,
    REQUIRED,
    VARIANTS,
    Field,
    base,
    flat,
)
from taskexpert_jax.config.balancing_fields import METHODS

ROOT = pathlib.Path(__file__).resolve().parent.parent

# File of the repository -> page of the site.
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

# File that a page links to -> page of the site that shows it.
SHOWN = {
    **ELSEWHERE,
    "docs/quickstart.ipynb": "quickstart.md",
    "taskexpert_jax/config/fields.py": "reference/config.md",
    "taskexpert_jax/tasks/task.py": "reference/tasks.md",
}

# Page -> title, introduction, and heading -> module of taskexpert_jax whose docstrings stand there, and which of its
# members, if not all. A single module needs no heading.
REFERENCE: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "api": (
        "Python API",
        "Everything here is a name of `taskexpert_jax`, as are the modules `tasks`, `losses` and `metrics`, and\n"
        "`__version__`. [The guide](../python.md).",
        {
            "Runs": "run [load_run, Run, Prediction, Gates]",
            "Models": "models.build [build_model]",
            "Boundary benchmark": "tasks.metrics.boundary.benchmark [odsf]",
            "Errors": "errors [UserError]",
        },
    ),
    "tasks": (
        "Tasks",
        "A task is one record, and all that the rest of the code knows of it: [how to add one](../add_a_task.md).",
        {"Records": "tasks.task", "Kinds of value": "tasks.kinds.kind"},
    ),
    "losses": ("Losses", "", {"": "tasks.losses"}),
    "metrics": (
        "Metrics",
        "Definitions, protocols and sources: [metrics](../metrics.md).",
        {
            "Interface": "tasks.metrics []",
            "Semantic segmentation, human parts": "tasks.metrics.segmentation",
            "Depth": "tasks.metrics.depth",
            "Surface normals": "tasks.metrics.normals",
            "Saliency": "tasks.metrics.saliency",
            "Boundary loss": "tasks.metrics.edge",
            "Boundaries: counts": "tasks.metrics.boundary.counts [image_counts, level_counts, true_boundary]",
            "Boundaries: odsF": "tasks.metrics.boundary.scores",
        },
    ),
    "model": (
        "Model",
        "Figures and equations: [the model](../model.md); dims: [conventions](../conventions.md).",
        {
            "The model": "models.model",
            "Interface of a backbone": "models.backbones.backbone",
            "ViT": "models.backbones.vit",
            "Swin": "models.backbones.swin",
            "Neck of a pyramid": "models.neck",
            "Interface of a decoder": "models.decoders.decoder",
            "TaskExpert": "models.decoders.taskexpert",
            "Experts, gates, memory": "models.decoders.mixture",
            "Baseline": "models.decoders.baseline",
            "Heads": "models.heads",
        },
    ),
}

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```(\w+) (\S+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    pages = {page: (ROOT / name).read_text() for name, page in ELSEWHERE.items()}
    pages |= {f"reference/{name}.md": _reference(*about) for name, about in REFERENCE.items()}
    pages["quickstart.md"] = "\n".join(_notebook(ROOT / "docs" / "quickstart.ipynb"))
    pages["reference/config.md"] = "\n".join(_config_page())
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links between the repository's files, and the file names of code blocks."""
    source = {site: name for name, site in ELSEWHERE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = SHOWN.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if inside and (file := files.get_file_from_path(inside)):
            if text.endswith(".md"):  # a reader of the site knows pages by their titles
                text = file.content_string.partition("\n")[0].removeprefix("# ")
            start = posixpath.dirname(page.file.src_uri)
            return f"{image}[{text}]({posixpath.relpath(inside, start or '.')}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # MkDocs reports it
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path}{anchor})" if config.repo_url else text

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # text and code blocks by turns
    parts[::2] = [LINK.sub(link, text) for text in parts[::2]]
    return FENCE.sub(_fence, "".join(parts))


def _fence(match: re.Match[str]) -> str:
    """The first line of a code block, whose info string names a file."""
    return f"```{match[1]}" if match[2] == "run" else f'```{match[1]} title="{match[2]}"'


def _notebook(path: pathlib.Path) -> Iterator[str]:
    """A notebook's text, code and outputs: printed lines and images."""
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield f"{source}\n"
            continue
        yield f"```python\n{source}\n```\n"
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                yield f'<img alt="output" src="data:image/png;base64,{data["image/png"].strip()}">\n'
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                yield f'<pre class="output"><code>{html.escape(text)}</code></pre>\n'


def _reference(title: str, introduction: str, modules: Mapping[str, str]) -> str:
    """A page that mkdocstrings fills."""
    parts = [f"# {title}", introduction]
    for heading, shown in modules.items():
        module, _, members = shown.partition(" ")
        options = "show_root_heading: false, show_root_toc_entry: false" + (f", members: {members}" if members else "")
        parts += [f"## {heading}"] if heading else []
        parts.append(f"::: taskexpert_jax.{module}\n    options: {{{options}}}")
    return "\n\n".join(parts)


def _config_page() -> Iterator[str]:
    """Tables of all config fields and of the variants' sizes."""
    yield from (
        "# Config fields",
        "",
        "A config is a variant and a data set with these defaults, changed by a file in `configs/` and by",
        "`--config.FIELD=VALUE` on the command line. Values out of range and fields that contradict each other are",
        "refused before anything is written. `-`: no default, the variant or the config file sets it.",
        "",
        '<div class="fields" markdown>',
    )
    further = {
        "model.backbone": BACKBONES,
        "model.decoder": DECODERS,
        "balancing": METHODS,
        "dataset.name": DATA_SETS,
    }
    special = {name for known in further.values() for fields in known.values() for name in fields}
    groups: dict[str, dict[str, Field]] = {"Run": {}}
    for name, field in ((name, field) for name, field in FIELDS.items() if name not in special):
        group = name.partition(".")[0] if "." in name else "Run"
        groups.setdefault(group, {})[name] = field
    groups["Run"]["loss_weights.TASK"] = LOSS_WEIGHT
    for group, fields in groups.items():
        yield from ("", f"## {group}", "", *_field_table(fields))
    for choice, known in further.items():
        for value, fields in known.items():
            if fields:
                yield from ("", f"## {choice} = {value}", "", *_field_table(fields))
    yield from ("", "## Variants", "", *_variant_table(), "", "</div>")


def _field_table(fields: Mapping[str, Field]) -> Iterator[str]:
    yield from ("| field | default | value | meaning |", "|---|---|---|---|")
    for name, field in fields.items():
        default = "-" if field.default is REQUIRED else f"`{_plain(field.default)}`"
        meaning = field.meaning.removeprefix(f"{name}: ")
        yield f"| `{name}` | {default} | {_cell(_range(field.rule.words))} | {_cell(meaning)} |"


def _range(words: str) -> str:
    """The allowed values, by the words of the error message."""
    words = re.sub(r"^(must be|must|give) |, below 2\*\*31$", "", words)
    return re.sub(r"in \[(.*), 1e\+30\]$", r"of \1 or more", words)


def _variant_table() -> Iterator[str]:
    """Fields in which the variants differ."""
    configs = {name: dict(flat(base(name, "nyud"))) for name in VARIANTS}
    first, *others = configs.values()
    every = dict.fromkeys(name for config in configs.values() for name in config)
    names = [n for n in every if n != "variant" and any(other.get(n) != first.get(n) for other in others)]
    yield from ("| variant | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|")
    for variant, config in configs.items():
        yield f"| `{variant}` | " + " | ".join(_cell(str(config.get(name, "-"))) for name in names) + " |"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
