"""Build of the wheel; all else is in pyproject.toml."""

import pathlib
import shutil
import sys

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from taskexpert_jax import installation  # noqa: E402  (needs no other package)


class BuildWithBundle(build_py):
    """Adds configs/ and input_pipeline/ to the package as taskexpert_jax/bundled/, and the commit; see docs/install.md.

    Not in an editable installation, which uses the folders of the checkout.
    """

    def run(self) -> None:
        """Builds the package in an empty folder: an earlier build may have left modules that exist no more."""
        package = pathlib.Path(self.build_lib) / "taskexpert_jax"
        if self.editable_mode:
            return super().run()
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        bundled = package / "bundled"
        for folder in ("configs", "input_pipeline"):
            ignored = shutil.ignore_patterns("__pycache__", "*.py[cod]")
            shutil.copytree(ROOT / folder, bundled / folder, ignore=ignored)
        if commit := installation.commit():
            (bundled / "COMMIT").write_text(f"{commit}\n")


setup(cmdclass={"build_py": BuildWithBundle})
