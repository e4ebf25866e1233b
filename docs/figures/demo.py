"""The picture of the README: six predictions and a gate map of the demo's model on a scene it has not seen.

.venv/bin/python docs/figures/demo.py writes docs/figures/demo.webp, with the bundled model or --run=RUN.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image

from taskexpert_jax import Gates, installation, load_run
from taskexpert_jax.report.gate_maps import choice_colours
from taskexpert_jax.tasks import canvas

SCENE = 1_000_003  # far beyond training
SIZE = (288, 384)  # the model itself sees 96x128
TASK, TAP = "human_parts", 4  # of the gate map


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="demo")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).with_name("demo.webp"))
    options = parser.parse_args()
    installation.enable()
    from input_pipeline import scenes

    image = scenes.render(SCENE, height=SIZE[0], width=SIZE[1])["image"]
    run = load_run(options.run)
    drawn = run.draw(run.predict(image))
    cells = [("input", canvas.at_display_size(image))]
    cells += [(run.tasks[name].title, picture) for name, picture in drawn.items()]
    cells.append((f"gate of {run.tasks[TASK].title} at tap {TAP}", gate_map(run.gates(image), image)))
    picture = canvas.sheet([cells[:4], cells[4:]])
    picture.save(options.output, quality=94)
    print(f"written: {options.output} ({options.output.stat().st_size // 1000} kB)")


def gate_map(gates: Gates, image: np.ndarray) -> Image.Image:
    """The expert slot with the largest weight at each token, in colours over the image in grey; with a legend."""
    weights = gates.at_pixels()[TAP - 1, gates.tasks.index(TASK)]  # (rows, columns, slots)
    colours = choice_colours(gates.slots)
    winners = Image.fromarray(colours[weights.argmax(axis=-1)]).resize(image.shape[1::-1], Image.Resampling.NEAREST)
    shown = Image.blend(Image.fromarray(image).convert("L").convert("RGB"), winners, 0.6)
    legend = canvas.legend([(name, tuple(colours[k].tolist())) for k, name in enumerate(gates.slots)], shown.width)
    paper = Image.new("RGB", (shown.width, shown.height + canvas.GAP // 2 + legend.height), canvas.PAPER)
    paper.paste(shown, (0, 0))
    paper.paste(legend, (0, shown.height + canvas.GAP // 2))
    return paper


if __name__ == "__main__":
    main()
