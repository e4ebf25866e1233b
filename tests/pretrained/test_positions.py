"""Position embeddings of weight files: the reading of a table is never guessed from the number of positions."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from taskexpert_jax.errors import UserError
from taskexpert_jax.models.backbones import vit
from taskexpert_jax.pretrained import assemble, files, naming, recorded
from tests.pretrained import weight_layouts
from tests.pretrained.tiny_vit import VIT, read

WITH, WITHOUT = "with the class token's position", "without a position of a class token"


def write(folder, count, names="timm", *, drop=(), add=(), image_size=None):
    """Writes a file with `count` positions, whose values are their numbers; returns its path."""
    tensors = getattr(weight_layouts, names)(VIT)
    (positions,) = [name for name, tensor in tensors.items() if name.endswith(("pos_embed", "embeddings", "embedding"))]
    tensors[positions] = np.repeat(np.arange(count, dtype=np.float32)[None, :, None], 32, 2)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    tensors |= {name: np.zeros((1, 4, 32), np.float32) for name in add}
    path = folder / ("x.npz" if names == "augreg" else "x.safetensors")
    np.savez(path, **tensors) if names == "augreg" else save_file(tensors, path)
    if image_size:
        (folder / "config.json").write_text(json.dumps({"image_size": image_size}))
    return path


def first(path, run_grid, **fields):
    """Grid and first position of the patches, for a run with this grid."""
    architecture = vit.Architecture(width=32, depth=4, heads=2, mlp_ratio=4, patch_size=16, **fields)
    backbone = vit.ViT(architecture, run_grid, 4, 0.0, False, False, np.float32)
    tensors, metadata = files.read(str(path))
    size = recorded.recorded_input(str(path), metadata).model_size
    family = naming.recognise(tensors, backbone, size, str(path))
    positions = assemble.build(tensors, family, None, str(path)).arrays[naming.POSITIONS]
    return positions.shape[:2], positions[0, 0, 0]


@pytest.mark.parametrize(
    ("count", "options", "run_grid", "expected"),
    [
        (17, {}, (4, 4), ((4, 4), 1)),
        (17, {"names": "augreg"}, (4, 4), ((4, 4), 1)),
        (17, {"names": "hugging_face"}, (4, 4), ((4, 4), 1)),
        (16, {"drop": ["cls_token"]}, (4, 4), ((4, 4), 0)),  # the file has no class token
        # timm: no_embed_class, which the record of the image size tells from a class token and 3x5.
        (16, {"image_size": [64, 64]}, (4, 4), ((4, 4), 0)),
        (16, {"image_size": [48, 80]}, (3, 5), ((3, 5), 1)),
        (49, {"image_size": [96, 128]}, (6, 8), ((6, 8), 1)),
        (49, {"image_size": 112}, (7, 7), ((7, 7), 0)),
        (49, {"names": "hugging_face"}, (6, 8), ((6, 8), 1)),  # always has the class token's position
        (49, {"names": "augreg"}, (6, 8), ((6, 8), 1)),
        (48, {"drop": ["cls_token"]}, (6, 8), ((6, 8), 0)),
        (7, {}, (2, 3), ((2, 3), 1)),
        (37, {"names": "hugging_face", "image_size": [96, 96]}, (6, 6), ((6, 6), 1)),
        (37, {"names": "hugging_face", "image_size": [64, 144]}, (4, 9), ((4, 9), 1)),
        (17, {"image_size": [999, 999]}, (4, 4), ((4, 4), 1)),  # a record that does not fit decides nothing
    ],
)
def test_the_reading_of_a_table(count, options, run_grid, expected, tmp_path):
    assert first(write(tmp_path, count, **options), run_grid) == expected


@pytest.mark.parametrize(("registers", "count", "before"), [("reg_token", 16, 0), ("register_tokens", 17, 1)])
def test_the_class_token_of_files_with_registers_has_a_position_in_dinov2s_own_only(registers, count, before, tmp_path):
    path = write(tmp_path, count, add=[registers])
    assert first(path, (4, 4), registers=4, class_token=True) == ((4, 4), before)
    path = write(tmp_path, 33 - count, add=[registers])
    with pytest.raises(UserError, match="no square grid"):
        first(path, (4, 4), registers=4)


@pytest.mark.parametrize(
    ("count", "options", "run_grid", "readings", "sizes"),
    [
        (49, {}, (6, 8), [("7x7", WITHOUT), ("6x8", WITH)], [(112, 112), (96, 128)]),
        (49, {}, (4, 4), [("7x7", WITHOUT), ("another grid", WITH)], [(112, 112)]),
        (17 * 10, {}, (10, 17), [("10x17", WITHOUT), ("13x13", WITH)], [(160, 272), (208, 208)]),
        (36, {"drop": ["cls_token"]}, (4, 9), [("6x6", WITHOUT), ("4x9", WITHOUT)], [(96, 96), (64, 144)]),
        (37, {"names": "augreg"}, (4, 9), [("6x6", WITH), ("4x9", WITH)], [(96, 96), (64, 144)]),
    ],
)
def test_two_readings_are_refused_and_named(count, options, run_grid, readings, sizes, tmp_path):
    with pytest.raises(UserError) as refusal:
        first(write(tmp_path, count, **options), run_grid)
    line = str(refusal.value)
    expected = [f"{grid}{' patches' if 'x' in grid else ''} {how}" for grid, how in readings]
    assert f": its {count} position embeddings may be {' or '.join(expected)}; " in line
    assert line.endswith(" or ".join(f'{{"image_size": [{height}, {width}]}}' for height, width in sizes))
    assert "\n" not in line


@pytest.mark.parametrize(
    ("count", "options"),
    [(15, {}), (17, {"drop": ["cls_token"]}), (16, {"names": "augreg"}), (0, {})],
)
def test_positions_of_no_known_grid_are_refused(count, options, tmp_path):
    with pytest.raises(
        UserError, match=rf"{count} position embeddings \(1, {count}, 32\).*square.*config\.json"
    ) as refusal:
        first(write(tmp_path, count, **options), (2, 2))
    assert "\n" not in str(refusal.value)


def test_positions_that_stay_random_are_not_read(tmp_path):
    weights = read(write(tmp_path, 49), (64, 64), pretrained_fresh="patches/pos_embedding")
    assert "patches/pos_embedding" not in weights.arrays
