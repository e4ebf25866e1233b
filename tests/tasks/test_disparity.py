"""The task disparity: files, scale and flip, loss and metrics by hand, colours."""

import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image
import pytest

from input_pipeline import folder, transforms
from taskexpert_jax import tasks
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import scoring
from taskexpert_jax.tasks import panels
from taskexpert_jax.tasks.kinds.depth import bar_labels

(TASK,) = tasks.build(["disparity"], loss_weights={"disparity": 1.0})


def test_loss_and_metrics_of_four_pixels():
    """Errors of 1, 2 (a negative prediction counts as 0 in the metric), 20 beyond 80 px, and a pixel without label."""
    label = np.float32([4, 2, 100, -1]).reshape(1, 1, 4, 1)
    prediction = np.float32([5, -3, 80, 7]).reshape(1, 1, 4, 1)
    assert float(TASK.loss(prediction, label)) == pytest.approx((1 + 5 + 20) / 3)
    values = TASK.metric.from_model_output(prediction=prediction, label=label, mask=None).compute()
    assert values == pytest.approx(
        {
            "rmse_80": ((1 + 4) / 2) ** 0.5,
            "rmse": ((1 + 4 + 400) / 3) ** 0.5,
            "abs_err": (1 + 2 + 20) / 3,
            "abs_rel": (1 / 4 + 2 / 2 + 20 / 100) / 3,
        }
    )
    assert (TASK.main_metric, TASK.higher_is_better) == ("rmse_80", False)


def test_the_best_constant_is_that_of_the_main_metric():
    assert TASK.best_constant(np.array([[2.0], [4.0], [200.0]])) == pytest.approx([3])
    assert TASK.best_constant(np.array([[90.0], [110.0]])) == pytest.approx([100])


def test_an_image_enlarged_by_s_has_s_times_the_disparity_and_a_mirrored_one_the_same():
    label = np.float32([[[8], [0]]])
    assert TASK.rescale(label, np.float32(1.5)).tolist() == [[[12], [0]]]
    assert TASK.flip(label) is label
    np.testing.assert_allclose(TASK.undo_rescale(jnp.float32([12.0]), 1.5), [8])
    example = {"image": np.zeros((4, 4, 3), np.uint8), "id": "a", "disparity": np.full((4, 4, 1), 8, np.float32)}
    reduced = transforms.downscale(example, [TASK], 0.5)
    assert reduced["disparity"].tolist() == [[[8], [8]]] * 2  # pixels of the whole image
    marked = transforms.mark_invalid({**example, "disparity": label}, [TASK])["disparity"]
    assert marked.tolist() == [[[8], [-1]]]


def test_files_of_16_bits_have_cityscapes_code_and_others_pixels(tmp_path):
    Image.fromarray(np.uint16([[0, 1, 257, 65535]])).save(tmp_path / "a.png")
    expected = [[0, 0, 1, 65534 / 256]]
    np.testing.assert_array_equal(folder.read_label(tmp_path / "a.png", TASK, (1, 4))[..., 0], expected)
    np.testing.assert_array_equal(scoring.read_prediction(tmp_path / "a.png", TASK, (1, 4))[..., 0], expected)
    np.save(tmp_path / "a.npy", np.float64([[np.nan, -2, 1.5, 300]]))
    np.testing.assert_array_equal(folder.read_label(tmp_path / "a.npy", TASK, (1, 4))[..., 0], [[0, 0, 1.5, 0]])


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [
        (np.zeros((1, 2), np.uint8), "has 8 bits per pixel; save disparity as 16-bit PNG in Cityscapes' code"),
        (np.float32([[5000, 9000]]), r"disparities of 5000 to 9000 px, but valid ones are below 256 px; .*as integers"),
    ],
)
def test_what_cannot_be_disparity_is_refused(tmp_path, numbers, fault):
    np.save(tmp_path / "a.npy", numbers)
    with pytest.raises(UserError, match=fault):
        folder.read_label(tmp_path / "a.npy", TASK, (1, 2))


def test_near_is_red_and_the_bar_is_in_pixels():
    near, far = (np.round(np.array(matplotlib.colormaps["turbo"](place)[:3]) * 255).astype(int) for place in (1.0, 0.0))
    drawn = panels.colour(TASK, np.float32([[40, 2]]), limits=(2, 40))
    np.testing.assert_array_equal(drawn[0], [near, far])
    assert bar_labels((0, 8), "px") == ["0.0 px", "2.0 px", "4.0 px", "6.0 px", "8.0 px"]
    figures = TASK.kind.figures(TASK.kind.count(np.float32([[[8], [-1], [2], [200]]])))
    assert figures == pytest.approx(
        {"invalid": 0.25, "least (px)": 2, "median (px)": 8, "greatest (px)": 200}, abs=256 / 8000
    )
