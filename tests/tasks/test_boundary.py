"""Boundary benchmark: cases worked out by hand, golden/, other libraries, and properties of arbitrary images.

The original's own numbers are in test_boundary_golden.py.
"""

import json
import math
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from scipy import ndimage, optimize
import skimage.morphology

from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks.metrics.boundary import counts as boundary
from taskexpert_jax.tasks.metrics.boundary.candidates import fade_border, region_boundaries, suppress, triangle_filter
from taskexpert_jax.tasks.metrics.boundary.counts import BoundaryCounts
from taskexpert_jax.tasks.metrics.boundary.matching import most_pairs, most_pairs_outlier_graph, shortest_pairs
from taskexpert_jax.tasks.metrics.boundary.thinning import ThinMaps, thin, thin_levels
from tests.golden import make


def line(column: int, *, rows: slice = slice(8, 22), value: int = 200) -> np.ndarray:
    """A 30x40 image, whose diagonal is 50 pixels, with a vertical line of 14 pixels."""
    image = np.zeros((30, 40), np.uint8)
    image[rows, column] = value
    return image


def at_half(counts: BoundaryCounts) -> tuple[int, int, int, int]:
    """cntR, sumR, cntP, sumP of one image at threshold 0.5."""
    return tuple(int(field[50]) for field in counts.table()[:, 0])


class TestByHand:
    @pytest.mark.parametrize(("columns", "pairs"), [(3, 14), (4, 14), (5, 0), (-4, 14), (-5, 0)])
    def test_distance_is_inclusive(self, columns: int, pairs: int):
        """0.08 of the diagonal is 4 pixels."""
        counts = boundary.image_counts(line(20 + columns), line(20), 0.08, kind="lines")
        assert at_half(counts) == (pairs, 14, pairs, 14)

    def test_distance_between_pixels(self):
        """A line shifted along itself by 6 pixels: pairs reach up to 3 pixels beyond the overlap."""
        counts = boundary.image_counts(line(20, rows=slice(14, 28)), line(20), 0.079, kind="lines")
        assert at_half(counts)[0] == 14 - 6 + 3

    def test_one_to_one(self):
        """Two predicted lines next to one true line: only one of them is matched."""
        counts = boundary.image_counts(line(17) + line(23), line(20), 0.08, kind="lines")
        assert at_half(counts) == (14, 14, 14, 28)
        assert boundary.odsf(counts) == pytest.approx(2 * 14 / (14 + 28))

    def test_pairs_give_way(self):
        """Both predicted pixels are nearest to the same true pixel; one must be matched with the farther one."""
        maps = ThinMaps(np.array([2, 4]), np.array([0, 2]))
        truth = np.zeros((2, 9), bool)
        truth[0, [3, 6]] = True
        for matcher in (most_pairs, shortest_pairs):
            assert matcher(maps, truth, 2.0).tolist() == [True, True]
            assert matcher(maps, truth, 1.5).sum() == 1

    def test_annotators(self):
        """A predicted pixel is correct if any annotator has it; true pixels are summed over the annotators."""
        levels = ((line(10) + line(30)) > 0).astype(int)
        truths = [line(11) > 0, line(31) > 0, line(12) > 0]
        counts = boundary.level_counts(levels, 1, truths, 2.0)
        assert counts.table().ravel().tolist() == [42, 42, 28, 28]

    def test_a_line_read_as_regions_moves(self):
        """A one-pixel line moves one pixel to the upper left; a line of three pixels becomes two lines."""
        label = line(20, rows=slice(None))
        assert np.flatnonzero(boundary.true_boundary(label)[15]).tolist() == [19]
        assert np.flatnonzero(boundary.true_boundary(label, "lines")[15]).tolist() == [20]
        thick = label + line(21, rows=slice(None)) + line(22, rows=slice(None))
        assert np.flatnonzero(boundary.true_boundary(thick)[15]).tolist() == [19, 22]
        assert np.flatnonzero(boundary.true_boundary(thick, "lines")[15]).tolist() == [21]

    def test_kind_of_label_counts(self):
        prediction = line(20)
        assert at_half(boundary.image_counts(prediction, line(20), 0.01, kind="lines"))[0] == 14
        assert at_half(boundary.image_counts(prediction, line(20), 0.01))[0] == 0

    def test_region_boundaries_at_the_border(self):
        labels = np.array([[1, 1, 2], [1, 1, 2], [3, 1, 1]])
        expected = [[0, 1, 0], [1, 1, 1], [1, 0, 0]]
        np.testing.assert_array_equal(region_boundaries(labels), np.array(expected, bool))

    def test_a_strength_equal_to_the_threshold_is_not_above(self):
        counts = boundary.image_counts(line(20, value=51), line(20), 0.08)  # 51 / 255 = 0.2
        assert counts.sumP[0, 19] == 14
        assert counts.sumP[0, 20] == 0

    def test_weaker_candidates_survive_within_one_percent(self):
        strength = np.zeros((9, 9), np.float32)
        strength[:, 4] = 100
        for beside, left in ((99, 0), (99.5, 1)):
            strength[:, 5] = beside
            assert (suppress(strength, np.zeros_like(strength))[4] > 0).tolist() == [False] * 4 + [
                True,
                left,
                *[False] * 3,
            ]

    def test_border_fades(self):
        faded = fade_border(np.ones((30, 40), np.float32))
        np.testing.assert_allclose(faded[15, :6], [0, 0.2, 0.4, 0.6, 0.8, 1], rtol=1e-6)
        np.testing.assert_allclose(faded[-2, -3], 0.2 * 0.4, rtol=1e-6)

    @pytest.mark.parametrize(
        ("prediction", "label", "expected"),
        [
            (np.zeros((30, 40), np.uint8), line(20), (0, 14, 0, 0)),
            (line(20), np.full((30, 40), 255), (0, 0, 0, 14)),
            (np.zeros((30, 40), np.uint8), np.zeros((30, 40), int), (0, 0, 0, 0)),
        ],
    )
    def test_empty_maps(self, prediction, label, expected):
        kind = "regions" if label.min() == label.max() else "lines"
        counts = boundary.image_counts(prediction, label, 0.08, kind=kind)
        assert at_half(counts) == expected
        precision, recall, f = (values[50] for values in boundary.curve(counts))
        assert (precision, recall) == ((0, 1) if expected[3] else (1, 0))
        assert f == boundary.odsf(counts) == boundary.oisf(counts) == 0

    def test_nothing_matched(self):
        counts = boundary.image_counts(line(30), line(10), 0.08, kind="lines")
        assert [float(values[50]) for values in boundary.curve(counts)] == [0, 0, 0]

    def test_pictures_smaller_than_the_filter(self):
        image = np.random.default_rng(0).random((5, 7), np.float32)
        taps = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
        wide = np.pad(image, 4, mode="symmetric")
        expected = [[np.sum(wide[y : y + 9, x : x + 9] * np.outer(taps, taps)) for x in range(7)] for y in range(5)]
        np.testing.assert_allclose(triangle_filter(image), expected, rtol=1e-5)
        assert boundary.image_counts(np.full((2, 2), 255, np.uint8), np.eye(2, dtype=int), 0.5).sumP.sum() >= 0

    def test_the_fraction_is_cut_off_as_by_the_familys_code_or_rounded(self):
        shares = np.array([0, 0.0019, 0.002, 0.0039, 0.004, 0.5, 0.9999, 1], np.float32)
        for probability in (shares, jnp.asarray(shares)):
            assert boundary.quantise(probability).tolist() == [0, 0, 0, 0, 1, 127, 254, 255]
            assert boundary.quantise(probability, "round").tolist() == [0, 0, 1, 1, 1, 128, 255, 255]

    def test_numbers_of_eight_bits_stay_themselves(self):
        levels = np.arange(256)
        for shares in (levels / 255, (levels / 255).astype(np.float32), levels.astype(np.float32) / np.float32(255)):
            for how in ("truncate", "round"):
                assert boundary.quantise(shares, how).tolist() == levels.tolist()


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(make.FOLDER / "boundary" / "counts.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def golden_counts(golden: dict[str, np.ndarray]) -> BoundaryCounts:
    def image(name: str) -> np.ndarray:
        with Image.open(make.FOLDER / "boundary" / f"{name}.png") as opened:
            return np.array(opened)

    examples = [(name, image(f"{name}_prediction"), image(f"{name}_label")) for name in golden]
    return BoundaryCounts.join(boundary.image_counts(*maps, make.MAX_DIST) for _, *maps in examples)


class TestGolden:
    """Equality with an independent implementation on rendered scenes, shapes and an empty label; see golden/make.py."""

    def test_counts(self, golden_counts: BoundaryCounts, golden: dict[str, np.ndarray]):
        for i, (name, expected) in enumerate(golden.items()):
            cnt_r, sum_r, cnt_p, sum_p = golden_counts.table()[:, i]
            np.testing.assert_array_equal([cnt_r, sum_r, sum_p], expected, name)
            np.testing.assert_array_equal(cnt_p, cnt_r, name)

    def test_scores(self, golden_counts: BoundaryCounts):
        expected = json.loads((make.FOLDER / "boundary" / "scores.json").read_text())
        scores = boundary.scores(golden_counts)
        assert {name: scores[name] for name in expected} == pytest.approx(expected, rel=1e-12)


class TestProperties:
    @pytest.mark.parametrize("shape", [(64, 64), (13, 7), (1, 9)])
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
    def test_thinning_equals_scikit_image(self, shape: tuple[int, int], share: float):
        mask = np.random.default_rng(0).random(shape) < share
        np.testing.assert_array_equal(thin(mask), skimage.morphology.thin(mask))

    def test_levels_are_thinned_each_for_itself(self):
        levels = np.random.default_rng(1).integers(0, 6, (40, 50))
        minima = np.array([5, 3, 1])
        maps = thin_levels(levels, minima)
        for k, minimum in enumerate(minima):
            expected = np.flatnonzero(thin(levels >= minimum))
            assert np.sort(maps.pixels[maps.starts[k] : maps.starts[k + 1]]).tolist() == expected.tolist()

    def test_filter_equals_a_convolution(self):
        image = np.random.default_rng(2).random((50, 70), np.float32)
        taps = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
        expected = ndimage.correlate1d(ndimage.correlate1d(image.astype(float), taps, axis=0), taps, axis=1)
        np.testing.assert_allclose(triangle_filter(image), expected, atol=4e-5)

    @pytest.mark.parametrize("distance", [0.5, 1.0, 2.3, 5.0])
    @pytest.mark.parametrize("shares", [(0.1, 0.1), (0.3, 0.05), (0.03, 0.4)])
    def test_matchings_are_optimal(self, distance: float, shares: tuple[float, float]):
        """SciPy's dense assignment gives the same number of pairs and the same total distance."""
        rng = np.random.default_rng(3)
        for _ in range(5):
            predicted, truth = (rng.random((20, 25)) < share for share in shares)
            pixels, true = np.argwhere(predicted), np.argwhere(truth)
            apart = np.hypot(*(pixels[:, None] - true).transpose(2, 0, 1))
            costs = np.where(apart <= distance, np.rint(100 * apart), 1e6)

            def total(costs: np.ndarray) -> tuple[int, float]:
                chosen = costs[optimize.linear_sum_assignment(costs)]
                return int(np.sum(chosen < 1e6)), float(np.sum(chosen[chosen < 1e6]))

            maps = ThinMaps(np.flatnonzero(predicted), np.array([0, predicted.sum()]))
            pairs, cost = total(costs)
            assert most_pairs(maps, truth, distance).sum() == pairs
            shortest = shortest_pairs(maps, truth, distance)
            assert total(costs[shortest]) == (pairs, cost)
            assert shortest.sum() == pairs
            assert most_pairs_outlier_graph(maps, truth, distance).sum() <= pairs

    def test_maps_in_turn_are_matched_as_each_for_itself(self):
        """The number of matched pixels of a map does not depend on the other maps, which share only some pixels."""
        rng = np.random.default_rng(4)
        truth = rng.random((40, 50)) < 0.1
        lists = [np.flatnonzero(rng.random(truth.size) < share) for share in (0.02, 0.1, 0.05, 0, 0.2)]
        starts = np.cumsum([0, *map(len, lists)])
        together = most_pairs(ThinMaps(np.concatenate(lists), starts), truth, 3.0)
        for pixels, start, stop in zip(lists, starts[:-1], starts[1:], strict=True):
            alone = most_pairs(ThinMaps(pixels, np.array([0, pixels.size])), truth, 3.0)
            assert together[start:stop].sum() == alone.sum()

    def test_a_coarse_prediction_has_the_counts_of_each_threshold(self):
        """Thresholds between the same two values share a map, and each gets that map's counts."""
        prediction = line(10, value=60) + line(16, value=200)
        counts = boundary.image_counts(prediction, line(16), 0.05, kind="lines")
        above = [sum(value / 255 > threshold for value in (60, 200)) for threshold in boundary.THRESHOLDS]
        assert counts.sumP[0].tolist() == [14 * lines for lines in above]
        assert counts.cntP[0].tolist() == [14 * (lines > 0) for lines in above]


def counts_of(*images: tuple[list[int], list[int], list[int], list[int]]) -> BoundaryCounts:
    """cntR, sumR, cntP, sumP of each image."""
    return BoundaryCounts(*np.array(images).transpose(1, 0, 2))


class TestScores:
    # Precision and recall of the images at two thresholds: 1, 0.5 then 0.5, 1; and 0.25, 0.25 then 1, 0.25.
    counts = counts_of(([5, 10], [10, 10], [5, 10], [5, 20]), ([1, 1], [4, 4], [1, 1], [4, 1]))

    def test_pooled_and_best_of_each(self):
        precision, recall, f = boundary.curve(self.counts)
        np.testing.assert_allclose(precision, [6 / 9, 11 / 21])
        np.testing.assert_allclose(recall, [6 / 14, 11 / 14])
        np.testing.assert_allclose(f, [12 / 23, 22 / 35])
        assert boundary.odsf(self.counts) == pytest.approx(22 / 35)
        # Both thresholds give the first image F = 2 / 3, and it takes the first; the second takes its second, F = 0.4.
        assert boundary.oisf(self.counts) == pytest.approx(2 * 6 / (14 + 6))

    def test_average_precision(self):
        """Recalls 0.5 and 1 have precision 1 and 0.5: 50 points between and one at each end, mean 0.75."""
        counts = counts_of(([5, 10], [10, 10], [5, 10], [5, 20]))
        assert boundary.average_precision(counts) == pytest.approx(51 * 0.75 / 100)

    def test_merged_sets_are_pooled(self):
        first, second = (BoundaryCounts(*self.counts.table()[:, [i]]) for i in (0, 1))
        merged = BoundaryCounts.empty(2).merge(first).merge(second)
        np.testing.assert_array_equal(merged.table(), self.counts.table())
        assert merged.pooled().sumP.tolist() == [[9, 21]]

    def test_the_lowest_of_equally_good_thresholds(self):
        counts = counts_of(([0, 5, 5], [10, 10, 10], [0, 5, 5], [5, 5, 5]))
        scores = boundary.scores(counts, np.array([0.1, 0.2, 0.3]))
        assert scores["odsF_threshold"] == 0.2
        assert scores["odsF_precision"] == 100 and scores["odsF_recall"] == 50


class TestImageCounts:
    def test_options_arrive(self):
        columns = (16, 20, 22, 26, 30)
        lines = [boundary.image_counts(line(c), line(20), 0.001, kind="lines", matcher=shortest_pairs) for c in columns]
        assert [at_half(counts)[0] for counts in lines] == [0, 14, 0, 0, 0]

        def nothing(maps, truth, distance):
            return np.zeros(maps.pixels.size, bool)

        assert boundary.image_counts(line(20), line(20), 0.08, matcher=nothing).cntP.max() == 0

    def test_another_size_is_an_error_and_not_a_rotation(self):
        with pytest.raises(UserError, match=r"\(40, 30\).*\(30, 40\)"):
            boundary.image_counts(line(20).T, line(20), 0.08)

    @pytest.mark.parametrize("prediction", [line(20) / 255, line(20)[..., None], line(20).astype(np.uint16)])
    def test_another_kind_of_prediction(self, prediction: np.ndarray):
        with pytest.raises(UserError, match="uint8"):
            boundary.image_counts(prediction, line(20), 0.08)


def test_without_any_image_every_score_is_nan():
    counts = BoundaryCounts.join([BoundaryCounts.empty()])
    assert counts.sumR.shape == (0, 101)
    assert all(map(math.isnan, boundary.scores(counts).values()))
    assert all(map(math.isnan, (boundary.odsf(counts), boundary.oisf(counts), boundary.average_precision(counts))))


def test_the_other_metrics_do_not_need_numba():
    program = "import sys; sys.modules['numba'] = None; import taskexpert_jax.tasks.metrics"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=pathlib.Path(__file__).resolve().parents[2]
    )
    assert done.returncode == 0, done.stderr
