"""Facts about the source itself: what the house rules promise."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import pytest

from tests import xla

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("taskexpert_jax", "input_pipeline", "configs")
SOURCES = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")] + [ROOT / "main.py"]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


# Parts of taskexpert_jax, low to high: none imports from a higher floor.
FLOORS = (
    (
        "version",
        "errors",
        "files",
        "images",
        "command_line",
        "compilation_cache",
        "installation",
        "interruption",
        "json_file",
        "paths",
        "progress",
        "storage",
        "terminal",
        "text_table",
    ),
    ("config",),
    ("tasks",),
    ("parallel",),
    ("models",),
    ("runs",),
    ("pretrained",),
    ("evaluation",),
    ("report", "training"),
    ("compile", "exporting", "run"),
    ("app",),
    ("train", "evaluate", "predict", "export", "compare", "gates", "inspect", "checkpoint", "release", "serve"),
    ("score", "modes"),  # programs with data of their own: they may import input_pipeline; only main.py imports one
    ("cli", "__main__"),
)
PROGRAMS = sum(FLOORS[-3:], ())


def imports_of(name):
    """The project's modules that a module imports anywhere: inside functions and for type checkers too."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else source for module in inner}
    return found & MODULES.keys() - {name}


def part_of(module):
    """File or folder of taskexpert_jax that a module belongs to; empty for other packages."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "taskexpert_jax" else ""


def test_there_is_no_import_circle():
    graph = {name: imports_of(name) for name in MODULES}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"import circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_lower_floors_do_not_import_higher_ones():
    height = {part: i for i, floor in enumerate(FLOORS) for part in floor}
    assert {part_of(name) for name in MODULES} - {""} <= height.keys()
    upwards = [
        f"{name} -> {other}"
        for name in MODULES
        if name.startswith("taskexpert_jax.")  # the package itself names what users import, from any floor
        for other in sorted(imports_of(name))
        if height.get(part_of(other), len(FLOORS) - 2) > height.get(part_of(name), -1)
    ]
    assert upwards == []


def test_input_pipeline_imports_no_program():
    found = [
        f"{name} -> {other}"
        for name in MODULES
        if name.startswith("input_pipeline")
        for other in sorted(imports_of(name))
        if part_of(other) in PROGRAMS or other.startswith(("configs", "main"))
    ]
    assert found == []


def test_configs_import_only_the_config_and_class_names():
    found = [
        f"{name} -> {other}"
        for name in MODULES
        if name.startswith("configs")
        for other in sorted(imports_of(name))
        if not other.startswith(("configs", "input_pipeline")) and part_of(other) != "config"
    ]
    assert found == []


def test_main_is_short():
    assert len((ROOT / "main.py").read_text().splitlines()) < 20


WITHOUT_TENSORFLOW = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "tensorboard"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
import pathlib, pkgutil, importlib
import numpy as np
import taskexpert_jax
for module in pkgutil.walk_packages(taskexpert_jax.__path__, "taskexpert_jax."):
    importlib.import_module(module.name)
from configs import nyud
from taskexpert_jax.train import train
config = nyud.get_config("tiny")
config.num_steps = 1
config.model.depth = config.model.taps = config.model.experts = 1
config.batch_size = config.eval.batch_size = 2
random = np.random.default_rng(0)
batch = {
    "image": random.integers(0, 256, (2, 64, 80, 3), np.uint8),
    "semseg": random.integers(0, 40, (2, 64, 80, 1)).astype(np.uint8),
    "depth": random.uniform(1, 5, (2, 64, 80, 1)).astype(np.float32),
    "normals": random.normal(size=(2, 64, 80, 3)).astype(np.float16),
    "edge": random.integers(0, 2, (2, 64, 80, 1)).astype(np.uint8),
    "window": np.tile(np.array([0, 0, 64, 80], np.int32), (2, 1)),
    "mask": np.ones(2, np.float32),
}
state = train(config, pathlib.Path(sys.argv[1]), lambda start: iter([batch]), lambda: [batch])
print("steps done:", int(state.step))
"""


@pytest.mark.slow
def test_the_package_trains_without_tensorflow(tmp_path):
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=xla.environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert "TensorBoard events: not written" in done.stderr
    assert "steps done: 1" in done.stdout
    assert (tmp_path / "checkpoints" / "1").is_dir()


# `pathlib.Path(text)` of what a user wrote would make a folder `gs:` of an address: `storage.path` and `paths.local`
# tell addresses from paths. These calls are of the program's own paths: (module, argument) -> what it is.
OWN_PATHS = {
    ("app.server", "report.__file__"): "the package",
    ("compile.fit", "temporary"): "temporary folder",
    ("files", "scratch"): "temporary folder",
    ("installation", "name"): "a config file, which is Python code: addresses are refused above",
    ("pipeline.local_cache", "tempfile.gettempdir()"): "temporary folder",
    ("pipeline.prepare", "folder"): "temporary folder",
    ("release", "folder"): "temporary folder",
    ("runs.hub", "found"): "the hub's cache",
    ("runs.lease", "f'/proc/{process}/stat'"): "the operating system's",
    ("runs.released", "name"): "a folder for results in the current one",
    ("runs.writer", "self._open.enter_context(tempfile.TemporaryDirectory(prefix='taskexpert_logs_'))"): "temporary",
    ("storage", "folder"): "temporary folder",
    ("storage", "text"): "no address: it is looked at above",
    ("tasks.canvas", "matplotlib.get_data_path()"): "a package",
    ("training.profile", "folder"): "temporary folder",
}
# Functions that know the disk alone: (module, function) -> why that is right there.
OF_THE_DISK = {
    ("images", "os.scandir"): "of data on the disk; buckets are listed by storage.files_in",
    ("installation", "os.path.isdir"): "modules in the current folder",
    ("pipeline.archives", "os.listdir"): "an archive that was extracted on the disk",
    ("pipeline.folder", "os.path.exists"): "of data on the disk, or its local copy",
    ("pipeline.folder", "os.path.isdir"): "of data on the disk, or its local copy",
    ("terminal", "open"): "the null device",
}
DISK_FUNCTIONS = {
    *("open", "io.open", "glob.glob", "os.scandir", "os.listdir", "os.walk", "os.makedirs", "os.mkdir", "os.remove"),
    *("os.unlink", "os.rename", "os.replace", "os.stat", "shutil.copy", "shutil.copy2", "shutil.copytree"),
    *("shutil.move", "os.path.exists", "os.path.isdir", "os.path.isfile", "os.path.getsize", "os.path.getmtime"),
}


def calls():
    """(module, function, arguments) of every call, as text; modules without `taskexpert_jax.` and `input_`."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                module = name.removeprefix("taskexpert_jax.").removeprefix("input_")
                yield module, ast.unparse(node.func), node.args


def test_text_of_users_becomes_a_path_where_addresses_are_known():
    found = {
        (module, ast.unparse(arguments[0]))
        for module, function, arguments in calls()
        if function in ("pathlib.Path", "Path", "pathlib.PosixPath") and arguments
        if not all(isinstance(argument, ast.Constant) for argument in arguments[:1])
        if ast.unparse(arguments[0]) != "__file__"
    }
    assert found == OWN_PATHS.keys()


def test_files_are_reached_by_methods_of_their_path():
    found = {(module, function) for module, function, _ in calls() if function in DISK_FUNCTIONS}
    assert found == OF_THE_DISK.keys()
