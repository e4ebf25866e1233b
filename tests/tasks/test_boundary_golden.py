"""Boundary benchmark against the original's numbers, for every step, all counts and scores, and against Berkeley's."""

import csv
import functools
import pathlib
from typing import NamedTuple

from berkeley import berkeley_counts, interpolated_odsf, thresholds
import numpy as np
from PIL import Image
import pytest
import scipy.io

from taskexpert_jax.parallel import threads
from taskexpert_jax.tasks.metrics.boundary import counts as boundary
from taskexpert_jax.tasks.metrics.boundary.candidates import (
    candidates,
    fade_border,
    orientation,
    region_boundaries,
    suppress,
    triangle_filter,
)
from taskexpert_jax.tasks.metrics.boundary.counts import BoundaryCounts
from taskexpert_jax.tasks.metrics.boundary.matching import most_pairs, most_pairs_outlier_graph
from taskexpert_jax.tasks.metrics.boundary.thinning import ThinMaps, thin

MAX_DIST = {"NYUD": 0.011, "PASCALContext": 0.0075}
STEPS = ("NYUD_0823", "PASCALContext_2008_000652")


def picture(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def open_example(root: pathlib.Path, database: str, image: str) -> tuple[str, np.ndarray, np.ndarray]:
    """An example (id, prediction, label) of the golden open set, read as the original reads it."""
    if database == "NYUD":
        label = picture(root / "label/NYUD/edge" / f"{image}.png")
    else:
        label = scipy.io.loadmat(root / "label/PASCALContext/trainval" / f"{image}.mat")["LabelMap"]
    return image, picture(root / "pred" / database / f"{image}.png"), label


def read_rows(path: pathlib.Path, keys: tuple[str, ...]) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Rows of a CSV file grouped by the values of the columns `keys`, in the order of the file."""
    rows: dict[tuple[str, ...], list[dict[str, str]]] = {}
    with path.open() as lines:
        for row in csv.DictReader(lines):
            rows.setdefault(tuple(row[key] for key in keys), []).append(row)
    return rows


def golden_counts(rows: list[dict[str, str]]) -> BoundaryCounts:
    """Counts of one image, from rows in the order of the thresholds."""
    return BoundaryCounts(*(np.array([[int(row[k]) for row in rows]]) for k in ("cntR", "sumR", "cntP", "sumP")))


class Database(NamedTuple):
    """Golden open images of one database."""

    name: str
    ours: BoundaryCounts
    original: BoundaryCounts
    most: np.ndarray  # pairs of a maximum matching, (images, 101)
    curve: list[dict[str, str]]


@pytest.fixture(scope="module")
def open_root(golden_dir: pathlib.Path) -> pathlib.Path:
    return golden_dir / "boundary" / "open"


@pytest.fixture(scope="module", params=["NYUD", "PASCALContext"])
def database(request: pytest.FixtureRequest, open_root: pathlib.Path) -> Database:
    name = request.param
    rows = read_rows(open_root / "counts.csv", ("database", "image"))
    most = read_rows(open_root / "repeats.csv", ("database", "image"))
    keys = [key for key in rows if key[0] == name]

    def count(key: tuple[str, ...]) -> BoundaryCounts:
        _, prediction, label = open_example(open_root, *key)
        return boundary.image_counts(prediction, label, MAX_DIST[name])

    return Database(
        name=name,
        ours=BoundaryCounts.join(threads.in_order(count, keys)),
        original=BoundaryCounts.join(golden_counts(rows[key]) for key in keys),
        most=np.array([[int(line["maxcard"]) for line in most[key]] for key in keys]),
        curve=read_rows(open_root / "curve.csv", ("database",))[name,],
    )


class TestGoldenSteps:
    """Each step, given the original's output of the previous step."""

    @pytest.fixture(params=STEPS)
    def steps(self, request: pytest.FixtureRequest, open_root: pathlib.Path):
        _, prediction, label = open_example(open_root, *request.param.split("_", maxsplit=1))
        with np.load(open_root / "steps" / f"{request.param}.npz") as arrays:
            return prediction, label, dict(arrays)

    def test_triangle_filter_has_the_same_bits(self, steps):
        prediction, _, golden = steps
        np.testing.assert_array_equal(triangle_filter(prediction / np.float32(255)), golden["convtri"])

    def test_orientation(self, steps):
        golden = steps[2]
        apart = np.abs(orientation(golden["convtri"]) - golden["orientation"])
        assert np.minimum(apart, np.pi - apart).max() < 1e-5

    def test_suppressed_map_is_the_same(self, steps):
        prediction, _, golden = steps
        strength = prediction / np.float32(255)
        np.testing.assert_array_equal(fade_border(suppress(strength, golden["orientation"])), golden["nms"])
        np.testing.assert_array_equal(candidates(prediction), golden["nms"])

    def test_thinned_prediction_is_the_same(self, steps):
        golden = steps[2]
        np.testing.assert_array_equal(golden["nms"] > 0.5, golden["pred_bin"])
        np.testing.assert_array_equal(thin(golden["pred_bin"]), golden["pred_thin"])

    def test_true_boundary_is_the_same(self, steps):
        _, label, golden = steps
        np.testing.assert_array_equal(region_boundaries(label), golden["gt_seg2bmap"])
        np.testing.assert_array_equal(boundary.true_boundary(label), golden["gt_thin"])

    def test_pairs_are_the_originals_or_slightly_more(self, steps):
        golden = steps[2]
        maps = ThinMaps(np.flatnonzero(golden["pred_thin"]), np.array([0, golden["pred_thin"].sum()]))
        distance = float(golden["max_dist"]) * np.hypot(*golden["gt_thin"].shape)
        pairs = int(np.sum(golden["match_pred"] > 0))
        assert 0 <= most_pairs(maps, golden["gt_thin"], distance).sum() - pairs <= 0.01 * pairs


class TestGoldenCounts:
    def test_sums_are_the_originals(self, database: Database):
        np.testing.assert_array_equal(database.ours.sumR, database.original.sumR)
        np.testing.assert_array_equal(database.ours.sumP, database.original.sumP)

    def test_as_many_pairs_as_possible(self, database: Database):
        np.testing.assert_array_equal(database.ours.cntR, database.most)
        np.testing.assert_array_equal(database.ours.cntP, database.most)

    def test_pairs_are_the_originals_or_slightly_more(self, database: Database):
        more = database.ours.cntR - database.original.cntR
        smaller = np.minimum(database.original.sumR, database.original.sumP)
        assert more.min() >= 0
        assert np.all(more <= np.maximum(0.01 * smaller, 3))

    def test_best_f(self, database: Database):
        expected = [float(row["F"]) for row in database.curve]
        f = boundary.curve(database.ours).f
        assert f.max() == pytest.approx(max(expected), abs=0.001)
        assert f[np.argmax(expected)] >= f.max() - 1e-4  # the same threshold, or a tie

    def test_scores_of_the_originals_counts(self, database: Database):
        precision, recall, f = boundary.curve(database.original)
        for name, values in (("P", precision), ("R", recall), ("F", f)):
            np.testing.assert_allclose(values, [float(row[name]) for row in database.curve], atol=1e-9)
        scores = boundary.scores(database.original)
        expected = {
            "NYUD": {"odsF": 80.5441, "oisF": 82.7300, "AP": 86.8090, "odsF_threshold": 0.29, "odsF_recall": 76.9833},
            "PASCALContext": {"odsF": 69.5370, "oisF": 72.1243, "AP": 75.2793, "odsF_threshold": 0.55},
        }[database.name]
        assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-4)

    def test_tiny_cases(self, golden_dir: pathlib.Path):
        """Hand-made 64x64 images, most of them with two distances."""
        root = golden_dir / "boundary" / "tiny"
        rows = read_rows(root / "counts.csv", ("case", "maxDist"))
        most = read_rows(root / "repeats.csv", ("case", "maxDist"))
        assert len(rows) > 80
        for (case, max_dist), lines in rows.items():
            prediction, label = picture(root / "pred" / f"{case}.png"), picture(root / "label" / f"{case}.png")
            ours, original = boundary.image_counts(prediction, label, float(max_dist)), golden_counts(lines)
            np.testing.assert_array_equal(ours.sumR, original.sumR, case)
            np.testing.assert_array_equal(ours.sumP, original.sumP, case)
            pairs = [int(line["maxcard"]) for line in most[case, max_dist]]
            np.testing.assert_array_equal(ours.cntR[0], pairs, case)
            np.testing.assert_array_equal(ours.cntP[0], pairs, case)
            expected = [float(line["F"]) for line in lines]
            np.testing.assert_allclose(boundary.curve(original).f, expected, atol=1e-6, err_msg=case)

    def test_outlier_graph_misses_pairs_as_the_original(self, open_root: pathlib.Path):
        """Both maps have about 3600 pixels; all of one can be matched, and the original misses 5 to 7 of them."""
        key, index = ("NYUD", "0462"), 12
        runs = read_rows(open_root / "repeats.csv", ("database", "image"))[key][index]
        originals = [int(runs[name]) for name in ("octave_matched", "bin0", "bin1", "lap")]
        _, prediction, label = open_example(open_root, *key)
        levels = (candidates(prediction) > np.float32(boundary.THRESHOLDS[index])).astype(int)
        truth, distance = boundary.true_boundary(label), MAX_DIST["NYUD"] * np.hypot(*label.shape)

        def pairs(seed: int) -> int:
            matcher = functools.partial(most_pairs_outlier_graph, seed=seed)
            return boundary.level_counts(levels, 1, [truth], distance, matcher).cntP.item()

        found = [pairs(seed) for seed in (0, 1, 2)]
        assert pairs(0) == found[0]
        assert max(found) < int(runs["maxcard"])
        assert np.mean(found) == pytest.approx(np.mean(originals), abs=5)


class TestBerkeley:
    """Published counts and scores on BSDS500."""

    @staticmethod
    def annotations(path: pathlib.Path) -> list[np.ndarray]:
        return [cell["Boundaries"][0, 0] for cell in scipy.io.loadmat(path)["groundTruth"][0]]

    def hed(self, root: pathlib.Path, image: str) -> tuple[BoundaryCounts, BoundaryCounts]:
        """Counts of an image at threshold 0.44, computed and published."""
        prediction = picture(root / "hed_nms_pred" / f"{image}.png")
        annotations = self.annotations(root / "groundTruth" / "test" / f"{image}.mat")
        table = np.loadtxt(root / "hed_eval_expected" / f"{image}_ev1.txt")
        at = np.flatnonzero(np.isclose(table[:, 0], 0.44))
        published = BoundaryCounts(*table[at, 1:].T[:, None].astype(int))
        return berkeley_counts(prediction, annotations, thresholds()[at]), published

    def test_bench_data(self, data_dir: pathlib.Path):
        root = data_dir / "bsds500" / "bench_data"
        cuts = thresholds(5)
        images = sorted((root / "png").glob("*.png"))
        counts = BoundaryCounts.join(
            berkeley_counts(picture(image), self.annotations(root / "groundTruth" / f"{image.stem}.mat"), cuts)
            for image in images
        )
        best, at = interpolated_odsf(counts, cuts)
        assert (best, at) == (pytest.approx(0.704628, abs=0.001), pytest.approx(1 / 6))
        assert counts.pooled().sumP[0].tolist() == [12573, 7109, 5812, 5533, 3847]  # from the published precisions
        published = np.loadtxt(root / "test_2" / "eval_bdry_thr.txt")
        precision, recall, f = boundary.curve(counts)
        np.testing.assert_allclose(np.stack([cuts, recall, precision, f], axis=1), published, atol=0.001)
        assert boundary.oisf(counts) == pytest.approx(0.708698, abs=0.001)
        assert boundary.average_precision(counts) == pytest.approx(0.307627, abs=0.001)

    @pytest.mark.parametrize("count", [5, pytest.param(60, marks=pytest.mark.slow)])
    def test_hed(self, data_dir: pathlib.Path, count: int):
        root = data_dir / "bsds500"
        images = sorted(path.stem for path in (root / "hed_nms_pred").glob("*.png"))[:count]
        ours, published = (
            BoundaryCounts.join(parts).pooled()
            for parts in zip(*(self.hed(root, image) for image in images), strict=True)
        )
        assert (ours.sumR, ours.sumP) == (published.sumR, published.sumP)
        assert boundary.odsf(ours) == pytest.approx(boundary.odsf(published), abs=0.0005)
        if count == 60:
            assert boundary.odsf(ours) == pytest.approx(0.775808, abs=0.0005)
