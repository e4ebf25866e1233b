"""Best and worst examples of a set, selected in one pass."""

import base64
import io

import numpy as np
from PIL import Image
import pytest

from taskexpert_jax import tasks
from taskexpert_jax.evaluation import extremes
from taskexpert_jax.evaluation.extremes import Extremes
from taskexpert_jax.tasks import Published

ALL = {
    task.name: task
    for task in tasks.build(
        ("semseg", "depth"), loss_weights={"semseg": 1.0, "depth": 1.0}, semseg_classes=("a", "b", "c")
    )
}


def ranked(scores, *, higher_is_better=True, positions=None):
    """`Extremes` after examples with these scores, and the positions that were drawn."""
    kept, drawn = Extremes(Published("score", "score", higher_is_better)), []

    def draw(position):
        drawn.append(position)
        return (f"image {position}",)

    for position in range(len(scores)) if positions is None else positions:
        kept.offer(scores[position], position, f"id {position}", lambda position=position: draw(position))
    return kept, drawn


def positions_of(entries):
    return [entry.position for entry in entries]


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_four_at_each_end_are_kept_in_order(higher_is_better):
    scores = np.random.default_rng(0).permutation(200) / 7
    kept, drawn = ranked(scores.tolist(), higher_is_better=higher_is_better)
    ascending = np.argsort(scores).tolist()
    best = ascending[::-1][:4] if higher_is_better else ascending[:4]
    worst = ascending[:4] if higher_is_better else ascending[::-1][:4]
    assert positions_of(kept.best) == best and positions_of(kept.worst) == worst
    for entry in (*kept.best, *kept.worst):
        assert (entry.example_id, entry.pictures) == (f"id {entry.position}", (f"image {entry.position}",))
        assert entry.score == scores[entry.position]
    assert len(drawn) == len(set(drawn)) < 60  # of 200: only those that were kept at first are drawn


def test_ties_go_to_the_earlier_example_in_whatever_order_they_come():
    scores = [1.0, 2.0] * 20
    for positions in (range(40), reversed(range(40))):
        kept, _ = ranked(scores, positions=positions)
        assert positions_of(kept.best) == [1, 3, 5, 7] and positions_of(kept.worst) == [0, 2, 4, 6]


def test_of_a_small_set_no_example_is_shown_twice_and_none_without_a_score():
    kept, drawn = ranked([3.0, float("nan"), 1.0, 5.0, 2.0, 4.0])
    assert positions_of(kept.worst) == [2, 4, 0, 5] and positions_of(kept.best) == [3]
    assert 1 not in drawn


def test_parts_of_a_set_merge_into_the_whole():
    scores = np.random.default_rng(1).integers(0, 30, 100).astype(float).tolist()
    whole, _ = ranked(scores)
    part, _ = ranked(scores, positions=range(0, 100, 2))
    part.merge(ranked(scores, positions=range(1, 100, 2))[0])
    assert part.best == whole.best and part.worst == whole.worst


def decoded(uri):
    kind, _, data = uri.partition(";base64,")
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_pictures_are_small_and_keep_the_colours_of_classes():
    label = np.zeros((400, 600, 1), np.uint8)
    label[:, 300:] = 2
    label[:40] = 255
    image, prediction, truth = extremes.pictures(
        ALL["semseg"], np.full((400, 600, 3), 90, np.uint8), np.ones((400, 600), np.uint8), label
    )
    kind, pixels = decoded(image)
    assert kind == "data:image/jpeg" and pixels.shape == (171, 256, 3)
    kind, pixels = decoded(truth)
    assert kind == "data:image/png" and pixels.shape == (171, 256, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 3  # two classes and black, without mixed colours at borders
    assert len(np.unique(decoded(prediction)[1].reshape(-1, 3), axis=0)) == 1


def test_depths_are_drawn_over_the_range_of_the_label():
    """A prediction of twice the depth must differ from the label's image."""
    label = np.linspace(1, 3, 64 * 64, dtype=np.float32).reshape(64, 64, 1)
    image = np.zeros((64, 64, 3), np.uint8)
    _, same, truth = extremes.pictures(ALL["depth"], image, label[..., 0], label)
    _, farther, _ = extremes.pictures(ALL["depth"], image, 2 * label[..., 0], label)
    assert same == truth and farther != truth
