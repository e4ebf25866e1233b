"""The picture of docs/scenes.md: a room with people for each combination of conditions.

.venv/bin/python docs/figures/scenes.py writes docs/figures/scenes.webp.
"""

import itertools
import pathlib

from PIL import Image

from taskexpert_jax import installation
from taskexpert_jax.tasks import canvas

FIRST = 1_000_001  # far beyond training
SIZE = (144, 192)


def main() -> None:
    installation.enable()
    from input_pipeline import scenes
    from input_pipeline.scenes import conditions

    def cell(*names: str) -> tuple[str, Image.Image]:
        numbers = (number for number in itertools.count(FIRST, 2) if scenes.condition(number) == names)
        rooms = (scenes.render(number, height=SIZE[0], width=SIZE[1], variety="wide") for number in numbers)
        image = next(room["image"] for room in rooms if room["human_parts"].any())
        return ", ".join(names), Image.fromarray(image)

    views = [(view, clutter) for view in conditions.VIEWS for clutter in conditions.CLUTTERS]
    output = pathlib.Path(__file__).with_name("scenes.webp")
    picture = canvas.sheet([[cell(light, *names) for names in views] for light in conditions.LIGHTS])
    picture.save(output, quality=90)
    print(f"written: {output} ({output.stat().st_size // 1000} kB)")


if __name__ == "__main__":
    main()
