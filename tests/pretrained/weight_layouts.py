"""Random ViT weights in each naming scheme, in NumPy only, and PyTorch files written without PyTorch."""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np


def random_blocks(*, width, depth, heads, patch, grid, mlp_ratio=4, seed=0):
    """A ViT's arrays by name, blocks' prefixed with their index; q, k and v as (C in, heads, C / heads)."""
    draw = np.random.default_rng(seed).normal
    each, hidden = width // heads, mlp_ratio * width
    shapes = {"patch": (patch, patch, 3, width), "patch_bias": (width,), "cls": (width,), "cls_position": (width,)}
    shapes["positions"] = (*grid, width)
    for i in range(depth):
        for name in ("query", "key", "value"):
            shapes[f"{i}/{name}"], shapes[f"{i}/{name}_bias"] = (width, heads, each), (heads, each)
        shapes[f"{i}/out"], shapes[f"{i}/out_bias"] = (heads, each, width), (width,)
        shapes[f"{i}/expand"], shapes[f"{i}/expand_bias"] = (width, hidden), (hidden,)
        shapes[f"{i}/contract"], shapes[f"{i}/contract_bias"] = (hidden, width), (width,)
        for name in ("norm1", "norm2"):
            shapes[f"{i}/{name}"] = shapes[f"{i}/{name}_bias"] = (width,)
    return {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _positions(vit):
    width = len(vit["cls"])
    return np.concatenate([vit["cls_position"][None], vit["positions"].reshape(-1, width)])[None]


def _depth(vit):
    return 1 + max(int(name.split("/")[0]) for name in vit if "/" in name)


def augreg(vit):
    """AugReg's names."""
    width = len(vit["cls"])
    arrays = {
        "embedding/kernel": vit["patch"],
        "embedding/bias": vit["patch_bias"],
        "cls": vit["cls"][None, None],
        "Transformer/posembed_input/pos_embedding": _positions(vit),
        "Transformer/encoder_norm/scale": np.ones(width, np.float32),
        "Transformer/encoder_norm/bias": np.ones(width, np.float32),
        "head/kernel": np.ones((width, 7), np.float32),
        "head/bias": np.ones(7, np.float32),
    }
    names = {"expand": "MlpBlock_3/Dense_0", "contract": "MlpBlock_3/Dense_1"}
    names |= {name: f"MultiHeadDotProductAttention_1/{name}" for name in ("query", "key", "value", "out")}
    for i in range(_depth(vit)):
        at = f"Transformer/encoderblock_{i}"
        for ours, theirs in names.items():
            arrays[f"{at}/{theirs}/kernel"], arrays[f"{at}/{theirs}/bias"] = vit[f"{i}/{ours}"], vit[f"{i}/{ours}_bias"]
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{at}/{theirs}/scale"], arrays[f"{at}/{theirs}/bias"] = vit[f"{i}/{ours}"], vit[f"{i}/{ours}_bias"]
    return arrays


def _pytorch(vit, patch, cls, positions, block, names, fused):
    width = len(vit["cls"])
    arrays = {
        f"{patch}.weight": vit["patch"].transpose(3, 2, 0, 1),
        f"{patch}.bias": vit["patch_bias"],
        cls: vit["cls"][None, None],
        positions: _positions(vit),
    }
    for i in range(_depth(vit)):
        at = block.format(i)
        rows = {n: vit[f"{i}/{n}"].reshape(width, width).T for n in ("query", "key", "value")}
        biases = {n: vit[f"{i}/{n}_bias"].reshape(width) for n in rows}
        if fused:
            arrays[f"{at}{fused}.weight"] = np.concatenate(list(rows.values()))
            arrays[f"{at}{fused}.bias"] = np.concatenate(list(biases.values()))
        else:
            for name in rows:
                arrays[f"{at}attention.attention.{name}.weight"] = rows[name]
                arrays[f"{at}attention.attention.{name}.bias"] = biases[name]
        for ours, theirs in names.items():
            weight = vit[f"{i}/{ours}"]
            arrays[f"{at}{theirs}.weight"] = weight if weight.ndim == 1 else weight.reshape(-1, weight.shape[-1]).T
            arrays[f"{at}{theirs}.bias"] = vit[f"{i}/{ours}_bias"]
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def timm(vit):
    """timm's names, with head and norm."""
    names = {"norm1": "norm1", "norm2": "norm2", "out": "attn.proj", "expand": "mlp.fc1", "contract": "mlp.fc2"}
    arrays = _pytorch(vit, "patch_embed.proj", "cls_token", "pos_embed", "blocks.{}.", names, "attn.qkv")
    width = len(vit["cls"])
    return arrays | {"norm.weight": np.ones(width, np.float32), "head.weight": np.ones((7, width), np.float32)}


def hugging_face(vit, prefix=""):
    """The names of transformers' ViTModel, with its pooler."""
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "out": "attention.output.dense"}
    names |= {"expand": "intermediate.dense", "contract": "output.dense"}
    top = ("embeddings.patch_embeddings.projection", "embeddings.cls_token", "embeddings.position_embeddings")
    arrays = _pytorch(vit, *top, "encoder.layer.{}.", names, "")
    arrays |= {"layernorm.weight": np.ones(3, np.float32), "pooler.dense.weight": np.ones((3, 3), np.float32)}
    return {prefix + name: array for name, array in arrays.items()}


# --- PyTorch's zip format ---


class _Storage:
    def __init__(self, key, array):
        self.key, self.array = key, array


class _Tensor:
    def __init__(self, array, key, size=None, stride=None):
        self.storage = _Storage(key, array)
        self.size = array.shape if size is None else size
        self.stride = tuple(step // array.itemsize for step in array.strides) if stride is None else stride


def write_torch(path, content, *, sizes=None):
    """Writes what `torch.save(content)` would; arrays become float32 tensors, other objects are pickled as they are.

    sizes: name -> (size, stride) that a tensor of a top-level dict claims to have.
    """
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}

    def rebuild(*_):
        raise AssertionError("only named, never called")

    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = ("torch._utils", *["_rebuild_tensor_v2"] * 2)
    modules["torch._utils"]._rebuild_tensor_v2 = rebuild
    kind = type("FloatStorage", (), {"__module__": "torch"})
    modules["torch"].FloatStorage = kind
    arrays = []

    def wrapped(value, name=""):
        if isinstance(value, np.ndarray):
            arrays.append(np.ascontiguousarray(value, np.float32))
            return _Tensor(arrays[-1], str(len(arrays) - 1), *(sizes or {}).get(name, ()))
        if isinstance(value, dict):
            return type(value)((key, wrapped(inner, key)) for key, inner in value.items())
        return value

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, _Storage):
                return ("storage", kind, value.key, "cpu", value.array.size)
            return None

        def reducer_override(self, value):
            if isinstance(value, _Tensor):
                return rebuild, (value.storage, 0, value.size, value.stride, False, collections.OrderedDict())
            return NotImplemented

    stream = io.BytesIO()
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        Pickler(stream, protocol=2).dump(wrapped(content))
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/byteorder", b"little")
        for i, array in enumerate(arrays):
            archive.writestr(f"archive/data/{i}", array.tobytes())
