"""Mutated weight files, and JSON next to them: parameters or one line."""

import io
import json
import pathlib
import zipfile

import numpy as np
from safetensors.numpy import save

from taskexpert_jax.errors import UserError
from taskexpert_jax.models.backbones.vit import Architecture, ViT
from taskexpert_jax.pretrained import assemble, files, naming
from taskexpert_jax.pretrained.recorded import recorded_input
from tests.fuzz.leaks import Reader, leaks
from tests.pretrained import weight_layouts

ARCHITECTURE = Architecture(width=4, depth=1, heads=2, mlp_ratio=2, patch_size=2, class_token=True)
BACKBONE = ViT(ARCHITECTURE, grid=(3, 3), stages=1, drop_path=0.0, remat=False, unroll=False, dtype=np.float32)
VIT = weight_layouts.random_blocks(width=4, depth=1, heads=2, patch=2, grid=(3, 3), mlp_ratio=2)


def _fill(path: pathlib.Path) -> None:
    """Fills the backbone from a file; the list of what does not fit, which has several lines, counts as one."""
    tensors, metadata = files.read(str(path))
    recorded = recorded_input(str(path), metadata)
    try:
        family = naming.recognise(tensors, BACKBONE, recorded.model_size, str(path))
        assemble.build(tensors, family, None, str(path))
    except UserError as error:
        first, *rest = str(error).split("\n")
        if len(rest) > 13 or not all(line.startswith(("  + ", "  - ", "  ! ", "  ... and")) for line in rest):
            raise
        raise UserError(first) from error


def _fill_from_npy(path: pathlib.Path) -> None:
    """Fills the backbone from an .npz with a mutated member, whose checksum is right."""
    with zipfile.ZipFile(path.with_name("x.npz"), "w") as archive:
        for name, content in _members(_npz()).items():
            archive.writestr(name, path.read_bytes() if name == "embedding/kernel.npy" else content)
    _fill(path.with_name("x.npz"))


def _fill_from_pickle(path: pathlib.Path) -> None:
    """Fills the backbone from a PyTorch file with a mutated pickle."""
    with zipfile.ZipFile(path.with_name("x.pth"), "w") as archive:
        for name, content in _members(_pth()).items():
            archive.writestr(name, path.read_bytes() if name.endswith("data.pkl") else content)
    _fill(path.with_name("x.pth"))


def _fill_next_to_json(path: pathlib.Path) -> None:
    """Fills the backbone from a good file next to a mutated config.json."""
    path.with_name("x.safetensors").write_bytes(_safetensors())
    _fill(path.with_name("x.safetensors"))


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _npz(write=np.savez) -> bytes:
    stream = io.BytesIO()
    write(stream, **weight_layouts.augreg(VIT))
    return stream.getvalue()


def _pth(prefix: str = "") -> bytes:
    stream = io.BytesIO()
    tensors = weight_layouts.timm(VIT) if not prefix else weight_layouts.hugging_face(VIT, prefix)
    weight_layouts.write_torch(stream, {"model": tensors, "epoch": 3, "args": [1.5, None, ("a", True)]})
    return stream.getvalue()


def _safetensors() -> bytes:
    metadata = {"format": "pt", "mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]", "input_size": "[3, 6, 6]"}
    return save(weight_layouts.timm(VIT), metadata)


TIMM_JSON = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 6, 6]}}
HALF = [0.5] * 3
HUGGING_FACE_JSON = {"image_mean": HALF, "image_std": HALF, "size": {"height": 6, "width": 6}, "image_size": 6}
READERS = [
    Reader(_fill, "w.pth", [_pth(), _pth("vit.")]),
    Reader(_fill, "w.npz", [_npz(), _npz(np.savez_compressed)]),
    Reader(_fill, "w.safetensors", [_safetensors()]),
    Reader(_fill_from_pickle, "data.pkl", [_members(_pth())["archive/data.pkl"]]),
    Reader(_fill_from_npy, "kernel.npy", [_members(_npz())["embedding/kernel.npy"]]),
    Reader(_fill_next_to_json, "config.json", [json.dumps(of).encode() for of in (TIMM_JSON, HUGGING_FACE_JSON)]),
]  # fmt: skip


def test_mutated_weight_files_give_parameters_or_one_line(tmp_path: pathlib.Path) -> None:
    assert leaks(READERS, tmp_path) == []
