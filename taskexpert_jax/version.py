"""The one version number, also of the package and in reports."""

__version__ = "0.1.0"
