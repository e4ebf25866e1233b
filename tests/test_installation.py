"""Bundled configs, import path, version and commit of the installation."""

import pathlib
import re
import subprocess
import sys

import pytest

import taskexpert_jax
from taskexpert_jax import installation
from taskexpert_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The folder `bundled` of an installed wheel."""
    bundled = tmp_path / "site-packages" / "taskexpert_jax" / "bundled"
    (bundled / "configs").mkdir(parents=True)
    (bundled / "configs" / "demo.py").touch()
    monkeypatch.setattr(installation, "_BUNDLED", bundled)
    installation.commit.cache_clear()
    yield bundled
    installation.commit.cache_clear()


def test_a_checkout_uses_its_own_folders():
    assert installation.root() == ROOT


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("demo", "demo.py"),
        ("nyud:vit_l16", "nyud.py:vit_l16"),
        ("configs/nyud.py:vit_l16", "nyud.py:vit_l16"),
        ("configs/demo.py", "demo.py"),
    ],
)
def test_bundled_configs_are_found_from_any_folder(elsewhere, text, file):
    assert installation.config_file(text) == f"{CONFIGS}/{file}"


@pytest.mark.parametrize("text", ["configs/demo.py", "demo", "mine.py:a:b", "configs/mine.py"])
def test_files_of_the_user_come_first(elsewhere, text):
    path = elsewhere / text.partition(":")[0]
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert installation.config_file(text) == text


def test_short_names_are_of_the_working_directory_first(elsewhere):
    (elsewhere / "configs").mkdir()
    for name in ("demo", "own"):
        (elsewhere / "configs" / f"{name}.py").touch()
    assert [installation.config_file(text) for text in ("own:a", "demo", "folder")] == [
        "configs/own.py:a",
        "configs/demo.py",
        f"{CONFIGS}/folder.py",
    ]


@pytest.mark.parametrize("text", ["", "demo.py", "a/demo.py", "a/configs/demo.py", "configs/none.py:x", "./demo"])
def test_other_paths_are_left_alone(elsewhere, text):
    assert installation.config_file(text) == text


@pytest.mark.parametrize("text", ["nyd:vit_l16", "__init__", "configs"])
def test_an_unknown_name_lists_the_bundled_configs(elsewhere, text):
    with pytest.raises(
        UserError, match=rf"--config={text}: .* ablation, cityscapes, demo, folder, nyud, nyud13, pascal_context$"
    ):
        installation.config_file(text)


def test_programs_import_our_folders_before_others_of_the_same_name(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from taskexpert_jax import installation\n"
        "installation.enable(); installation.enable()\n"
        "import configs; print(configs.__file__, sys.path[0], sys.path[1])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(CONFIGS / "__init__.py"), str(ROOT), str(tmp_path)]


def test_programs_import_modules_of_the_working_directory_after_ours(elsewhere):
    for name, text in {
        "configs/rooms.py": "from configs import demo, folder",
        "configs/demo.py": "raise AssertionError('ours is imported')",
        "input_pipeline/frames.py": "from input_pipeline import class_names",
    }.items():
        (elsewhere / name).parent.mkdir(exist_ok=True)
        (elsewhere / name).write_text(text)
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from taskexpert_jax import installation\n"
        "installation.enable(); installation.enable()\n"
        "from configs import rooms\nfrom input_pipeline import frames\n"
        "print(rooms.__file__, frames.__file__, len(sys.modules['configs'].__path__))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [f"{elsewhere}/configs/rooms.py", f"{elsewhere}/input_pipeline/frames.py", "2"], done


def test_a_wheel_uses_its_bundled_folders_and_recorded_commit(wheel, elsewhere):
    assert installation.config_file("demo:tiny") == f"{wheel}/configs/demo.py:tiny"
    assert installation.version_text() == taskexpert_jax.__version__
    installation.commit.cache_clear()
    (wheel / "COMMIT").write_text("abc1234\n")
    assert installation.version_text() == f"{taskexpert_jax.__version__} (abc1234)"


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def commit(folder):
        monkeypatch.setattr(installation, "PACKAGE", folder / "taskexpert_jax")
        installation.commit.cache_clear()
        return installation.commit()

    file = tmp_path / "file"
    file.touch()
    assert commit(tmp_path) is None  # an unpacked archive
    git("init")
    assert commit(tmp_path) is None  # no commit yet
    git("add", "file")
    git("commit", "-m", "x")
    git("tag", "v1")
    assert re.fullmatch("[0-9a-f]{7,}", clean := commit(tmp_path))
    file.write_text("changed")
    assert commit(tmp_path) == f"{clean}-dirty"
    assert commit(tmp_path / "inner") is None  # not that of another project around it
    installation.commit.cache_clear()


def test_the_citation_has_the_version():
    assert f"\nversion: {taskexpert_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
