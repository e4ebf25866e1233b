"""Boundary benchmark (odsF) without MATLAB; `counts` is its interface."""
