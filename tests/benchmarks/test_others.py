"""The cost of other models: PyTorch's counter against layers counted by hand and our own count; wrong clones."""

import math
import sys

import pytest

from configs import nyud, pascal_context
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.tasks import from_config

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity installs it")

from benchmarks import others  # noqa: E402
from benchmarks.pytorch import multiply_adds, reference  # noqa: E402


class Attention(torch.nn.Module):
    def forward(self, tokens):
        return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


@pytest.mark.parametrize(
    ("net", "shape", "by_hand"),
    [
        (torch.nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 5 * 7),
        (torch.nn.Conv2d(4, 6, 3, padding=1), (1, 4, 8, 10), 8 * 10 * 9 * 4 * 6),
        (torch.nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), (1, 4, 8, 10), 4 * 5 * 9 * 4),
        (torch.nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 8, 10), 8 * 10 * 4 * 4 * 6),
        (Attention(), (1, 2, 11, 8), 2 * 2 * 11 * 11 * 8),
        (torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.GELU()), (1, 4, 8, 10), 0),
    ],
    ids=["linear", "conv", "depthwise", "transposed", "attention", "norm"],
)
def test_counter_on_layers_counted_by_hand(net, shape, by_hand):
    assert multiply_adds.count(net, shape) == by_hand


@pytest.mark.parametrize("module", [nyud, pascal_context])
def test_pytorchs_count_of_our_model_is_ours_without_the_gated_sums(module):
    """Two ways of counting the full-size model, which share no code; the sums are products that no operator shows."""
    config = module.get_config("vit_l16")
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    ours = budget.count(model)
    with torch.device("meta"):
        net = reference.TaskExpert(config, tasks)
    slots = model.decoder.experts.count + 1
    sums = model.backbone.stages * len(tasks) * math.prod(model.backbone.grid) * slots * model.decoder.width
    assert sum(parameter.numel() for parameter in net.parameters()) == ours.total_parameters
    assert multiply_adds.count(net, (1, 3, *config.dataset.image_size)) == ours.total_multiply_adds - sums


def test_a_folder_that_is_no_clone_is_one_line(tmp_path, monkeypatch, capsys):
    output = tmp_path / "others.json"
    monkeypatch.setattr(sys, "argv", ["others.py", f"--mlore={tmp_path}", f"--output={output}"])
    with pytest.raises(SystemExit) as ended:
        others.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: --mlore={tmp_path}: no utils/common_config.py there; "
        "give the folder of the clone that has utils/ and configs/\n"
    )
    assert not output.exists()
