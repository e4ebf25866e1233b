"""Built-in scenes: determinism, labels consistent with the geometry and with each other, and the splits."""

from concurrent import futures
import subprocess
import sys

from ml_collections import ConfigDict
import numpy as np
import pytest

from input_pipeline import scenes
from input_pipeline.scenes import geometry, layout, shading
from taskexpert_jax.errors import UserError

HEIGHT, WIDTH = 96, 128
PERSON = scenes.CLASSES.index("person")
STUFF = [scenes.CLASSES.index(name) for name in ("floor", "wall", "ceiling", "window", "picture", "rug")]
LABELS = ("semseg", "depth", "normals", "edge", "human_parts", "sal")


@pytest.fixture(scope="module")
def sample() -> list[dict]:
    """The first 40 scenes."""
    return [scenes.render(index) for index in range(40)]


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def config(**changed) -> ConfigDict:
    return ConfigDict(
        {"image_size": (24, 32), "seed": 0, "train_scenes": 5, "val_scenes": 3, "variety": "usual"} | changed
    )


def camera_points(index: int, depth: np.ndarray) -> np.ndarray:
    """Camera-frame points (H, W, 3) of scene `index`, from its depth label (H, W, 1)."""
    height, width = depth.shape[:2]
    pixels = layout.compose(index, 0).camera.focal * height  # focal length in pixels
    x = (np.arange(width) + 0.5 - width / 2) / pixels
    y = (np.arange(height) + 0.5 - height / 2) / pixels
    return np.stack(np.broadcast_arrays(x, y[:, None], 1.0), axis=-1) * depth


def world_points(index: int, depth: np.ndarray) -> np.ndarray:
    camera = layout.compose(index, 0).camera
    return camera_points(index, depth) @ camera.rotation + camera.position


# ------------------------------------------------------------------------------------------------------ repeatability


def test_a_scene_depends_on_seed_and_index_alone(sample):
    assert_same(scenes.render(7), sample[7])
    assert_same(scenes.render(33), sample[33])
    with futures.ThreadPoolExecutor(4) as pool:
        for index, scene in enumerate(pool.map(scenes.render, range(8))):
            assert_same(scene, sample[index])


def test_seed_and_index_choose_the_scene(sample):
    assert len({scene["image"].tobytes() for scene in sample}) == len(sample)
    assert len({scene["depth"].tobytes() for scene in sample}) == len(sample)
    assert (scenes.render(7, seed=1)["depth"] != sample[7]["depth"]).any()


def test_size_changes_the_resolution_only(sample):
    """Pixel centres coincide with those of every third pixel of an image of three times the size."""
    large = scenes.render(5, height=3 * HEIGHT, width=3 * WIDTH)
    assert large["image"].shape == (3 * HEIGHT, 3 * WIDTH, 3)
    for name in ("semseg", "human_parts", "sal"):
        assert (large[name][1::3, 1::3] == sample[5][name]).mean() > 0.999, name
    assert (np.abs(large["depth"][1::3, 1::3] - sample[5]["depth"]) < 1e-4).mean() > 0.999


def test_other_shapes_keep_the_height_of_the_view(sample):
    wide = scenes.render(5, height=HEIGHT, width=WIDTH + 40)
    assert (wide["semseg"][:, 20:-20] == sample[5]["semseg"]).mean() > 0.999
    assert scenes.render(5, height=33, width=17)["normals"].shape == (33, 17, 3)


# ------------------------------------------------------------------------------------------------------------- labels


def test_shapes_dtypes_and_values(sample):
    for scene in sample:
        assert {name: scene[name].dtype.name for name in ("image", *LABELS)} == {
            "image": "uint8",
            "semseg": "uint8",
            "depth": "float32",
            "normals": "float16",
            "edge": "uint8",
            "human_parts": "uint8",
            "sal": "uint8",
        }
        assert {name: scene[name].shape for name in ("image", *LABELS)} == {
            name: (HEIGHT, WIDTH, 3 if name in ("image", "normals") else 1) for name in ("image", *LABELS)
        }
        assert scene["semseg"].max() < len(scenes.CLASSES)
        assert scene["human_parts"].max() <= 6
        assert set(np.unique(scene["edge"])) == {0, 1}
        assert set(np.unique(scene["sal"])) == {0, 1}
        assert scene["depth"].min() > 0.5
        assert scene["depth"].max() < 12


def test_everything_occurs_often_enough(sample):
    assert set(np.unique([scene["semseg"] for scene in sample])) == set(range(len(scenes.CLASSES)))
    assert set(np.unique([scene["human_parts"] for scene in sample])) == set(range(7))
    peopled = [scene for scene in sample if (scene["semseg"] == PERSON).any()]
    assert 0.6 < len(peopled) / len(sample) < 0.95
    assert np.mean([len(np.unique(scene["human_parts"])) == 7 for scene in peopled]) > 0.8
    # Depth varies within a scene and across scenes, so a constant prediction is bad.
    assert np.mean([scene["depth"].std() for scene in sample]) > 1
    assert np.std([scene["depth"].mean() for scene in sample]) > 0.25


def test_pictures_are_well_exposed(sample):
    for scene in sample:
        assert 70 < scene["image"].mean() < 190
        assert (scene["image"] == 255).mean() < 0.2


def test_human_parts_are_where_people_are(sample):
    for scene in sample:
        np.testing.assert_array_equal(scene["human_parts"] > 0, scene["semseg"] == PERSON)


def test_saliency_is_the_people_or_else_one_object(sample):
    for scene in sample:
        people = scene["semseg"] == PERSON
        if people.any():
            np.testing.assert_array_equal(scene["sal"], people)
        else:
            (subject,) = np.unique(scene["semseg"][scene["sal"] > 0])
            assert subject not in STUFF


@pytest.mark.parametrize("index", range(2))
def test_edges_are_the_changes_of_class_or_instance(sample, index):
    scene = layout.compose(index, 0)
    pairs = geometry.candidate_pairs(scene.solids, scene.camera, HEIGHT, WIDTH)
    rays = geometry.pixel_rays(scene.camera, HEIGHT, WIDTH)
    instance = scene.instance[geometry.cast(scene.solids, scene.camera, *rays, pairs).solid].reshape(HEIGHT, WIDTH)
    semseg, edge = sample[index]["semseg"][..., 0], sample[index]["edge"][..., 0]
    for row in range(HEIGHT):
        for column in range(WIDTH):
            neighbours = [(row, min(column + 1, WIDTH - 1)), (min(row + 1, HEIGHT - 1), column)]
            changes = any(
                instance[row, column] != instance[at] or semseg[row, column] != semseg[at] for at in neighbours
            )
            assert edge[row, column] == changes


def test_people_are_instances_of_their_own(sample):
    """Two people overlap in some image, with an edge between them inside the class person."""
    inside = 0
    for scene in sample:
        person = scene["semseg"][..., 0] == PERSON
        within = person[:-1, :-1] & person[1:, :-1] & person[:-1, 1:]
        inside += (scene["edge"][:-1, :-1, 0][within] == 1).sum()
    assert inside > 0


# ----------------------------------------------------------------------------------------------------------- geometry


def test_normals_are_unit_vectors_that_face_the_camera(sample):
    for index, scene in enumerate(sample):
        normals = scene["normals"].astype(np.float64)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=2e-3)
        points = camera_points(index, scene["depth"])
        towards = (normals * points).sum(-1) / np.linalg.norm(points, axis=-1)
        assert towards.max() < 2e-3


def test_depth_and_normals_agree(sample):
    """Normals equal cross products of central differences of the points, where the surface is flat and connected."""
    angles = []
    for index, scene in enumerate(sample[:10]):
        points, normals = camera_points(index, scene["depth"]), scene["normals"].astype(np.float64)
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)  # float16 normals are unit vectors to 1e-3 only
        right, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
        measured = np.cross(down, right)  # towards the camera: y is down
        measured /= np.linalg.norm(measured, axis=-1, keepdims=True)
        middle = normals[1:-1, 1:-1]
        around = (normals[1:-1, 2:], normals[1:-1, :-2], normals[2:, 1:-1], normals[:-2, 1:-1])
        flat = np.all([(middle * other).sum(-1) > 0.9995 for other in around], axis=0)
        labels = np.concatenate([scene["semseg"], scene["edge"]], axis=-1)
        one = np.all([labels[1:-1, 1:-1] == other for other in (labels[1:-1, 2:], labels[1:-1, :-2])], axis=(0, -1))
        one &= np.all([labels[1:-1, 1:-1] == other for other in (labels[2:, 1:-1], labels[:-2, 1:-1])], axis=(0, -1))
        one &= labels[1:-1, 1:-1, 1] == 0
        cosine = (measured * middle).sum(-1)[flat & one]
        assert len(cosine) > 0.3 * HEIGHT * WIDTH
        angles.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    assert (np.concatenate(angles) < 1).mean() > 0.995


def test_floor_and_ceiling_are_planes_and_the_room_holds_everything(sample):
    for index, scene in enumerate(sample[:10]):
        points, semseg = world_points(index, scene["depth"]), scene["semseg"][..., 0]
        room = layout.compose(index, 0).look.room
        np.testing.assert_allclose(points[semseg == scenes.CLASSES.index("floor")][:, 1], 0, atol=1e-4)
        np.testing.assert_allclose(points[semseg == scenes.CLASSES.index("ceiling")][:, 1], room[1], atol=1e-4)
        np.testing.assert_allclose(points[semseg == scenes.CLASSES.index("rug")][:, 1], 0.001, atol=0.0011)
        assert points.min() > -1e-4
        assert (points < room + 1e-4).all()


def test_people_stand_on_the_floor():
    """The lowest point of every person, of the shoes, is on the floor."""
    for index in range(12):
        scene = layout.compose(index, 0)
        solids = scene.solids
        for person in np.unique(scene.instance[scene.semantic == PERSON]):
            mine = np.flatnonzero((scene.instance == person) & (solids.kind == geometry.CAPSULE))
            reach = np.abs(solids.unit[mine, 1, 1]) * solids.stretch[mine] * solids.semi[mine, 1] + solids.semi[mine, 1]
            lowest = (solids.centre[mine, 1] - reach).min()
            assert abs(lowest) < 0.01


DISTANCE = {  # signed distance functions of the unit shapes, up to a positive factor
    geometry.BOX: lambda p, h: np.abs(p).max(-1) - 1,
    geometry.BALL: lambda p, h: np.linalg.norm(p, axis=-1) - 1,
    geometry.CYLINDER: lambda p, h: np.maximum(np.hypot(p[..., 0], p[..., 2]), np.abs(p[..., 1])) - 1,
    geometry.CAPSULE: lambda p, h: np.linalg.norm(p - np.clip(p, -h, h) * [0, 1, 0], axis=-1) - 1,
}


@pytest.mark.parametrize("kind", DISTANCE)
def test_ray_caster_against_marching(kind):
    """Hits lie on the shape and are the first ones, rays without hit stay outside, and normals are gradients."""
    rng = np.random.default_rng(kind)
    camera = geometry.make_camera((0.3, 1.0, -0.2), (0.1, -0.1, 1.0), 0.9, 0.05)
    size = 24
    rays = geometry.pixel_rays(camera, size, size)
    directions = np.stack([*rays, np.ones(size * size)], axis=-1) @ camera.rotation.astype(np.float64)
    for _ in range(6):
        bottom = rng.uniform((-0.6, 0.2, 1.8), (0.6, 1.0, 2.6))
        top = bottom + rng.uniform(-0.7, 0.7, 3)
        walls = [geometry.WALLS] * geometry.ROOM_FACES
        solids, _ = geometry.make_solids(
            np.array([*walls, kind]),
            np.array([(0, -5, 0)] * 6 + [bottom]),
            np.array([(0, 5, 0)] * 6 + [top]),
            np.array([(5, 5)] * 6 + [tuple(rng.uniform(0.2, 0.5, 2))]),
            np.zeros((7, 3)),
            np.array([0.0] * 6 + [rng.uniform(0, 0.3)]),
        )
        hits = geometry.cast(solids, camera, *rays, geometry.candidate_pairs(solids, camera, size, size))
        seen = geometry.surface(solids, camera, *rays, hits)
        hit = hits.solid == 6
        assert 5 < hit.sum() < size * size

        def distance(t, solids=solids):
            """Signed distance (N, ...) of the points at ray parameters t (N, ...)."""
            point = camera.position + t[..., None] * directions.reshape(-1, *[1] * (t.ndim - 1), 3)
            local = (point - solids.centre[6]) @ solids.unit[6].T / solids.semi[6]
            return DISTANCE[kind](local, solids.stretch[6])

        end = np.where(hit, hits.depth, 5)
        np.testing.assert_allclose(distance(end)[hit], 0, atol=1e-4)
        before = distance(end[:, None] * np.linspace(0, 0.9999, 800))
        assert before.min() > -2e-3
        normal = seen.normal.T[hit].astype(np.float64)
        point = seen.point.T[hit].astype(np.float64)
        slopes = []
        for step in np.eye(3) * 1e-4:
            ahead, behind = (
                DISTANCE[kind](
                    (point + s * step - solids.centre[6]) @ solids.unit[6].T / solids.semi[6], solids.stretch[6]
                )
                for s in (1, -1)
            )
            slopes.append(ahead - behind)
        gradient = np.stack(slopes, axis=-1)
        gradient /= np.linalg.norm(gradient, axis=-1, keepdims=True)
        assert ((gradient * normal).sum(-1) > 0.999).mean() > 0.98  # differences across a rim are not gradients


def every_pair(solids: geometry.Solids, rays: int) -> geometry.Pairs:
    count = np.full(len(solids.kind), rays)
    count[: geometry.ROOM_FACES] = 0
    return geometry.Pairs(np.tile(np.arange(rays, dtype=np.int32), len(solids.kind) - geometry.ROOM_FACES), count)


@pytest.mark.parametrize("index", range(3))
def test_bounding_rectangles_lose_nothing(index):
    scene = layout.compose(index, 0)
    for camera in (scene.camera, scene.look.light):
        rays = geometry.pixel_rays(camera, 48, 64)
        few = geometry.candidate_pairs(scene.solids, camera, 48, 64)
        fast = geometry.cast(scene.solids, camera, *rays, few)
        slow = geometry.cast(scene.solids, camera, *rays, every_pair(scene.solids, 48 * 64))
        np.testing.assert_array_equal(fast.depth, slow.depth)
        assert len(few.ray) < 0.2 * len(scene.solids.kind) * 48 * 64


def test_shadows_fall_where_the_light_is_blocked():
    """Compares the blurred shadow map with one ray from the light to each visible point."""
    for index in range(3):
        scene = layout.compose(index, 0)
        rays = geometry.pixel_rays(scene.camera, 48, 64)
        pairs = geometry.candidate_pairs(scene.solids, scene.camera, 48, 64)
        hits = geometry.cast(scene.solids, scene.camera, *rays, pairs)
        seen = geometry.surface(scene.solids, scene.camera, *rays, hits)
        light = scene.look.light
        x, y, z = light.rotation @ (seen.point + 0.04 * seen.normal - light.position[:, None])
        in_map = (z > 0.5) & (np.maximum(abs(x), abs(y)) < 0.98 * z / (2 * light.focal))
        in_map &= ((light.position[:, None] - seen.point) * seen.normal).sum(0) > 0.1
        blocked = (
            geometry.cast(scene.solids, light, x / z, y / z, every_pair(scene.solids, 48 * 64), room=False).depth
            < z - 0.04
        )
        visible = shading.visibility(light, shading.shadow_map(scene.solids, light), seen)
        assert visible.min() >= 0
        assert visible.max() <= 1 + 1e-5
        assert ((visible > 0.5) == ~blocked)[in_map].mean() > 0.95
        assert visible[in_map & blocked].mean() < 0.3 < 0.85 < visible[in_map & ~blocked].mean()


# ------------------------------------------------------------------------------------------------------------- source


def load_all(split: str, **changed) -> list[dict]:
    opened = scenes.source(config(**changed), split)
    return [opened.load(index) for index in range(len(opened))]


def test_source_gives_rendered_scenes():
    for example in load_all("train", seed=3):
        index = int(example["id"].split("_")[-1])
        assert_same(example, scenes.render(index, seed=3, height=24, width=32))


def test_source_names_its_labels():
    opened = scenes.source(config(), "val")
    assert set(opened.labels) == set(LABELS)
    assert set(opened.load(0)) == {"image", "id", *LABELS}


def test_splits_never_coincide():
    train = [example["depth"].tobytes() for example in load_all("train", train_scenes=12)]
    val = [example["depth"].tobytes() for example in load_all("val", val_scenes=12)]
    assert len(set(train + val)) == 24


def test_every_field_of_the_config_is_read():
    assert len(scenes.source(config(train_scenes=9), "train")) == 9
    assert len(scenes.source(config(val_scenes=8), "val")) == 8
    assert load_all("val", image_size=(16, 20), val_scenes=1)[0]["image"].shape == (16, 20, 3)
    first, other = (load_all("train", seed=seed, train_scenes=1)[0]["depth"] for seed in (0, 1))
    assert (first != other).any()


def test_an_unknown_split_gets_one_clear_line():
    with pytest.raises(UserError, match="no split 'test'; choose train or val"):
        scenes.source(config(), "test")


def test_drawing_needs_no_tensorflow():
    program = (
        "import sys, input_pipeline.scenes as s; s.render(0, height=8, width=8); print('tensorflow' in sys.modules)"
    )
    root = layout.__file__.rsplit("/", 3)[0]
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert printed.stdout.strip() == "False"
