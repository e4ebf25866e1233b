"""Training initialised with the backbone of another run, with other taps, tasks and image size."""

import shutil

import jax
import numpy as np
import pytest

from configs import demo
from taskexpert_jax import release, train
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.backbones import position_embedding
from taskexpert_jax.parallel.preemption import Stopped
from taskexpert_jax.pretrained import load as pretrained
from taskexpert_jax.tasks import from_config


def demo_config(**fields):
    config = demo.get_config("tiny")
    config.tasks, config.checkpoint.best_task = ("semseg", "depth"), "depth"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 4, 2
    config.update_from_flattened_dict(fields)
    return config


def stop(*_):
    raise Stopped


def begun(config, at):
    """Initial state of a run, saved at step 0: the run is stopped when it requests its first batch."""
    return train.train(config, at, stop, stop)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Directory of a small run of the demo, and its backbone's arrays, blocks stacked."""
    at = tmp_path_factory.mktemp("finished") / "run"
    config = demo_config()
    return at, backbone_of(begun(config, at).params)


def backbone_of(params):
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(params))[0]
    named = {"/".join(entry.key for entry in path): leaf for path, leaf in flat}
    return {name: leaf for name, leaf in named.items() if name.startswith(("blocks/", "patches/"))}


def test_training_begins_with_the_backbone_of_a_run_of_other_taps_tasks_and_size(finished, tmp_path, capsys):
    source, expected = finished
    config = demo_config(**{"model.pretrained": str(source), "model.taps": 2, "optimizer.ema_decay": 0.9})
    config.dataset.image_size, config.tasks = (48, 48), ("depth",)
    state = begun(config, tmp_path / "run")
    expected = {**expected, "patches/pos_embedding": np.asarray(
        position_embedding.resize(jax.numpy.asarray(expected["patches/pos_embedding"]), (6, 6)))}  # fmt: skip
    for params in (state.params, state.ema):
        found = backbone_of(params)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)
    assert "tensor" in str(state.params["blocks"]["attention"]["qkv_kernel"].sharding.spec)
    printed = capsys.readouterr().err
    assert f"loaded 15 of 15 tensors of {source} (a run of this project at step 0) into the backbone " in printed
    assert "(pos_embedding 4x6 -> 6x6; unused: head_depth/*, head_semseg/*, initial_memory, mixture/*)" in printed
    assert "std (0.229, 0.224, 0.225) (config.json), 32x48; this run: mean" in printed


def test_a_resumed_run_does_not_read_the_weights_again(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "source")
    config = demo_config(**{"model.pretrained": str(tmp_path / "source")})
    first = begun(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "source")
    capsys.readouterr()
    again = begun(config, tmp_path / "run")
    assert "loaded" not in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)


def test_weights_that_do_not_fit_leave_no_workdir_behind(finished, tmp_path):
    config = demo_config(**{"model.pretrained": str(finished[0]), "model.width": 64})
    with pytest.raises(UserError, match=r"! blocks/attention/out/bias: \(4, 32\) .*\(4, 64\)"):
        begun(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def published(finished, tmp_path_factory):
    """Released folder of the finished run."""
    folder = tmp_path_factory.mktemp("published") / "model"
    release.release(finished[0], folder)
    return folder


@pytest.mark.parametrize("of", ["folder", "file", "hub"])
def test_training_begins_with_the_backbone_of_a_released_model(finished, published, monkeypatch, of):
    where = {"folder": published, "file": published / "model.safetensors", "hub": "hf://o/n"}[of]
    if of == "hub":
        monkeypatch.setattr(pretrained.hub, "weights", lambda address, field: {"hf://o/n": published}[address])
    config = demo_config(**{"model.pretrained": str(where), "model.taps": 2})
    model = taskexpert.from_config(config, from_config(config))
    weights = pretrained.read(config, model)
    assert weights is not None and weights.arrays.keys() == finished[1].keys()
    for name, array in finished[1].items():
        np.testing.assert_array_equal(weights.arrays[name], array, err_msg=name)
    assert f"loaded 15 of 15 tensors of {published} (a released model at step 0) into the backbone" in weights.report
    assert "(config.json), 32x48; this run: mean" in weights.report


def test_a_damaged_release_is_no_backbone(published, tmp_path):
    shutil.copytree(published, tmp_path / "model")
    (tmp_path / "model/SHA256SUMS").unlink()
    config = demo_config(**{"model.pretrained": str(tmp_path / "model")})
    model = taskexpert.from_config(config, from_config(config))
    with pytest.raises(UserError, match=r"model/SHA256SUMS is missing: the released folder is incomplete"):
        pretrained.read(config, model)
    (tmp_path / "model/SHA256SUMS").write_text("0" * 64 + "  model.safetensors\n" + "0" * 64 + "  config.json\n")
    with pytest.raises(UserError, match=r"model/model.safetensors is damaged or was changed"):
        pretrained.read(config, model)
