"""Conditions of the wide scenes: usual scenes stay as they are, each condition changes what it names, parts of val."""

from collections import Counter

from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import demo
from input_pipeline import pipeline, scenes
from input_pipeline.scenes import conditions, layout
from taskexpert_jax.errors import UserError

SIZE = {"height": 48, "width": 64}


@pytest.fixture(scope="module")
def sample():
    """Number, example and number of objects of 48 wide scenes."""
    found = []
    for number in range(48):
        objects = len(np.unique(layout.compose(number, 0, "wide").instance)) - 3  # without floor, walls and ceiling
        found.append((number, scenes.render(number, variety="wide", **SIZE), objects))
    return found


def of(sample, name):
    return [item for item in sample if name in scenes.condition(item[0])]


@pytest.mark.parametrize(
    ("index", "seed", "image", "depth", "semseg", "edge"),
    [
        (0, 0, 149.295, 4.1744, 10055, 426),
        (1, 1, 139.89, 4.4591, 11101, 532),
        (2, 0, 122.392, 4.0767, 15639, 527),
        (7, 1, 140.96, 4.3025, 12228, 553),
    ],
)
def test_usual_scenes_stay_as_they_are(index, seed, image, depth, semseg, edge):
    """Values of the scenes before they had conditions; a draw more or less would change all of them."""
    scene = scenes.render(index, seed=seed, **SIZE)
    assert scene["image"].mean() == pytest.approx(image, abs=0.05)
    assert scene["depth"].mean() == pytest.approx(depth, abs=1e-3)
    assert scene["semseg"].sum() == pytest.approx(semseg, abs=30)
    assert scene["edge"].sum() == pytest.approx(edge, abs=3)
    assert scene["id"] == f"scene_{seed}_{index:06d}"


def test_conditions_are_fair_independent_draws():
    counts = Counter(scenes.condition(number, 5) for number in range(800))
    assert len(counts) == 8
    assert all(70 <= count <= 130 for count in counts.values()), counts  # 100 expected, standard deviation 9.4
    families = [[scenes.condition(number, seed) for number in range(20)] for seed in (5, 6)]
    assert families[0] != families[1]


def test_dark_scenes_are_dark_and_noisier(sample):
    light, dark = ([example["image"] for _, example, _ in of(sample, name)] for name in conditions.LIGHTS)
    assert max(image.mean() for image in dark) < min(image.mean() for image in light)
    assert all(30 < image.mean() < 85 for image in dark)  # a human can still read them

    def roughness(images):
        return np.median([np.abs(np.diff(image.astype(float), 2, axis=1)).mean() / image.mean() for image in images])

    assert roughness(dark) > 1.5 * roughness(light)


def test_near_scenes_are_near_and_far_ones_are_far(sample):
    near, far = ([np.median(example["depth"]) for _, example, _ in of(sample, name)] for name in conditions.VIEWS)
    assert max(near) < 3.2 and np.mean(far) > 1.6 * np.mean(near)


def test_cluttered_scenes_have_more_objects_than_empty_ones(sample):
    empty, cluttered = (np.mean([objects for _, _, objects in of(sample, name)]) for name in conditions.CLUTTERS)
    usual = np.mean([len(np.unique(layout.compose(number, 0).instance)) - 3 for number in range(20)])
    assert cluttered > 2 * empty and empty < 0.6 * usual
    far = [objects for number, _, objects in of(sample, "cluttered") if scenes.condition(number).view == "far"]
    assert np.mean(far) > 1.3 * usual  # a near camera leaves room for fewer


def test_each_condition_changes_its_own_ranges_alone():
    changed = {}
    for name in conditions.NAMES:
        fields = conditions._CHANGES[name]
        group = next(group for group in (conditions.LIGHTS, conditions.VIEWS, conditions.CLUTTERS) if name in group)
        changed.setdefault(group, set()).update(fields)
    groups = list(changed.values())
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_labels_of_wide_scenes_agree_with_each_other(sample):
    person = scenes.CLASSES.index("person")
    for _, example, _ in sample:
        np.testing.assert_array_equal(example["human_parts"] > 0, example["semseg"] == person)
        np.testing.assert_allclose(np.linalg.norm(example["normals"].astype(float), axis=-1), 1, atol=2e-3)
        assert example["depth"].min() > 0.4 and example["depth"].max() < 18


# --------------------------------------------------------------------------------------------------- source and config


def config(**changed) -> ConfigDict:
    dataset = demo.get_config("tiny").dataset
    dataset.update({"val_scenes": 40, "variety": "wide"} | changed)
    return dataset


def numbers(split, **changed):
    return list(scenes.source(config(**changed), split).numbers)


def test_parts_of_val_partition_it():
    val = numbers("val")
    assert val == numbers("val", variety="usual") == list(range(1, 80, 2))
    for pair in (conditions.LIGHTS, conditions.VIEWS, conditions.CLUTTERS):
        one, other = (numbers(f"val_{name}") for name in pair)
        assert sorted(one + other) == val and min(len(one), len(other)) > 8
        assert all(pair[0] in scenes.condition(number, 0) for number in one)
    assert numbers("val_dark", seed=3) != numbers("val_dark")


def test_a_part_holds_rendered_scenes_of_its_condition():
    example = scenes.source(config(), "val_far").load(2)
    number = numbers("val_far")[2]
    expected = scenes.render(number, variety="wide", height=32, width=48)
    assert example["id"] == expected["id"] == f"wide_0_{number:06d}"
    np.testing.assert_array_equal(example["image"], expected["image"])


def test_the_fingerprint_tells_wide_from_usual():
    recorded = {}
    for variety in ("usual", "wide"):
        run = demo.get_config("tiny")
        run.dataset.variety = variety
        pipeline.record_fingerprint(run)
        recorded[variety] = run.dataset.fingerprint
    assert recorded == {"usual": "scenes-1", "wide": "scenes-wide-1"}


def test_parts_that_do_not_exist_get_one_clear_line():
    with pytest.raises(UserError, match=r"'val_dark' is of wide scenes alone; set --config.dataset.variety=wide"):
        numbers("val_dark", variety="usual")
    with pytest.raises(UserError, match=r"no split 'test'; choose train or val; or a part of val: val_light, val_dark"):
        numbers("test")
    there = scenes.condition(1, 0).light
    with pytest.raises(UserError, match=r"no scene of 'val_\w+' among 1 of val; raise --config.dataset.val_scenes"):
        numbers({"light": "val_dark", "dark": "val_light"}[there], val_scenes=1)


def test_the_program_writes_wide_scenes(tmp_path, capsys):
    assert scenes.main([f"--output={tmp_path}", "--count=1", "--variety=wide", "--size", "16", "24"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["wide_0_1000000.png"]
