"""The Hugging Face hub: models are pulled and pushed, and every error is one line. The server is on this machine."""

import json
import pathlib
import socket
import sys

from huggingface_hub import constants
import numpy as np
import pytest

import taskexpert_jax
from taskexpert_jax import paths
from taskexpert_jax.config import base
from taskexpert_jax.errors import UserError
from taskexpert_jax.runs import hub, released
from tests.runs import checkpoint_trees, hub_server


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server.running() as found:
        use(monkeypatch, found.url, tmp_path)
        yield found


def use(monkeypatch, url, folder):
    """As if HF_ENDPOINT and HF_HOME, an empty cache, were set before the start."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub._model.cache_clear()


@pytest.fixture
def files(tmp_path):
    """Files of a released folder."""
    config = base("tiny", "scenes")
    variables = {"params": {"a": np.arange(3, dtype=np.float32)}, "batch_stats": {}}
    released.write(tmp_path / "released", variables, config, released.Facts(7, ("depth",), "0.1.0"), "card\n")
    return {path.name: path.read_bytes() for path in (tmp_path / "released").iterdir()}


def pulled(text: str) -> pathlib.Path:
    hub._model.cache_clear()
    return hub.located(pathlib.Path(text))


def error(text: str) -> str:
    with pytest.raises(UserError) as found:
        pulled(text)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_local_path_is_left_alone(tmp_path, monkeypatch):
    assert hub.located(tmp_path / "no such") == tmp_path / "no such"
    monkeypatch.chdir(tmp_path)
    assert hub.located("demo") == pathlib.Path(taskexpert_jax.__path__[0]) / "demo_model"
    (tmp_path / "demo").mkdir()
    assert hub.located(pathlib.Path("demo")) == pathlib.Path("demo")
    for text, reason in (("s3://b/x", "s3:// addresses are not supported"), ("hf://x", "is no address of a model on")):
        with pytest.raises(UserError, match=f"^--workdir={text}: {reason}|^--workdir='{text}': {reason}"):
            hub.located(text)


def test_a_runs_directory_is_pulled_without_its_optimiser_state(server, tmp_path):
    checkpoint_trees.save(tmp_path / "run", [2, 4], {2: 40.0})
    (tmp_path / "run/config.json").write_text(json.dumps(base("tiny", "scenes").to_dict()))
    content = {path.relative_to(tmp_path / "run").as_posix(): path for path in (tmp_path / "run").rglob("*")}
    run = {f"a/{name}": path.read_bytes() for name, path in content.items() if path.is_file()}
    server.revisions["o/n"] = {"main": run}
    folder = pulled("hf://o/n/a")
    assert [path for path in folder.rglob("*") if "train" in path.parts] == []
    with checkpoint_trees.opened(folder, read_only=True) as checkpoints:
        assert checkpoints.select("best") == 2
        expected = checkpoint_trees.state(2).variables()
        assert checkpoint_trees.same(
            checkpoints.restore_variables(2, checkpoint_trees.abstract().variables()), expected
        )
    assert hub.weights("hf://o/n/a", "config.model.pretrained") == folder
    assert released.results_folder(folder, "evaluation", None) == pathlib.Path("evaluation")  # not in the cache

    damaged = next(name for name in run if "/4/params/d/" in name)
    server.revisions["o/n"]["main"] = run | {damaged: run[damaged][:-1]}
    refused = pytest.raises(UserError, match=r"checkpoints/4 is damaged: params/d/.* has \d+ of \d+ bytes")
    with checkpoint_trees.opened(pulled("hf://o/n/a"), read_only=True) as checkpoints, refused:
        checkpoints.restore_variables(4, checkpoint_trees.abstract().variables())


def test_a_model_is_pulled_once_and_verified(server, files):
    server.revisions["o/n"] = {"main": {**files, "other.bin": b"large"}}
    folder = pulled("hf://o/n")
    assert released.is_released(folder) and released.facts(folder).step == 7
    assert {path.name for path in folder.iterdir()} == set(released.NEEDED)
    server.asked.clear()
    assert pulled("hf://o/n") == folder
    assert not [line for line in server.asked if "/resolve/" in line]


def test_revisions_and_subfolders(server, files):
    server.revisions["o/n"] = {"main": {}, "v1": {f"a/b/{name}": of for name, of in files.items()}, "refs/pr/1": files}
    assert released.facts(pulled("hf://o/n@v1/a/b")).step == 7
    assert released.facts(pulled("hf://o/n@refs%2Fpr%2F1")).step == 7
    assert error("hf://o/n").startswith("hf://o/n has no model.safetensors with SHA256SUMS: it is no model that ")
    assert error("hf://o/n@v1").startswith("hf://o/n@v1 has no model.safetensors with SHA256SUMS")
    assert error("hf://o/n@v2") == "hf://o/n@v2: no revision 'v2': give a branch, a tag or a commit of o/n"


def test_without_a_network_the_cache_is_used(server, files, monkeypatch, tmp_path):
    server.revisions["o/n"] = {"main": files}
    folder = pulled("hf://o/n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        use(monkeypatch, f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path)
        assert pulled("hf://o/n") == folder
        assert error("hf://o/other") == (
            "hf://o/other: the server cannot be reached, and the model is not complete in the cache; check the network"
        )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pulled("hf://o/n") == folder
    assert "not complete in the cache" in error("hf://o/other")


def test_every_refusal_is_one_line_with_the_address(server, files):
    server.revisions |= {"o/gated": {"main": files}, "o/broken": {"main": files}, "o/secret": {"main": files}}
    server.gated.add("o/gated")
    server.refusals |= {"/api/models/o/broken/revision/main": 418, "/api/models/o/secret/revision/main": 403}
    assert error("hf://o/none") == (
        "hf://o/none: no such repository, or a private one: check the name; for a private one log in (hf auth login), "
        "or set HF_TOKEN"
    )
    assert error("hf://o/gated").startswith("hf://o/gated: access is restricted: ask for it on the page of o/gated, ")
    assert error("hf://o/broken").startswith("hf://o/broken: the server answered HTTP 418: ")
    assert error("hf://o/secret").startswith("hf://o/secret: not allowed (HTTP 403): log in")
    assert error("hf://o/--n").startswith("hf://o/--n: HFValidationError: ")


def test_a_damaged_or_incomplete_download_is_one_line(server, files):
    server.revisions["o/n"] = {"main": {**files, released.CONFIG: b"{}"}}
    assert error("hf://o/n").startswith("hf://o/n: ") and "config.json is damaged or was changed" in error("hf://o/n")
    del server.revisions["o/n"]["main"][released.CONFIG]
    assert "config.json is missing: the released folder is incomplete" in error("hf://o/n")


def test_without_the_package_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert error("hf://o/n") == 'hf://o/n needs the package huggingface_hub: pip install "taskexpert-jax[hub]"'


def test_weight_files_of_others_are_pulled_for_a_backbone(server):
    server.revisions["o/vit"] = {"main": {"model.safetensors": b"1", "config.json": b"{}", "pytorch_model.bin": b"2"}}
    server.revisions["o/old"] = {"main": {"pytorch_model.bin": b"2", "preprocessor_config.json": b"{}"}}
    server.revisions["o/none"] = {"main": {"tf_model.h5": b"3", "tf/model.npz": b"4"}}
    found = hub.weights("hf://o/vit", "config.model.pretrained")
    assert {path.name for path in found.iterdir()} == {"model.safetensors", "config.json"}
    found = hub.weights("hf://o/old", "config.model.pretrained")
    assert {path.name for path in found.iterdir()} == {"pytorch_model.bin", "preprocessor_config.json"}
    file = hub.weights("hf://o/none/tf/model.npz", "config.model.pretrained")
    assert file.read_bytes() == b"4" and file.name == "model.npz"
    with pytest.raises(UserError, match=r"^config.model.pretrained=hf://o/none/x.pth: the repository has no such file"):
        hub.weights("hf://o/none/x.pth", "config.model.pretrained")
    with pytest.raises(UserError, match=r"^config.model.pretrained=hf://o/none has neither model.safetensors nor "):
        hub.weights("hf://o/none", "config.model.pretrained")


def push(folder, text, public=False):
    return hub.push(folder, paths.address(text, "--output"), public=public, message="step 7")


def is_private(wanted):
    return wanted.get("visibility") == "private" or wanted.get("private") is True  # since version 2, before


def test_a_push_is_one_commit_in_a_private_repository(server, files, tmp_path):
    url = push(tmp_path / "released", "hf://o/new")
    assert url.startswith(f"{server.url}/o/new/commit/")
    (wanted,) = server.created
    assert (wanted["name"], wanted["organization"]) == ("new", "o") and is_private(wanted)
    ((header, uploaded),) = server.commits
    assert header["summary"] == "step 7" and uploaded == files
    assert released.facts(pulled("hf://o/new")).step == 7
    push(tmp_path / "released", "hf://o/open", public=True)
    assert not is_private(server.created[1])


def test_a_push_replaces_only_a_release(server, files, tmp_path):
    others = {"train.py": b"", "README.md": b""}
    server.revisions["o/n"] = {"main": {"README.md": b"", ".gitattributes": b""}}
    push(tmp_path / "released", "hf://o/n")
    push(tmp_path / "released", "hf://o/n")  # an earlier release
    server.revisions["o/n"]["main"] = dict(others)
    with pytest.raises(UserError, match=r"^hf://o/n has other files \(train.py\) and no release to replace: "):
        push(tmp_path / "released", "hf://o/n")
    assert server.revisions["o/n"]["main"] == others
    push(tmp_path / "released", "hf://o/n/models/a")
    assert server.revisions["o/n"]["main"] == others | {f"models/a/{name}": of for name, of in files.items()}
    assert not server.created


def test_a_push_that_is_refused_is_one_line(server, files, tmp_path):
    server.refusals["/api/repos/create"] = 403
    with pytest.raises(
        UserError, match=r"^hf://o/n: not allowed \(HTTP 403\): log in .*, with a token that may do this$"
    ):
        push(tmp_path / "released", "hf://o/n")
    server.revisions["o/n"] = {"main": {}}
    with pytest.raises(UserError, match=r"^hf://o/n@v1: no revision 'v1'"):
        push(tmp_path / "released", "hf://o/n@v1")
    server.refusals["/api/models/o/n/commit/main"] = 413
    with pytest.raises(UserError, match=r"^hf://o/n: the server answered HTTP 413: "):
        push(tmp_path / "released", "hf://o/n")
    assert server.commits == []
