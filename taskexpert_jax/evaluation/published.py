"""Published results on the two benchmarks, for comparison with runs.

By benchmark, then model: the published metric of each task, in the metric's unit. ViT-L backbones unless noted.
"""

from typing import NamedTuple


class PublishedRow(NamedTuple):
    """Published results of a model: its name, a note on its numbers, and `task/metric` -> value."""

    model: str
    note: str
    values: dict[str, float]


def _rows(columns: tuple[str, ...], table: tuple[tuple[str, str, str], ...]) -> tuple[PublishedRow, ...]:
    return tuple(
        PublishedRow(model, note, dict(zip(columns, map(float, values.split()), strict=True)))
        for model, note, values in table
    )


_UNVERIFIED = "from tables of follow-up papers, unverified"

PUBLISHED = {
    "nyud": _rows(
        ("semseg/mIoU", "depth/rmse", "normals/mean", "edge/odsF"),
        (
            ("InvPT", "", "53.56 .5183 19.04 78.10"),
            ("TaskPrompter", "", "55.30 .5152 18.47 78.20"),
            ("TaskExpert", _UNVERIFIED, "55.35 .5157 18.54 78.40"),
            ("MLoRE", "", "55.96 .5076 18.33 78.43"),
            ("TaskDiffusion", "", "55.65 .5020 18.43 78.64"),
            ("TSP", "", "55.39 .4961 18.44 77.50"),
            ("MTMamba++", "Swin-L", "57.01 .4818 18.27 79.40"),
            ("SAK", "distilled ViT-B", "59.93 .4942 17.60 78.60"),
            ("PRISM", "distilled ViT-B", "60.22 .4883 17.81 76.59"),
        ),
    ),
    "pascal_context": _rows(
        ("semseg/mIoU", "human_parts/mIoU", "sal/maxF", "normals/mean", "edge/odsF"),
        (
            ("InvPT", "", "79.03 67.61 84.81 14.15 73.00"),
            ("TaskPrompter", "", "80.89 68.89 84.83 13.72 73.50"),
            ("TaskExpert", _UNVERIFIED, "80.64 69.42 84.87 13.56 73.30"),
            ("TaskExpert ViT-B", _UNVERIFIED, "78.45 67.38 84.96 13.55 72.30"),
            ("MLoRE", "", "81.41 70.52 84.90 13.51 75.42"),
            ("TaskDiffusion", "", "81.21 69.62 84.94 13.55 74.89"),
            ("TSP", "", "81.48 70.64 84.86 13.69 74.80"),
            ("SAK", "distilled ViT-L", "84.01 76.99 84.65 13.82 76.27"),
            ("PRISM", "distilled ViT-L", "84.34 77.83 84.67 13.43 76.23"),
        ),
    ),
}
