"""Pretrained backbones from files: names, shapes, reports and refusals.

tests/models/test_timm_parity.py compares the outputs of a loaded model with PyTorch's.
"""

import json
import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import cityscapes, folder, nyud, nyud13, pascal_context
from taskexpert_jax.config import VARIANTS
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.backbones import position_embedding, vit
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from tests.pretrained import weight_layouts
from tests.pretrained.tiny_vit import VIT, WRITERS, read, tiny_config

TIMM_HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
HALF = {f"image_{name}": value for name, value in TIMM_HALF.items()}


# --- files ---


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_fills_every_parameter_with_its_own_values(name, tmp_path):
    WRITERS[name](tmp_path / name)
    weights = read(tmp_path / name, taps=2)
    arrays = dict(weights.arrays)

    def expect(ours, expected):
        np.testing.assert_array_equal(arrays.pop(ours), expected, err_msg=ours)

    expect("patches/embedding/kernel", VIT["patch"])
    expect("patches/embedding/bias", VIT["patch_bias"])
    expect("patches/pos_embedding", VIT["positions"])

    def stacked(*names, axis=0):
        of_blocks = [[VIT[f"{i}/{name}"] for name in names] for i in range(4)]
        blocks = [of[0] if len(of) == 1 else np.stack(of, axis) for of in of_blocks]
        return np.stack(blocks)

    expect("blocks/attention/qkv_kernel", stacked("query", "key", "value", axis=1))
    expect("blocks/attention/qkv_bias", stacked("query_bias", "key_bias", "value_bias"))
    expect("blocks/attention/out/kernel", stacked("out").reshape(4, 32, 32))
    expect("blocks/attention/out/bias", stacked("out_bias"))
    for layer in ("expand", "contract"):
        expect(f"blocks/mlp/{layer}/kernel", stacked(layer))
        expect(f"blocks/mlp/{layer}/bias", stacked(f"{layer}_bias"))
    for layer in ("norm1", "norm2"):
        expect(f"blocks/{layer}/norm/scale", stacked(layer))
        expect(f"blocks/{layer}/norm/bias", stacked(f"{layer}_bias"))
    assert arrays == {}


@pytest.mark.parametrize("name", ["augreg.npz", "timm.safetensors", "hugging_face.bin"])
def test_the_class_token_is_dropped_or_kept_with_its_position(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert "patches/class_token" not in read(tmp_path / name).arrays
    kept = read(tmp_path / name, class_token=True)
    np.testing.assert_array_equal(kept.arrays["patches/class_token"], VIT["cls"][None] + VIT["cls_position"])
    np.testing.assert_array_equal(kept.arrays["patches/pos_embedding"], VIT["positions"])


def test_the_report_counts_names_and_compares(tmp_path):
    WRITERS["augreg.npz"](tmp_path / "augreg.npz")
    first, second = read(tmp_path / "augreg.npz", (64, 80)).report.splitlines()
    assert first == (
        f"loaded 67 of 67 tensors of {tmp_path}/augreg.npz (AugReg's names) into the backbone (pos_embedding 4x4 -> "
        "4x5; unused: Transformer/encoder_norm/*, cls, head/*); random: head_depth/*, initial_memory, mixture/*"
    )
    theirs, own = second.split("; this run: ")
    assert theirs.endswith("AugReg's ViTs were trained with 0.5 and 0.5, 64x64")
    assert own == "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225), 64x80"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", {"pretrained_cfg": {**TIMM_HALF, "input_size": [3, 384, 384]}}, "384x384"),
        ("config.json", TIMM_HALF, "64x64"),
        ("preprocessor_config.json", {**HALF, "size": 224}, "224x224"),
        ("preprocessor_config.json", {**HALF, "size": {"height": 8, "width": 9}}, "8x9"),
        (
            "preprocessor_config.json",
            {**HALF, "crop_size": {"height": 7, "width": 7}, "size": {"shortest_edge": 9}},
            "7x7",
        ),
    ],
)
def test_the_pretraining_input_is_read_from_the_json_in_the_same_folder(name, content, expected, tmp_path):
    WRITERS["timm.pth"](tmp_path / "timm.pth")
    (tmp_path / name).write_text(json.dumps(content))
    line = read(tmp_path / "timm.pth").report.splitlines()[1]
    assert f"mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5) ({name}), {expected}; this run: mean (0.485" in line
    assert "--config.model.image_mean='(0.5, 0.5, 0.5)' --config" in line
    (tmp_path / name).write_text("{")
    assert "pretrained on: mean and std not recorded in the file, 64x64; this run" in read(tmp_path / "timm.pth").report


def test_safetensors_with_the_input_in_their_metadata_and_bfloat16(tmp_path):
    tensors = {
        name: {"dtype": "bfloat16", "shape": array.shape, "data": array.astype(jnp.bfloat16).tobytes()}
        for name, array in weight_layouts.timm(VIT).items()
    }
    spec = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]"}
    (tmp_path / "half.safetensors").write_bytes(_serialized(tensors, spec))
    weights = read(tmp_path / "half.safetensors")
    expected = VIT["patch"].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(weights.arrays["patches/embedding/kernel"], expected)
    assert "std (0.5, 0.5, 0.5) (metadata), 64x64" in weights.report


def _serialized(tensors, metadata):
    """Serialises .safetensors by hand (header length, header, data), because its NumPy writer has no bfloat16."""
    header, offset = {"__metadata__": metadata}, 0
    for name, of in tensors.items():
        end = offset + len(of["data"])
        header[name] = {"dtype": "BF16", "shape": list(of["shape"]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(of["data"] for of in tensors.values())


# --- refusals ---


def test_a_file_that_fits_in_part_is_refused_with_a_diff(tmp_path):
    tensors = weight_layouts.timm(VIT) | {"blocks.4.norm1.weight": np.ones(32, np.float32)}
    tensors["blocks.2.attn.proj.weight"] = np.ones((32, 16), np.float32)
    del tensors["blocks.3.mlp.fc1.bias"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as refusal:
        read(tmp_path / "x.safetensors")
    head, *lines = str(refusal.value).splitlines()
    assert re.search(r"x\.safetensors .*\b3 .*\b54\b.*config\.model\.pretrained_fresh", head)
    assert [line.strip() for line in lines] == [
        "+ blocks.3.mlp.fc1.bias (128,): not in the file",
        "- blocks.4.norm1.weight (32,): only in the file",
        "! blocks.2.attn.proj.weight: (32, 16) in the file, (32, 32) in the model",
    ]


def test_tensors_of_other_modules_are_dropped_next_to_a_prefix_and_named_without_one(tmp_path):
    head = {"decode_head.conv.weight": np.ones((7, 32), np.float32)}
    save_file({f"backbone.{k}": v for k, v in weight_layouts.timm(VIT).items()} | head, tmp_path / "x.safetensors")
    assert "unused: backbone.*, decode_head.*); random" in read(tmp_path / "x.safetensors").report
    save_file(weight_layouts.timm(VIT) | head, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"(?s)or remove the tensors marked - .*- decode_head\.conv") as refusal:
        read(tmp_path / "x.safetensors")
    assert "pretrained_fresh" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("width", 64, r"! blocks\.0\.attn\.proj\.bias: \(32,\) .*\(64,\)"),
        ("patch_size", 8, r"! patch_embed\.proj\.weight: \(32, 3, 16, 16\) .*\(32, 3, 8, 8\)"),
        ("depth", 2, r"- blocks\.2\."),
        ("depth", 8, r"\+ blocks\.4\."),
        ("layer_scale", 1.0, r"\+ blocks\.0\.ls1\.gamma \(32,\)"),
        ("registers", 4, r"\+ reg_token \(1, 4, 32\)"),
    ],
)
def test_another_backbone_is_refused(field, value, line, tmp_path):
    WRITERS["timm.safetensors"](tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=line):
        read(tmp_path / "x.safetensors", **{field: value, "taps": 2})


def test_registers_and_layer_scale_are_not_dropped_unseen(tmp_path):
    tensors = weight_layouts.timm(VIT) | {"reg_token": np.ones((1, 4, 32), np.float32)}
    tensors["blocks.0.ls1.gamma"] = np.ones(32, np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"(?s)- blocks\.0\.ls1\.gamma.*- reg_token \(1, 4, 32\)"):
        read(tmp_path / "x.safetensors")


def test_what_stays_fresh_is_named_by_regex(tmp_path):
    tensors = weight_layouts.timm(VIT)
    del tensors["pos_embed"]
    tensors["patch_embed.proj.weight"] = np.ones((32, 3, 14, 14), np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    weights = read(tmp_path / "x.safetensors", pretrained_fresh=r"patches/(pos_embedding|embedding/.*)")
    assert not {name for name in weights.arrays if name.startswith("patches/")}
    assert (
        "loaded 48 of 48" in weights.report
        and "random: head_depth/*, initial_memory, mixture/*, patches/emb" in weights.report
    )
    assert "unused: cls_token, head.*, norm.*, patch_embed.*" in weights.report
    for regex, message in (
        ("patches/nothing", "patches/nothing"),
        ("(", r"'\('"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "x.safetensors", pretrained_fresh=regex)


def test_files_of_no_vit_and_of_two_are_refused(tmp_path):
    save_file({"layer1.0.conv1.weight": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"\b0 .*layer1\.0\.conv1\.weight"):
        read(tmp_path / "x.safetensors")
    both = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in weight_layouts.timm(VIT).items()}
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"\b2 .*student\.patch_embed\.proj\.weight, teacher"):
        read(tmp_path / "x.safetensors")


# --- position embeddings ---


@pytest.mark.parametrize("target", [(14, 14), (37, 42), (28, 36), (5, 50), (24, 24)])
def test_positions_are_resized_as_by_the_reference(target):
    """OpenCV's bicubic has PyTorch's kernel, centres and borders; test_timm_parity.py compares with PyTorch itself."""
    table = np.random.default_rng(0).normal(size=(24, 24, 3)).astype(np.float32)
    expected = cv2.resize(table, target[::-1], interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(position_embedding.resize(jnp.asarray(table), target), expected, rtol=0, atol=1e-5)


def test_the_model_resizes_at_run_time_as_loading_does():
    backbone = vit.Architecture(width=32, depth=4, heads=2, mlp_ratio=4, patch_size=16, class_token=True)
    image = jax.random.normal(jax.random.key(0), (1, 80, 112, 3))
    small, large = (vit.PatchEmbed(backbone, grid, jnp.float32) for grid in ((4, 4), (5, 7)))
    params = sharding.unbox(jax.jit(lambda: small.init(jax.random.key(0), image))())["params"]
    at_run_time = jax.jit(lambda p: small.apply({"params": p}, image))(params)
    loaded = {**params, "pos_embedding": position_embedding.resize(params["pos_embedding"], (5, 7))}
    np.testing.assert_allclose(jax.jit(lambda p: large.apply({"params": p}, image))(loaded), at_run_time, atol=1e-6)
    assert at_run_time.shape == (1, 1 + 35, 32)


# --- variants ---


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("module", [nyud, nyud13, pascal_context, cityscapes, folder])
def test_every_variant_is_a_config_without_further_flags(module, variant):
    config = module.get_config(variant)
    model = taskexpert.from_config(config, from_config(config) if module is not folder else ())
    height, width = config.dataset.image_size
    protocol = {
        nyud: (448, 576),
        nyud13: (288, 384),
        pascal_context: (512, 512),
        cityscapes: (512, 1024),
        folder: (448, 576),
    }[module]
    if variant != "tiny":
        assert 0 <= height - protocol[0] < model.backbone.stride
        assert 0 <= width - protocol[1] < model.backbone.stride


def test_dinov2_variants_have_its_parameters():
    config = nyud.get_config("dinov2_s14_reg4")
    config.tasks = ("depth",)
    model = taskexpert.from_config(config, from_config(config))
    shapes = budget.parameter_shapes(model)
    assert shapes["patches/class_token"] == (1, 384) and shapes["patches/registers"] == (4, 384)
    assert shapes["blocks/layer_scale1"] == shapes["blocks/layer_scale2"] == (12, 384)
    # timm's vit_small_patch14_reg4_dinov2 has 22 057 344 parameters: 1369 positions, and a final norm.
    others = 22_057_344 - 1369 * 384 - 2 * 384 + 32 * 42 * 384
    assert budget.count(model).parameters["backbone"] == others


def test_extra_tokens_cost_what_they_do():
    config = tiny_config()
    plain = budget.count(taskexpert.from_config(config, from_config(config))).multiply_adds
    config.model.class_token, config.model.registers = True, 3
    more = budget.count(taskexpert.from_config(config, from_config(config))).multiply_adds
    # 4 blocks; 16 tokens of 32 channels, then 20 of them in 12 C^2 a token and 2 C a pair.
    assert more["backbone"] - plain["backbone"] == 4 * (12 * 32**2 * 4 + 2 * 32 * (20**2 - 16**2))
    assert {**more, "backbone": 0} == {**plain, "backbone": 0}
