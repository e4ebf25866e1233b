"""Our DINOv3 beside timm's, on the same random weights, through a file in each naming scheme."""

import functools

import pytest

from configs import nyud
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.tasks import from_config
from tests.models.test_timm_parity import DEPTH, SIDE, assert_equal_at_every_block, ours, randomised, timm, torch

from safetensors.torch import save_file  # isort: skip
from timm.models.eva import Eva  # isort: skip


@pytest.fixture(autouse=True, scope="module")
def _quiet_torch():
    torch.set_num_threads(2)
    with torch.no_grad():
        yield


def dinov3(variant, **fields):
    """timm's DINOv3 of a variant's shape, all parameters random; as in `timm.models.eva`, with fewer blocks."""
    model = nyud.get_config(variant).model
    shape = {"embed_dim": model.width, "depth": DEPTH, "num_heads": model.heads, "patch_size": 16}
    rotary = {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True, "use_rot_pos_emb": True}
    tokens = {"use_abs_pos_emb": False, "num_reg_tokens": 4, "use_fc_norm": False, "dynamic_img_size": True}
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-5)
    fields = {"qkv_bias": False, **fields}
    return randomised(
        Eva(num_classes=3, init_values=1e-5, norm_layer=norm, **shape, **rotary, **tokens, **fields).eval()
    )


def in_the_authors_names(net, gated=False):
    """Names of facebookresearch/dinov3, where one bias of q, k and v has a mask of its keys, which is 0."""
    renamed = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    names |= {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"} if gated else {}
    for name, tensor in net.state_dict().items():
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        if name.endswith("v_bias") or "head" in name:
            continue
        if name.endswith("q_bias"):
            at = name.removesuffix("q_bias")
            value = net.state_dict()[f"{at}v_bias"]
            renamed[f"{at}qkv.bias"] = torch.cat([tensor, torch.ones_like(tensor), value])  # masked, so not zero
            renamed[f"{at}qkv.bias_mask"] = torch.ones(3 * len(tensor))
        else:
            renamed[name] = tensor
    return renamed


def in_hugging_faces_names(net):
    """Names of transformers' DINOv3ViTModel."""
    top = {
        "cls_token": "cls_token",
        "reg_token": "register_tokens",
        "patch_embed.proj.weight": "patch_embeddings.weight",
    }
    top |= {"patch_embed.proj.bias": "patch_embeddings.bias"}
    names = {"gamma_1": "layer_scale1.lambda1", "gamma_2": "layer_scale2.lambda1", "attn.proj": "attention.o_proj"}
    names |= {"mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj", "mlp.fc1": "mlp.up_proj"}
    names |= {
        "mlp.fc2": "mlp.down_proj",
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
    }
    renamed = {"embeddings.mask_token": torch.zeros(1, 1, 384)}
    for name, tensor in net.state_dict().items():
        if name in top:
            renamed[f"embeddings.{top[name]}"] = tensor
        elif name.endswith("attn.qkv.weight"):
            at = name.replace("blocks.", "layer.").removesuffix("attn.qkv.weight")
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{at}attention.{part}_proj.weight"] = chunk.contiguous()
        elif not name.startswith("head"):
            for theirs, own in names.items():
                name = name.replace(theirs, own)
            renamed[name.replace("blocks.", "layer.")] = tensor
    return renamed


@pytest.mark.parametrize("size", [(SIDE, SIDE), (80, 112)])
@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("dinov3_s16", {}),
        ("dinov3_s16", {"qkv_bias": True}),
        ("dinov3_splus16", {"qkv_bias": True, "swiglu_mlp": True, "swiglu_align_to": 8}),
    ],
)
def test_dinov3_in_each_naming_scheme(variant, fields, size, tmp_path):
    net = dinov3(variant, **fields)
    files = {"timm.safetensors": net.state_dict(), "hugging_face.safetensors": in_hugging_faces_names(net)}
    if fields:
        files["dinov3.pth"] = in_the_authors_names(net, "swiglu_mlp" in fields)
    else:  # Hugging Face's files have these biases
        del files["hugging_face.safetensors"]
    for name, tensors in files.items():
        if name.endswith("pth"):
            torch.save(tensors, tmp_path / name)
        else:
            save_file(tensors, tmp_path / name)
        model, weights = ours(tmp_path / name, variant, size)
        assert_equal_at_every_block(net, model, weights, size)
        assert "DINOv3" in weights.report and "pos_embedding" not in weights.report


@pytest.mark.parametrize(
    ("variant", "theirs"),
    [
        ("dinov3_s16", "small"),
        ("dinov3_splus16", "small_plus"),
        ("dinov3_b16", "base"),
        ("dinov3_l16", "large"),
        ("dinov3_hplus16", "huge_plus"),
    ],
)
def test_dinov3_variants_have_the_sizes_of_timms(variant, theirs):
    with torch.device("meta"):
        net = timm.create_model(f"vit_{theirs}_patch16_dinov3", num_classes=0)
    config = nyud.get_config(variant)
    model = taskexpert.from_config(config, from_config(config))
    width, depth = config.model.width, config.model.depth
    expected = sum(parameter.numel() for parameter in net.parameters()) - 2 * width  # without its final norm
    assert budget.count(model).parameters["backbone"] == expected + 3 * width * depth  # with biases of q, k and v


def test_dinov3_does_not_fit_a_backbone_with_learned_positions(tmp_path):
    save_file(dinov3("dinov3_s16").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"\+ pos_embed \(1, \*, 384\): not in the file"):
        ours(tmp_path / "model.safetensors", "dinov2_s14_reg4", (SIDE, SIDE), patch_size=16)
