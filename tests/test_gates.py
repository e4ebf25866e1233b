"""Output of a gate inspection, compared with the model's gates and with NumPy definitions."""

import base64
import contextlib
import dataclasses
from html.parser import HTMLParser
import io
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from configs import demo
from taskexpert_jax import gates as inspect
from taskexpert_jax.config import IMAGENET, read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import gate_findings, gate_statistics
from taskexpert_jax.evaluation.gate_findings import Inspection
from taskexpert_jax.evaluation.gate_statistics import GateSummary
from taskexpert_jax.models import inputs
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.report import gate_maps, gates_page
from taskexpert_jax.tasks import from_config
from tests import random_runs

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {"full": (32, 48), "padded <1>": (20, 38)}  # image sizes; the frame is 32x48, a token 8x8


def tiny():
    config = demo.get_config("tiny")
    config.tasks = ("semseg", "depth")
    config.model.experts = 2
    config.model.gate.temperature = 0.05  # random gates that differ between tokens
    return config


def save_random(config, workdir):
    """The model, and the random parameters that are saved as the workdir's checkpoint."""
    state = random_runs.save(config, workdir, scale=0.3)
    model = taskexpert.from_config(config, from_config(config))
    return model, jax.device_get({"params": state.params, "batch_stats": state.batch_stats})


@dataclasses.dataclass
class Run:
    workdir: pathlib.Path
    output: pathlib.Path
    found: Inspection
    printed: str
    frames: np.ndarray  # (images, 32, 48, 3)
    windows: np.ndarray  # (images, 4)
    gates: np.ndarray  # (S, T, images, N, choices): the model's own


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An inspection of random parameters on two images."""
    base = tmp_path_factory.mktemp("inspect")
    model, variables = save_random(tiny(), base / "run")
    (base / "images").mkdir()
    random = np.random.default_rng(0)
    frames, windows = np.zeros((2, 32, 48, 3), np.uint8), []
    for index, (name, (rows, columns)) in enumerate(SIZES.items()):
        image = random.integers(0, 256, (rows, columns, 3), np.uint8)
        Image.fromarray(image).save(base / "images" / f"{name}.png")
        top, left = (32 - rows) // 2, (48 - columns) // 2
        frames[index, top : top + rows, left : left + columns] = image
        windows.append((top, left, rows, columns))
    windows = np.array(windows, np.int32)
    apply = jax.jit(
        lambda v, i, w: model.apply(v, inputs.normalise(i, w, IMAGENET), train=False, return_aux=True)[1]["gates"]
    )
    gates = np.asarray(apply(variables, frames, windows))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        config = read_run(base / "run")
        found = inspect.inspect(config, base / "run", "best", base / "images", base / "out")
    return Run(base / "run", base / "out", found, printed.getvalue(), frames, windows, gates)


def over_pixels(run, index):
    """The weights of an image at each of its pixels, (S, T, rows, columns, slots)."""
    top, left, rows, columns = run.windows[index]
    grid = run.gates[:, :, index].reshape(*run.gates.shape[:2], 4, 6, -1)
    whole = np.kron(grid, np.ones((1, 1, 8, 8, 1), np.float32))
    return whole[:, :, top : top + rows, left : left + columns]


def test_the_arrays_are_the_models_gates(run):
    for index, name in enumerate(SIZES):
        with np.load(run.output / "images" / name / "gates.npz") as saved:
            assert saved["gates"].shape == (4, 2, 4, 6, 3) and saved["gates"].dtype == np.float32
            np.testing.assert_allclose(saved["gates"].reshape(4, 2, 24, 3), run.gates[:, :, index], atol=1e-5)
            assert saved["tasks"].tolist() == ["semseg", "depth"]
            assert saved["choices"].tolist() == ["expert 1", "expert 2", "memory"]
            np.testing.assert_array_equal(saved["window"], run.windows[index])
            assert saved["patch_size"] == 8
    assert np.ptp(run.gates, axis=3).max() > 0.1  # otherwise the comparison would prove little


def test_padding_is_cut_off_to_the_pixel(run):
    for index, (name, size) in enumerate(SIZES.items()):
        grid = np.moveaxis(run.gates[:, :, index].reshape(4, 2, 4, 6, 3), (2, 3), (0, 1))
        found = gate_statistics.at_pixels(grid, run.windows[index], 8)
        np.testing.assert_array_equal(np.moveaxis(found, (0, 1), (2, 3)), over_pixels(run, index))
        with Image.open(run.output / "images" / name / "picture.png") as picture:
            top, left, rows, columns = run.windows[index]
            assert (rows, columns) == size
            np.testing.assert_array_equal(picture, run.frames[index, top : top + rows, left : left + columns])


def test_the_means_are_those_over_the_pixels_of_all_images(run):
    content = json.loads((run.output / "inspection.json").read_text())
    pixels = [over_pixels(run, i).astype(np.float64).reshape(4, 2, -1, 3) for i in range(2)]
    for expected, means in (
        (np.concatenate(pixels, axis=2), content["gates"]["tasks"]),
        *zip(pixels, content["images"].values(), strict=True),
    ):
        entropy = -(expected * np.log(np.maximum(expected, 1e-30))).sum(axis=-1).mean(axis=2) / np.log(3)
        mean = expected.mean(axis=2)
        spread = -(mean * np.log(mean)).sum(axis=-1) / np.log(3) - entropy
        for t, name in enumerate(("semseg", "depth")):
            np.testing.assert_allclose(means[name]["weights"], mean[:, t], atol=1e-5)
            np.testing.assert_allclose(means[name]["entropy"], entropy[:, t], atol=1e-5)
            np.testing.assert_allclose(means[name]["variation"], spread[:, t], atol=1e-5)
    assert content["images"].keys() == SIZES.keys() and content["gates"]["choices"][-1] == "memory"
    row = next(line for line in run.printed.splitlines() if line.startswith("depth"))
    memory = " ".join(f"{weights[-1]:4.2f}" for weights in content["gates"]["tasks"]["depth"]["weights"])
    assert row.split("  ")[-3].strip() == memory


class Page(HTMLParser):
    """A page's elements and texts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_every_map_and_needs_nothing_but_itself(run):
    text = (run.output / "inspection.html").read_text()
    page = Page(text)
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", text, re.IGNORECASE)
    shown = {attrs["title"]: attrs["src"] for tag, attrs in page.elements if tag == "img" and "title" in attrs}
    assert all(uri.startswith("data:image/") for uri in shown.values())
    for index, name in enumerate(SIZES):
        weights = over_pixels(run, index)
        for t, task in enumerate(("semantic segmentation", "depth")):
            for tap in range(4):
                for k, choice in enumerate(("expert 1", "expert 2", "memory")):
                    mean = run.found.images[name].weights[t, tap, k]
                    uri = shown[f"{task}, tap {tap + 1}, {choice}: mean weight {mean:.4f} over {name}"]
                    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
                        colours = np.asarray(picture.convert("RGB"))
                    index = np.rint(255 * weights[tap, t, ..., k]).astype(int)
                    # Neighbouring colours differ by at most 7, so that an index may be off by one by float32 rounding.
                    np.testing.assert_allclose(gate_maps.weight_colours()[index], colours, atol=7)
    cells = {attrs.get("title", "") for tag, attrs in page.elements if tag == "td"}
    for task, taps in zip(("semantic segmentation", "depth"), run.found.gates.weights, strict=True):
        for tap, weights in enumerate(taps.tolist(), start=1):
            for choice, weight in zip(("expert 1", "expert 2", "memory"), weights, strict=True):
                assert f"{task}, tap {tap}, {choice}: {weight:.4f}; even weights: 0.3333" in cells
    assert "<1>" not in text and "padded <1>" in page.text


def test_the_winner_is_the_choice_with_the_largest_weight(run):
    page = Page((run.output / "inspection.html").read_text())
    winners = over_pixels(run, 1)[2, 1].argmax(axis=-1)  # depth at tap 3
    shares = [f"{choice} {(winners == k).mean():.0%}" for k, choice in enumerate(run.found.gates.slots)]
    listed = [attrs["title"] for tag, attrs in page.elements if tag == "img" and "largest weight" in str(attrs)]
    (depth,) = [title for title in listed[len(listed) // 2 :] if title.startswith("depth, tap 3")]
    assert (
        depth == f"depth, tap 3, largest weight: {', '.join(s for s in shares if not s.endswith(' 0%'))} of the pixels"
    )
    colours = gate_maps.choice_colours(run.found.gates.slots)
    assert len(np.unique(colours, axis=0)) == 3


def test_sheets_and_heat_map_are_pictures(run):
    for name in SIZES:
        assert {path.name for path in (run.output / "images" / name).iterdir()} == {
            *("picture.png", "gates.npz", "winners.png", "semseg.png", "depth.png")
        }
        with Image.open(run.output / "images" / name / "depth.png") as sheet:
            yellow = gate_maps.weight_colours()[-1]  # the end of the colour bar
            assert (np.abs(np.asarray(sheet)[..., :3].astype(int) - yellow) < 8).all(axis=-1).any()
    assert (run.output / "mean_weights.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(run.output / "mean_weights.png") as heat_map:
        pixels = np.asarray(heat_map)[..., :3].reshape(-1, 3)
    found = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    for weight in run.found.gates.weights.ravel():
        assert tuple(gate_maps.weight_colours()[round(255 * weight)].tolist()) in found


def test_wrong_input_is_refused_and_good_images_are_still_inspected(run, tmp_path):
    config = read_run(run.workdir)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"not a picture")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="1 of 1 images not inspected"):
        inspect.inspect(config, run.workdir, "best", tmp_path / "images", out)
    assert not (out / "inspection.html").exists()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images" / "b.png")
    with pytest.raises(UserError, match="1 of 2 images not inspected"):
        inspect.inspect(config, run.workdir, "latest", tmp_path / "images", out)
    assert (out / "inspection.html").exists() and (out / "images" / "b" / "gates.npz").exists()
    with pytest.raises(UserError, match=r"\bnone\b"):
        inspect.inspect(config, run.workdir, "best", tmp_path / "none", out)
    with pytest.raises(UserError, match=r"--checkpoint=9\b.*\[0\]"):
        inspect.inspect(config, run.workdir, "9", tmp_path / "images", out)
    with pytest.raises(UserError, match=str(tmp_path)):
        inspect.inspect(config, tmp_path, "best", tmp_path / "images", out)
    with pytest.raises(UserError, match=r"b\.png.*--output"):
        inspect.inspect(config, run.workdir, "best", tmp_path / "images", tmp_path / "images" / "b.png")


def test_the_program_needs_no_tensorflow_and_ends_in_a_line(tmp_path):
    code = "import sys; sys.modules['tensorflow'] = None; from taskexpert_jax import gates; gates.main()"
    flags = [f"--workdir={tmp_path}", "--images=x"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/config.json is missing; ") and done.stderr.count("\n") == 1


CHOICES = ("expert 1", "expert 2", "expert 3", "memory")


def inspection(run, weights, entropy, *, granularity="token", images=2, choices=CHOICES):
    """An inspection with the given mean weights (T, S, slots) and entropies (T, S), broadcast to these shapes."""
    weights = np.broadcast_to(np.asarray(weights, float), (2, 4, len(choices)))
    gates = GateSummary(choices, weights, np.broadcast_to(np.asarray(entropy, float), (2, 4)))
    model = run.found.facts["model"]
    facts = {**run.found.facts, "model": {**model, "gate": {**model["gate"], "granularity": granularity}}}
    return Inspection(run.found.tasks, facts, gates, {f"image {i}": gates for i in range(images)})


def test_variation_is_0_where_all_pixels_agree_and_1_where_each_has_its_own_choice(run):
    same = [0.5, 0.25, 0.125, 0.125]
    entropy = 1.75 * np.log(2) / np.log(4)
    np.testing.assert_allclose(gate_findings.variation(inspection(run, same, entropy).gates), 0, atol=1e-12)
    np.testing.assert_allclose(gate_findings.variation(inspection(run, 0.25, 0.0).gates), 1)


def test_suspicious_gates_are_named_with_their_threshold(run):
    assert gate_findings.warnings(inspection(run, [0.4, 0.2, 0.2, 0.2], 0.5)) == []
    (uniform,) = gate_findings.warnings(inspection(run, 0.25, 0.995))
    assert "uniform" in uniform and "0.99" in uniform and uniform.endswith(": everywhere")
    weights, entropy = np.full((2, 4, 4), 0.25), np.full((2, 4), 0.5)
    weights[1, [1, 3]] = [0.01, 0.01, 0.02, 0.96]
    entropy[1, [1, 3]] = 0.1
    weights[0, 0], entropy[0, 0] = [0.5, 0.25, 0.125, 0.125], 1.75 / 2
    collapsed, same = gate_findings.warnings(inspection(run, weights, entropy))
    assert "collapsed" in collapsed and "0.95" in collapsed and collapsed.endswith(": depth at taps 2, 4")
    assert "0.001" in same and same.endswith(": semantic segmentation at tap 1")
    weights = np.full((2, 4, 4), 0.25)
    weights[:, 2] = [0.5, 0.009, 0.25, 0.241]
    (unused,) = gate_findings.warnings(inspection(run, weights, 0.5))
    assert unused == "not used by any task (mean weight below 0.01): expert 2 at tap 3"


def test_what_the_config_makes_so_is_said_and_no_warning(run):
    uniform = inspection(run, 0.25, 1.0, granularity="uniform")
    static = inspection(run, [0.5, 0.25, 0.125, 0.125], 1.75 / 2, granularity="static")
    image = inspection(run, [0.5, 0.25, 0.125, 0.125], 1.75 / 2, granularity="image", images=1)
    single = inspection(run, 1.0, np.nan, choices=("expert 1",))
    fields = ((uniform, "=uniform"), (static, "granularity=static"), (image, "granularity=image"), (single, "single"))
    for found, words in fields:
        assert gate_findings.warnings(found) == []
        note = gate_findings.by_design(found)
        assert words in note and note in Page(gates_page.html(found, [], "images")).text
    assert (
        "2 of 2 images are not shown here; their maps are in images/."
        in Page(gates_page.html(static, [], "images")).text
    )
    several = inspection(run, [0.5, 0.25, 0.125, 0.125], 1.75 / 2, granularity="image")
    assert "same at every pixel" in gate_findings.warnings(several)[0]
    assert "-" in gate_findings.lines(single)[1] and json.dumps(gate_findings.to_json(single), allow_nan=False)


def test_one_expert_at_one_tap_without_memory(tmp_path, capsys):
    """The smallest inspection: a single weight, which is 1."""
    config = tiny()
    config.tasks = ("semseg",)
    config.model.experts = config.model.taps = config.model.depth = 1
    config.model.memory.read = "none"
    config.model.gate.granularity = "static"
    save_random(config, tmp_path / "run")
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    found = inspect.inspect(config, tmp_path / "run", "latest", tmp_path / "red.png", tmp_path / "out")
    assert found.gates.slots == ("expert 1",) and found.gates.weights.tolist() == [[[1.0]]]
    assert json.loads((tmp_path / "out" / "inspection.json").read_text())["gates"]["tasks"]["semseg"]["entropy"] == [
        None
    ]
    page = Page((tmp_path / "out" / "inspection.html").read_text())
    assert gate_findings.by_design(found) in page.text and "Weight of the memory, all tasks" not in page.text
    assert "memory" not in capsys.readouterr().out.replace("without memory", "")


@pytest.mark.parametrize("granularity", ["static", "uniform"])
def test_static_gates_have_maps_of_one_colour(granularity):
    gates = jnp.broadcast_to(jnp.array([0.25, 0.75]), (1, 1, 4, 6, 2))
    weights = gate_statistics.at_pixels(np.asarray(gates[0, 0]), np.array([3, 2, 20, 31]), 8)
    assert weights.shape == (20, 31, 2) and np.ptp(weights, axis=(0, 1)).max() == 0


def test_experts_beyond_the_pale_colours_still_differ():
    for count in (1, 11, 12, 30):
        colours = gate_maps.choice_colours([*(f"expert {k + 1}" for k in range(count)), "memory"])
        assert len(np.unique(colours, axis=0)) == count + 1
