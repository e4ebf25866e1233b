"""Parameters and multiply-adds by part for every size on every data set, the table of docs/model.md.

python benchmarks/budget.py
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

from configs import cityscapes, nyud, nyud13, pascal_context
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.tasks import from_config

PARTS = ("backbone", "experts", "gates", "memory", "heads")
DATA_SETS = {"NYUD-v2": nyud, "PASCAL-Context": pascal_context, "NYUv2-13": nyud13, "Cityscapes": cityscapes}
SIZES = ("vit_ti16", "vit_s16", "vit_b16", "vit_l16")


def main() -> None:
    """Prints the table as Markdown: millions of parameters / billions of multiply-adds an image."""
    print("| benchmark | size | " + " | ".join((*PARTS, "total")) + " |")
    print("|---" * (len(PARTS) + 3) + "|")
    for name, module in DATA_SETS.items():
        for size in SIZES:
            config = module.get_config(size)
            found = budget.count(taskexpert.from_config(config, from_config(config)))
            counts = [(found.parameters[part], found.multiply_adds[part]) for part in PARTS]
            counts.append((found.total_parameters, found.total_multiply_adds))
            cells = [f"{parameters / 1e6:.1f} / {products / 1e9:.1f}" for parameters, products in counts]
            height, width = config.dataset.image_size
            print(f"| {name}, {height}x{width} | {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
