"""Names of arrays in messages."""

import numpy as np

from taskexpert_jax.runs import tree


def test_names_from_files_of_others_stay_on_their_line():
    lines, count = tree.differences({"kernel\n\x1b[31m": np.zeros(3, np.float32)}, {})
    assert (lines, count) == ([r"- 'kernel\n\x1b[31m' (3,) float32: only in the checkpoint"], 1)
