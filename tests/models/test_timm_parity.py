"""Our backbone beside timm's, on the same random weights, through a file of every format that can be loaded.

Needs PyTorch and timm (`make parity` installs them), and is skipped where they are absent. Every parameter is random,
the norms', biases, LayerScale and tokens too, so that none can be mixed up or left out unseen.
"""

import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nyud
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import layers
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.backbones import position_embedding, vit
from taskexpert_jax.pretrained import load as pretrained
from taskexpert_jax.tasks import from_config

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity installs it")

# timm asks for torchvision, for its image transforms and a norm of convolutional nets; a ViT uses neither.
for _name in (
    "",
    ".ops",
    ".ops.misc",
    ".transforms",
    ".transforms.functional",
    ".datasets",
    ".models.feature_extraction",
):
    if "torchvision" not in sys.modules or isinstance(sys.modules["torchvision"], mock.MagicMock):
        sys.modules[f"torchvision{_name}"] = mock.MagicMock(__path__=[], __spec__=None, FrozenBatchNorm2d=type)
timm = pytest.importorskip("timm", reason="timm is not installed: make parity installs it")

from safetensors.torch import save_file  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

SIDE = 64
DEPTH = 4  # blocks, of every net: all blocks of a file are read alike, and a tap stands after each
TOLERANCE = 1e-5  # of the largest value


@pytest.fixture(autouse=True, scope="module")
def _quiet_torch():
    torch.set_num_threads(2)
    with torch.no_grad():
        yield


def random_timm(variant, patch=16, **fields):
    """timm's ViT of a variant's shape with a class token, all parameters random, for images of 4 x 4 patches."""
    model = nyud.get_config(variant).model
    shape = {"embed_dim": model.width, "depth": DEPTH, "num_heads": model.heads, "patch_size": patch}
    return randomised(VisionTransformer(img_size=4 * patch, num_classes=3, **shape, **fields).eval())


def randomised(net):
    """The net with random parameters."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in net.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        near_one = name.endswith(("norm1.weight", "norm2.weight", "norm.weight"))
        if near_one:
            tensor.data = 1 + 0.1 * noise
        elif name.endswith(("gamma", "gamma_1", "gamma_2")):
            tensor.data = 0.3 + 0.1 * noise
        else:
            tensor.data = noise * (0.5 * tensor.shape[-1] ** -0.5 if tensor.ndim == 2 else 0.05)
    return net


def without_class_token(net, grid=(4, 4)):
    """timm's model as the benchmark's family runs it: no class token, positions resized by PyTorch's bicubic."""
    patch, width = net.patch_embed.patch_size[0], net.embed_dim
    size = (grid[0] * patch, grid[1] * patch)
    shape = {"embed_dim": width, "depth": len(net.blocks), "num_heads": net.blocks[0].attn.num_heads}
    other = VisionTransformer(img_size=size, patch_size=patch, class_token=False, global_pool="avg", **shape).eval()
    state = {name: tensor for name, tensor in net.state_dict().items() if name.startswith(("patch_embed", "blocks"))}
    table = net.pos_embed[:, 1:].reshape(1, 4, 4, width).permute(0, 3, 1, 2)
    if grid != (4, 4):
        table = torch.nn.functional.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    state["pos_embed"] = table.permute(0, 2, 3, 1).reshape(1, -1, width)
    missing = other.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith(("head", "norm", "fc_norm")) for name in missing.missing_keys)
    return other


def ours(path, variant, size, **fields):
    """A config's model and what it loads of a file: (model, weights)."""
    config = nyud.get_config(variant)
    config.tasks, config.dtype, config.dataset.image_size = ("depth",), "float32", size
    config.model.pretrained = str(path)
    config.model.depth = DEPTH
    config.model.update(fields)
    model = taskexpert.from_config(config, from_config(config))
    return model, pretrained.read(config, model)


def tokens_of_every_block(model, weights, image):
    """Image (B, 3, H, W) -> the patches' tokens after each block, (depth, B, N, C)."""
    patches = {name.split("/", 1)[1]: array for name, array in weights.arrays.items() if name.startswith("patches/")}
    blocks = {name: array for name, array in weights.arrays.items() if name.startswith("blocks/")}
    architecture = model.backbone.architecture
    grid = tuple(side // architecture.patch_size for side in image.shape[2:])
    tree = {}
    for name, array in blocks.items():
        *folders, last = name.split("/")[1:]
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    patches = {**patches, "embedding": {kind: patches.pop(f"embedding/{kind}") for kind in ("kernel", "bias")}}

    @jax.jit
    def run(patches, tree, image):
        tokens = vit.PatchEmbed(architecture, model.backbone.grid, jnp.float32).apply({"params": patches}, image)

        def step(tokens, params):
            block = vit.Block(architecture, jnp.float32, grid)
            tokens = block.apply({"params": params}, tokens, jnp.zeros(()), False)
            return tokens, tokens

        return jax.lax.scan(step, tokens, tree)[1][:, :, architecture.extra_tokens :]

    return np.asarray(run(patches, tree, image.numpy().transpose(0, 2, 3, 1)))


def assert_equal_at_every_block(net, model, weights, size, norm=True):
    # Faint images: the tokens' variance is not large beside the norms' epsilon, so that another one would show.
    image = 0.05 * torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    found = tokens_of_every_block(model, weights, image)
    expected = net.forward_intermediates(image, output_fmt="NLC", intermediates_only=True)
    assert len(expected) == len(found) == model.backbone.architecture.depth
    for block, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert np.abs(one - other.numpy()).max() <= TOLERANCE * other.abs().max(), block
    if norm:  # timm's final norm, which is dropped: our taps have their own
        last = layers.LayerNorm(jnp.float32, model.backbone.architecture.norm_epsilon).apply(
            {"params": {"norm": {"scale": net.norm.weight.numpy(), "bias": net.norm.bias.numpy()}}},
            jnp.asarray(found[-1]),
        )
        expected = net.forward_features(image)[:, net.num_prefix_tokens :]
        assert np.abs(np.asarray(last) - expected.numpy()).max() <= TOLERANCE * expected.abs().max()


# --- files ---


def heads_first(tensor, heads):
    """timm's (C,) or (C, C) of q, k or v -> AugReg's (heads, C / heads) or (C, heads, C / heads)."""
    array = tensor.numpy()
    return array.reshape(heads, -1) if array.ndim == 1 else array.T.reshape(array.shape[1], heads, -1)


def augreg(net):
    """AugReg's names and shapes for a timm ViT."""
    state, heads, width = net.state_dict(), net.blocks[0].attn.num_heads, net.embed_dim
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0).numpy(),
        "embedding/bias": state["patch_embed.proj.bias"].numpy(),
        "cls": state["cls_token"].numpy(),
        "Transformer/posembed_input/pos_embedding": state["pos_embed"].numpy(),
        "Transformer/encoder_norm/scale": state["norm.weight"].numpy(),
        "Transformer/encoder_norm/bias": state["norm.bias"].numpy(),
        "head/kernel": state["head.weight"].T.numpy(),
        "head/bias": state["head.bias"].numpy(),
    }
    for block in range(len(net.blocks)):
        at, of = f"Transformer/encoderblock_{block}/", f"blocks.{block}."
        for kind, ours in (("weight", "kernel"), ("bias", "bias")):
            parts = state[f"{of}attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                arrays[f"{at}MultiHeadDotProductAttention_1/{name}/{ours}"] = heads_first(part, heads)
            for name, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
                arrays[f"{at}MlpBlock_3/{name}/{ours}"] = state[f"{of}mlp.{theirs}.{kind}"].numpy().T
        out = f"{at}MultiHeadDotProductAttention_1/out"
        arrays[f"{out}/kernel"] = state[f"{of}attn.proj.weight"].T.reshape(heads, -1, width).numpy()
        arrays[f"{out}/bias"] = state[f"{of}attn.proj.bias"].numpy()
        for name, theirs in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            arrays[f"{at}{name}/scale"] = state[f"{of}{theirs}.weight"].numpy()
            arrays[f"{at}{name}/bias"] = state[f"{of}{theirs}.bias"].numpy()
    return arrays


def hugging_face(state, names, top, prefix):
    """A timm state dict in the names of `transformers`, with q, k and v apart: rows 0..C, C..2C, 2C..3C."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            continue
        if not name.startswith("blocks."):
            renamed[prefix + top.get(name, top.get(name.rpartition(".")[0], "") + "." + name.split(".")[-1])] = tensor
            continue
        _, block, rest = name.split(".", 2)
        layer, kind = rest.rsplit(".", 1)
        at = f"{prefix}encoder.layer.{block}."
        if layer == "attn.qkv":
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{at}attention.attention.{part}.{kind}"] = chunk.contiguous()
        else:
            renamed[at + (names[rest] if rest in names else f"{names[layer]}.{kind}")] = tensor
    return renamed


HF_TOP = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
HF_VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HF_DINOV2 = {
    **{name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


@pytest.fixture(scope="module")
def tiny():
    return random_timm("vit_ti16")


@pytest.fixture(scope="module")
def dinov2():
    return random_timm("dinov2_s14", patch=14, init_values=1e-5)


# --- ViT ---


def test_augreg_npz_in_the_familys_way(tmp_path, tiny):
    np.savez(tmp_path / "augreg.npz", **augreg(tiny))
    model, weights = ours(tmp_path / "augreg.npz", "vit_ti16", (SIDE, SIDE))
    assert_equal_at_every_block(without_class_token(tiny), model, weights, (SIDE, SIDE), norm=False)
    assert "unused: Transformer/encoder_norm/*, cls, head/*" in weights.report


def test_augreg_npz_as_timm_itself_reads_it(tmp_path, tiny):
    """timm's own loader of these files is the witness of their names; with the class token, as it was trained."""
    np.savez(tmp_path / "augreg.npz", **augreg(tiny))
    net = VisionTransformer(img_size=SIDE, embed_dim=192, depth=DEPTH, num_heads=3, num_classes=3).eval()
    net.load_pretrained(str(tmp_path / "augreg.npz"))
    model, weights = ours(tmp_path / "augreg.npz", "vit_ti16", (SIDE, SIDE), class_token=True)
    assert_equal_at_every_block(net, model, weights, (SIDE, SIDE))


def test_timm_safetensors_on_another_grid(tmp_path, tiny):
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    size = (80, 112)
    model, weights = ours(tmp_path / "model.safetensors", "vit_ti16", size)
    assert_equal_at_every_block(without_class_token(tiny, (5, 7)), model, weights, size, norm=False)
    assert "pos_embedding 4x4 -> 5x7; unused: cls_token, head.*, norm.*" in weights.report


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_hugging_face_vit(prefix, tmp_path, tiny):
    tensors = hugging_face(tiny.state_dict(), HF_VIT, HF_TOP, prefix)
    if prefix:
        tensors |= {"classifier.weight": tiny.head.weight, "classifier.bias": tiny.head.bias}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model, weights = ours(tmp_path / "pytorch_model.bin", "vit_ti16", (SIDE, SIDE), class_token=True)
    assert_equal_at_every_block(tiny, model, weights, (SIDE, SIDE))
    assert "Hugging Face ViTModel" in weights.report


@pytest.mark.parametrize("kept", [True, False])
def test_mae_pth_with_and_without_its_class_token(kept, tmp_path):
    net = random_timm("mae_b16")
    decoder = {"decoder_embed.weight": torch.ones(2, 3), "decoder_blocks.0.norm1.weight": torch.ones(2)}
    state = {**net.state_dict(), **decoder, "mask_token": torch.ones(1, 1, 2), "decoder_pos_embed": torch.ones(1, 2, 3)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    model, weights = ours(tmp_path / "mae.pth", "mae_b16", (SIDE, SIDE), class_token=kept)
    assert_equal_at_every_block(net if kept else without_class_token(net), model, weights, (SIDE, SIDE), norm=kept)
    count = 12 * DEPTH + 3 + kept  # a block has twelve; patch embedding and positions three; the class token one
    assert f"loaded {count} of {count} tensors" in weights.report


# --- DINOv2 ---


def test_dinov2_of_timm(tmp_path, dinov2):
    save_file(dinov2.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "input_size": [3, 518, 518]}})
    )
    model, weights = ours(tmp_path / "model.safetensors", "dinov2_s14", (56, 56))
    assert_equal_at_every_block(dinov2, model, weights, (56, 56))
    assert "mean (0.5, 0.4, 0.3), std (0.2, 0.2, 0.2) (config.json), 518x518; this run: mean (0.485" in weights.report


def test_dinov2_of_hugging_face(tmp_path, dinov2):
    tensors = hugging_face(dinov2.state_dict(), HF_DINOV2, HF_TOP, "dinov2.")
    tensors["dinov2.embeddings.mask_token"] = torch.zeros(1, 384)
    save_file(tensors, tmp_path / "model.safetensors")
    model, weights = ours(tmp_path / "model.safetensors", "dinov2_s14", (56, 56))
    assert_equal_at_every_block(dinov2, model, weights, (56, 56))


def test_dinov2_with_registers_in_its_own_names_and_in_timms(tmp_path):
    net = random_timm("dinov2_s14_reg4", patch=14, init_values=1e-5, reg_tokens=4, no_embed_class=True)
    save_file(net.state_dict(), tmp_path / "timm.safetensors")
    # Its authors' files give the class token a position, which timm adds to the token when it reads them.
    state = net.state_dict()
    position = torch.randn(1, 1, 384, generator=torch.Generator().manual_seed(2))
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - position
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    for name in ("timm.safetensors", "dinov2_vits14_reg4_pretrain.pth"):
        model, weights = ours(tmp_path / name, "dinov2_s14_reg4", (56, 56))
        assert_equal_at_every_block(net, model, weights, (56, 56))


def test_dinov2_does_not_fit_a_vit_without_its_parts(tmp_path, dinov2):
    torch.save(dinov2.state_dict(), tmp_path / "dinov2.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.ls1\.gamma \(384,\)"):
        ours(tmp_path / "dinov2.pth", "vit_s16", (56, 56), patch_size=14)


# --- PyTorch's files and resizing ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_torch_files_of_other_dtypes_strides_and_parameters(dtype, tmp_path):
    from taskexpert_jax.pretrained import files as weight_files

    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    saved = {"whole": base, "view": base[1:4, ::2], "turned": base.T, "p": torch.nn.Parameter(base[0]), "n": base[0, 0]}
    torch.save({"state_dict": saved}, tmp_path / "x.pt")
    tensors, _ = weight_files.read(str(tmp_path / "x.pt"))
    assert tensors.keys() == saved.keys()
    for name, tensor in saved.items():
        np.testing.assert_array_equal(tensors[name].astype(np.float64), tensor.detach().double().numpy())


def test_torch_files_of_the_old_format_are_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old\.pth"):
        ours(tmp_path / "old.pth", "vit_ti16", (SIDE, SIDE))


@pytest.mark.parametrize("target", [(14, 14), (37, 42), (32, 32), (28, 36), (5, 50)])
def test_positions_are_resized_as_pytorch_does(target):
    table = np.random.default_rng(0).normal(size=(24, 24, 5)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(table).permute(2, 0, 1)[None], size=target, mode="bicubic", align_corners=False
    )[0].permute(1, 2, 0)
    found = np.asarray(position_embedding.resize(jnp.asarray(table), target))
    assert np.abs(found - expected.numpy()).max() <= 1e-5
