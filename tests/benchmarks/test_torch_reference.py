"""The PyTorch reference of the benchmarks computes what ours does: predictions, losses, gradients, one optimiser step.

Float32 on the CPU with the same weights, all of them random. Needs PyTorch; skipped where it is absent.
"""

import copy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import random_batch
from configs import nyud
from taskexpert_jax.config import IMAGENET
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import inputs
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity installs it")

from benchmarks.pytorch import reference as torch_reference  # noqa: E402
from benchmarks.pytorch import weights as torch_weights  # noqa: E402

pytestmark = pytest.mark.slow

TASKS = ("semseg", "depth", "normals", "edge", "human_parts", "sal")


class Pair:
    """Our model and the reference with the same random weights, a batch, and what ours makes of it."""

    def __init__(self):
        config = self.config = nyud.get_config("tiny")
        config.tasks = TASKS
        config.loss_weights = {name: 1.0 + index for index, name in enumerate(TASKS)}
        config.dataset.image_size = (48, 64)
        config.dtype, config.model.unroll, config.model.drop_path = "float32", "no", 0.0
        self.tasks = from_config(config)
        self.names = [task.name for task in self.tasks]
        self.model = taskexpert.from_config(config, self.tasks)
        self.batch = random_batch.make(config, self.tasks, 3, seed=0, whole=False)
        self.picture = np.array(
            inputs.normalise(jnp.asarray(self.batch["image"]), jnp.asarray(self.batch["window"]), IMAGENET)
        )
        variables = _random_variables(self.model, self.picture)
        self.params, self.batch_stats = variables["params"], variables["batch_stats"]
        self.net = torch_reference.TaskExpert(config, self.tasks)
        self.net.load_state_dict(torch_weights.state_dict(self.params, self.batch_stats, self.names), strict=True)
        self.torch_batch = random_batch.as_tensors(self.batch, "cpu")

    def train(self):
        """Our losses, gradients of the weighted total, and the new batch statistics."""

        def loss_fn(params):
            predictions, updates = self.model.apply(
                {"params": params, "batch_stats": self.batch_stats},
                self.picture,
                train=True,
                rngs={"drop_path": jax.random.key(0)},  # asked for, though nothing is dropped
                mutable=["batch_stats"],
            )
            losses = {t.name: t.loss(predictions[t.name], self.batch[t.name], self.batch["mask"]) for t in self.tasks}
            total = sum(task.loss_weight * losses[task.name] for task in self.tasks)
            return total, (losses, updates["batch_stats"])

        (_, aux), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(self.params)
        return *jax.device_get(aux), jax.device_get(grads)


def _random_variables(model, picture):
    """Every parameter and statistic random, so that none can be mixed up or left out unseen."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        noise = 0.05 * rng.standard_normal(shape.shape, np.float32)
        return {"scale": 1.0 + noise, "var": 0.5 + np.abs(noise)}.get(path[-1].key, noise)

    shapes = nn.meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), picture, train=False)))
    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.fixture(scope="module")
def pair():
    torch.set_num_threads(2)
    return Pair()


@pytest.fixture(scope="module")
def trained(pair):
    """One forward and backward pass: our losses, gradients and statistics, and the reference's."""
    pair.net.train()
    losses = torch_reference.make_loss(pair.net, pair.config, pair.tasks)(pair.torch_batch)
    total = sum(task.loss_weight * losses[task.name] for task in pair.tasks)
    total.backward()
    return pair.train(), losses


def distance(ours, reference):
    """The largest difference, relative to the largest value."""
    return np.max(np.abs(np.asarray(ours) - np.asarray(reference))) / np.max(np.abs(reference))


def test_predictions_are_equal(pair):
    ours = jax.jit(lambda v, x: pair.model.apply(v, x, train=False))(
        {"params": pair.params, "batch_stats": pair.batch_stats}, pair.picture
    )
    pair.net.eval()
    with torch.no_grad():
        reference = pair.net(torch.from_numpy(pair.picture).permute(0, 3, 1, 2))
    assert list(reference) == pair.names
    for name in pair.names:
        assert distance(ours[name], reference[name].permute(0, 2, 3, 1).numpy()) < 1e-4, name


def test_normalised_pictures_are_equal(pair):
    by = pair.model.normalisation
    batch = pair.torch_batch
    found = torch_reference.normalise(batch["image"], batch["window"], by.mean, by.std)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), pair.picture, rtol=1e-5, atol=1e-6)


def test_losses_are_equal(trained):
    (ours, _, _), reference = trained
    for name, loss in reference.items():
        np.testing.assert_allclose(ours[name], loss.item(), rtol=1e-4, err_msg=name)


def test_gradients_of_all_parameters_are_equal(pair, trained):
    (_, _, grads), _ = trained
    ours = torch_weights.state_dict(grads, {}, pair.names)
    reference = {name: parameter.grad for name, parameter in pair.net.named_parameters()}
    assert set(ours) == set(reference)
    for name, gradient in reference.items():
        assert distance(ours[name], gradient.numpy()) < 1e-3, name


def test_running_statistics_are_equal(pair, trained):
    """Flax keeps the biased variance and PyTorch the unbiased one; nothing else differs."""
    (_, after, _), _ = trained
    ours = torch_weights.state_dict({}, after, pair.names)
    before = torch_weights.state_dict({}, pair.batch_stats, pair.names)
    images, (height, width) = len(pair.picture), pair.net.grid
    for name, value in pair.net.state_dict().items():
        if name.endswith("running_mean"):
            assert distance(ours[name], value.numpy()) < 1e-4, name
        if name.endswith("running_var"):
            upsample = pair.config.model.head_upsample if name.startswith("heads.") else 1
            count = images * height * width * upsample**2
            unbiased = 0.9 * before[name] + (ours[name] - 0.9 * before[name]) * count / (count - 1)
            assert distance(unbiased, value.numpy()) < 1e-4, name


def test_optimiser_makes_the_same_step(pair):
    """From the same random gradients: Adam's first step is as large where a gradient is nothing but rounding."""
    net = copy.deepcopy(pair.net)
    rng = np.random.default_rng(1)
    grads = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), pair.params)
    assert float(optax.tree.norm(grads)) > pair.config.optimizer.clip_norm, "clipping would not be seen"
    tx = optimizer.build(pair.config, pair.model.backbone)
    updates = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, pair.params)
    ours = torch_weights.state_dict(jax.device_get(updates), {}, pair.names)
    given = torch_weights.state_dict(grads, {}, pair.names)
    adam, _ = torch_reference.make_optimizer(net, pair.config)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for name, parameter in net.named_parameters():
        parameter.grad = given[name]
    torch.nn.utils.clip_grad_norm_(net.parameters(), pair.config.optimizer.clip_norm)
    adam.step()
    for name, parameter in net.named_parameters():
        step = (parameter.detach() - before[name]).numpy()  # known to the last digit of the parameter
        np.testing.assert_allclose(step, ours[name], atol=0.02 * pair.config.optimizer.learning_rate, err_msg=name)


def test_whole_training_step_lowers_the_loss(pair):
    """The step that is timed, on one batch; in float32, for which PyTorch has fast convolutions on every CPU."""
    net, config = copy.deepcopy(pair.net), pair.config.copy_and_resolve_references()
    config.optimizer.learning_rate = 1e-3
    step = torch_reference.make_train_step(net.train(), config, pair.tasks, bfloat16=False, compiled=False)
    totals = [step(pair.torch_batch).item() for _ in range(3)]
    assert totals[-1] < totals[0]


def test_other_switches_are_refused():
    config = nyud.get_config("tiny")
    config.model.memory.write = "residual"
    with pytest.raises(UserError, match=r"config\.model\.memory\.write='residual': .*'gated'"):
        torch_reference.TaskExpert(config, from_config(config))
