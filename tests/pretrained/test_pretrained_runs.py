"""Training initialised with the backbone of another run, with other taps, tasks and image size."""

import shutil

import jax
import numpy as np
import pytest

from configs import demo
from taskexpert_jax import train
from taskexpert_jax.errors import UserError
from taskexpert_jax.models.backbones import position_embedding
from taskexpert_jax.parallel.preemption import Stopped


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
