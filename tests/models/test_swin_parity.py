"""Our Swin Transformer beside timm's, on the same random weights, through a file in each naming scheme."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nyud
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.pretrained import load as pretrained
from taskexpert_jax.tasks import from_config
from tests.models.test_timm_parity import TOLERANCE, randomised, timm, torch

from safetensors.torch import save_file  # isort: skip
from timm.models import swin_transformer  # isort: skip

DEPTHS, HEADS, WIDTH = (2, 2, 4, 2), (1, 2, 4, 8), 32


@pytest.fixture(autouse=True, scope="module")
def _quiet_torch():
    torch.set_num_threads(2)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def net():
    """timm's net with the authors' way for dense prediction: windows of one size and shifts at every stage."""
    shape = {"embed_dim": WIDTH, "depths": DEPTHS, "num_heads": HEADS, "window_size": 7}
    free = {"strict_img_size": False, "always_partition": True}
    return randomised(swin_transformer.SwinTransformer(img_size=224, num_classes=3, **shape, **free).eval())


def padded_first(block, maps):
    """The attention of a block of timm's in the order of the authors' code for dense prediction.

    timm shifts a map before it pads it, so that opposite borders meet inside of a window where padding is needed.
    """
    _, height, width, _ = maps.shape
    (side, _), shift = block.window_size, block.shift_size
    padded = torch.nn.functional.pad(maps, (0, 0, 0, -width % side, 0, -height % side))
    shifted = torch.roll(padded, (-shift[0], -shift[1]), (1, 2))
    windows = swin_transformer.window_partition(shifted, block.window_size).flatten(1, 2)
    mixed = block.attn(windows, mask=block.get_attn_mask(shifted)).unflatten(1, block.window_size)
    mixed = torch.roll(swin_transformer.window_reverse(mixed, block.window_size, *padded.shape[1:3]), shift, (1, 2))
    return mixed[:, :height, :width]


def microsofts(net):
    """The authors' names: a merging belongs to the stage before it, and buffers are saved."""
    renamed = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    for name, tensor in net.state_dict().items():
        stage = re.match(r"layers\.(\d)\.downsample", name)
        name = name.replace(f"layers.{stage[1]}", f"layers.{int(stage[1]) - 1}") if stage else name
        renamed[name.replace("head.fc", "head")] = tensor
        if name.endswith("relative_position_bias_table"):
            renamed[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    return renamed


def hugging_faces(net):
    """Names of transformers' SwinForImageClassification."""
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    names |= {"attn.relative_position_bias_table": "attention.self.relative_position_bias_table"}
    top = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "patch_embed.norm": "embeddings.norm"}
    renamed = {"classifier.weight": torch.zeros(3, 256)}
    for name, tensor in microsofts(net).items():
        if name.startswith("head") or "attn_mask" in name or "index" in name:
            continue
        layer, kind = name.rsplit(".", 1) if "bias_table" not in name else (name, "")
        if layer.endswith("attn.qkv"):
            at = f"swin.encoder.{layer.removesuffix('attn.qkv')}attention.self"
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{at}.{part}.{kind}"] = chunk.contiguous()
        elif layer.startswith("layers"):
            for theirs, own in names.items():
                layer = re.sub(rf"\b{re.escape(theirs)}$", own, layer)
            renamed[f"swin.encoder.{layer}{kind and '.'}{kind}"] = tensor
        else:
            renamed[f"swin.{top.get(layer, 'layernorm')}.{kind}"] = tensor
    return renamed


def ours(path, size, **fields):
    """A config's model and what it loads of a file: (model, weights)."""
    config = nyud.get_config("swin_t")
    config.tasks, config.dtype, config.dataset.image_size = ("depth",), "float32", size
    config.model.pretrained, config.model.unroll = str(path), "no"
    config.model.swin.update({"width": WIDTH, "depths": DEPTHS, "heads": HEADS, **fields})
    model = taskexpert.from_config(config, from_config(config))
    return model, pretrained.read(config, model)


def taps(model, weights, image):
    tree = {}
    for name, array in weights.arrays.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return jax.jit(lambda p, x: model.backbone.apply({"params": p}, x, False))(tree, image)


@pytest.mark.parametrize(
    ("names", "size"),
    [("timm", (224, 224)), ("timm", (96, 160)), ("microsoft", (64, 224)), ("hugging_face", (96, 64))],
)
def test_the_taps_equal_timms(names, size, net, tmp_path, monkeypatch):
    """Sizes of whole windows, and with padding at every stage."""
    if size != (224, 224):
        monkeypatch.setattr(swin_transformer.SwinTransformerBlock, "_attn", padded_first)
    tensors = {"timm": net.state_dict, "microsoft": lambda: microsofts(net), "hugging_face": lambda: hugging_faces(net)}
    save_file({name: tensor.contiguous() for name, tensor in tensors[names]().items()}, tmp_path / "model.safetensors")
    model, weights = ours(tmp_path / "model.safetensors", size)
    image = 0.5 * torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    found = taps(model, weights, jnp.asarray(image.numpy().transpose(0, 2, 3, 1)))
    expected = net.forward_intermediates(image, output_fmt="NCHW", intermediates_only=True)
    assert len(found) == len(expected) == 4
    for tap, shape, other in zip(found, model.backbone.taps, expected, strict=True):
        assert tap.shape == (2, size[0] // shape.stride, size[1] // shape.stride, shape.channels)
        other = other.permute(0, 2, 3, 1).numpy()
        assert np.abs(np.asarray(tap) - other).max() <= TOLERANCE * np.abs(other).max(), shape


def test_weights_for_windows_of_another_size_are_refused(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    table = r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table: \(169, 1\) in the file, \(529, 1\) in the model"
    with pytest.raises(UserError, match=table):
        ours(tmp_path / "model.safetensors", (224, 224), window=12)


NAMES = {"swin_t": "tiny", "swin_s": "small", "swin_b": "base", "swin_l": "large"}


@pytest.mark.parametrize("variant", NAMES)
def test_the_variants_have_the_sizes_of_timms(variant):
    with torch.device("meta"):
        net = timm.create_model(f"swin_{NAMES[variant]}_patch4_window7_224", num_classes=0)
    config = nyud.get_config(variant)
    model = taskexpert.from_config(config, from_config(config))
    width = 8 * config.model.swin.width
    expected = sum(parameter.numel() for parameter in net.parameters()) - 2 * width  # without its final norm
    assert budget.count(model).parameters["backbone"] == expected
