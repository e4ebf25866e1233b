"""The ablation's rungs: what each is, that claims are tested at equal size, and the table over seeds."""

import json
import math
import shutil
import statistics

import pytest

from benchmarks import ablation as ablation_program
from benchmarks import seeds
from configs import ablation
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.tasks import from_config
from tests import xla

BASES = ("nyud,small", "pascal_context,small", "scenes,small", "nyud,vit_b16", "pascal_context,vit_l16")


def budget_of(variant):
    config = ablation.get_config(variant)
    return budget.count(taskexpert.from_config(config, from_config(config)))


def size(variant):
    """Parameters and multiply-adds."""
    count = budget_of(variant)
    return count.total_parameters, count.total_multiply_adds


@pytest.mark.parametrize("base", BASES)
def test_the_ladder_has_the_same_size_on_every_rung(base):
    small = base.endswith("small")
    full = size(f"full,{base}")
    compared = list(ablation.LADDER)
    if small:  # at full size, single-task models are those of the field: the same backbone and feature width
        compared += [rung for rung in ablation.rungs(ablation.get_config(f"full,{base}")) if rung.startswith("single_")]
    for rung in compared:
        assert size(f"{rung},{base}") == pytest.approx(full, rel=0.05), rung
    for rung in ablation.PLAIN:
        assert size(f"{rung},{base}") == pytest.approx(size(f"plain_full,{base}"), rel=0.05), rung


@pytest.mark.parametrize("benchmark", ["nyud", "pascal_context", "scenes"])
def test_the_baseline_has_the_multiply_adds_of_the_full_model_and_a_quarter_fewer_parameters(benchmark):
    (parameters, products), (of_full, of_full_products) = size(f"baseline,{benchmark}"), size(f"full,{benchmark}")
    assert products == pytest.approx(of_full_products, rel=0.05)
    assert parameters == pytest.approx(0.75 * of_full, rel=0.05)


@pytest.mark.parametrize("benchmark", ["nyud", "pascal_context", "scenes"])
def test_mlore_computes_what_the_full_model_computes(benchmark):
    of_mlore, of_full = (budget_of(f"{rung},{benchmark}") for rung in ("mlore", "full"))
    assert of_mlore.total_computed == pytest.approx(of_full.total_computed, rel=0.05)
    assert 0.8 * of_full.total_parameters < of_mlore.total_parameters < of_full.total_parameters


def fields(variant):
    model = ablation.get_config(variant).model
    return model.experts, model.gate.granularity, model.memory.read, model.memory.write, model.taps


@pytest.mark.parametrize(
    ("rung", "expected"),
    [
        ("static", (5, "uniform", "none", "gated", 4)),
        ("static_gates", (5, "static", "none", "gated", 4)),
        ("dynamic_gates", (5, "token", "none", "gated", 4)),
        ("static_gates_memory,nyud,vit_b16", (5, "static", "conv1x1", "gated", 4)),
        ("full", (5, "token", "conv1x1", "gated", 4)),
        ("plain_static", (5, "uniform", "none", "residual", 4)),
        ("plain_full", (5, "token", "conv1x1", "residual", 4)),
        ("no_write", (5, "token", "none", "replace", 4)),
        ("experts_8", (8, "token", "conv1x1", "gated", 4)),
        ("taps_1", (5, "token", "conv1x1", "gated", 1)),
        ("taps_all,nyud,vit_b16", (5, "token", "conv1x1", "gated", 12)),
        ("single_depth", (5, "uniform", "none", "gated", 4)),
    ],
)
def test_a_rung_is_what_its_name_says(rung, expected):
    assert fields(rung) == expected


def test_every_rung_builds_a_model_and_differs_from_the_full_one():
    names = ablation.rungs(ablation.get_config("full"))
    assert {"experts_1", "experts_3", "experts_8", "no_read", "no_write", "taps_1", "taps_2", "taps_all"} < set(names)
    full = ablation.get_config("full").model.to_json()
    for name in names:
        config = ablation.get_config(name)
        taskexpert.from_config(config, from_config(config))
        same = config.model.to_json() == full
        assert same == (name in ("full", "taps_all")), name  # the small model has a tap after each of its blocks


def test_single_task_configs_have_one_task_and_are_kept_by_it():
    config = ablation.get_config("single_normals,pascal_context,vit_b16")
    assert config.tasks == ("normals",) and config.checkpoint.best_task == "normals"


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("ful", r"'ful'.*static, static_gates"),
        ("full,coco", r"BENCHMARK nyud or pascal_context or scenes"),
        ("full,nyud,vit_b16,more", r"RUNG"),
        ("single_sal", r"'single_sal'"),  # not a task of NYUD
        ("full,nyud,vit_h14", r"'vit_h14'"),
    ],
)
def test_unknown_names_are_refused(variant, message):
    with pytest.raises(ValueError, match=message):
        ablation.get_config(variant)


MIOU = {"single_semseg": [40.0, 44.0], "static": [42.0, 46.2], "full": [46.2, 50.4]}
RMSE = {"single_depth": [0.5, 0.5], "static": [0.5, 0.55], "full": [0.4, 0.5]}
# Mean gate weights of two tasks, two taps and three expert slots, the last of which is the memory.
GATES = {
    "choices": ["expert 1", "expert 2", "memory"],
    "tasks": {
        "semseg": {"weights": [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], "entropy": [0.9, 0.8]},
        "depth": {"weights": [[0.5, 0.4, 0.1], [0.0, 0.0, 1.0]], "entropy": [0.9, 0.0]},
    },
}


@pytest.fixture
def evaluated(tmp_path):
    """Runs of two seeds as `--mode=evaluate` leaves them."""
    for rung in ("single_semseg", "single_depth", "static", "full"):
        for seed in (0, 1):
            published = {}
            if rung in MIOU:
                published["semseg"] = {"metric": "mIoU", "value": MIOU[rung][seed]}
            if rung in RMSE:
                published["depth"] = {"metric": "rmse", "value": RMSE[rung][seed]}
            dataset = {"name": "nyud", "split": "val", "fingerprint": "f"}
            content = {"published": published, "examples": 654, "dataset": dataset, "step": 500}
            if rung == "full":
                content["gates"] = GATES
            folder = tmp_path / rung / f"seed{seed}" / "evaluation"
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def program(monkeypatch):
    """Runs the program with arguments; returns its exit status."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["ablation.py", *map(str, arguments)])
        return ablation_program.main()

    return run


def test_the_table_has_means_deviations_and_delta_m(evaluated, capsys, program):
    rungs = ["static", "full", "single_semseg", "single_depth"]
    assert program(*rungs, "--seeds", 0, 1, f"--output={evaluated}") == 0  # trains nothing: every evaluation is there
    summary = json.loads((evaluated / "ablation.json").read_text())["summary"]
    assert summary["full"]["mean"]["semseg/mIoU"] == pytest.approx(48.3)
    assert summary["full"]["std"]["semseg/mIoU"] == pytest.approx(statistics.stdev(MIOU["full"]))
    # Against single-task means of 42 and 0.5: seed 0 +10 % and +20 %, seed 1 +20 % and 0 %.
    assert summary["full"]["mean"]["delta-m"] == pytest.approx((15 + 10) / 2)
    assert summary["static"]["mean"]["delta-m"] == pytest.approx((0 + 0) / 2 / 2 + (10 - 10) / 2 / 2)
    text = (evaluated / "ablation.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    row, *_ = [line for line in text.splitlines() if line.startswith("| full")]
    assert row == "| full | 2 | 48.30 ± 2.97 | 0.4500 ± 0.0707 | +12.50 ± 3.54 |"


def test_differences_are_taken_within_seeds(evaluated, program):
    assert program("static", "full", "--seeds", 0, 1, f"--output={evaluated}") == 0
    found = json.loads((evaluated / "ablation.json").read_text())["differences"]["full"]
    assert found["mean"]["semseg/mIoU"] == pytest.approx(4.2)  # 46.2 - 42 and 50.4 - 46.2, although each rung's seeds
    assert found["half_width"]["semseg/mIoU"] == pytest.approx(0, abs=1e-6)  # differ by 4.2
    assert found["mean"]["depth/rmse"] == pytest.approx(-0.075)
    # Relative gains over static: seed 0 +10 % and +20 %, seed 1 +9.09 % and +9.09 %.
    assert found["mean"]["gain"] == pytest.approx((15 + 100 / 11) / 2)
    text = (evaluated / "ablation.md").read_text()
    assert "| full | 2 | **+4.20 ± 0.00** | -0.0750 ± 0.3177 | +12.05 ± 37.54 |" in text


def test_the_memorys_largest_weight_tells_a_collapsed_gate(evaluated, program):
    assert program("static", "full", "--seeds", 0, 1, f"--output={evaluated}") == 0
    assert "| full | 0.30 0.30 | 1.00 1.00 |" in (evaluated / "ablation.md").read_text()


def test_reading_takes_what_is_there(evaluated, capsys, program):
    assert program("static", "dynamic_gates", "--seeds", 0, 1, 2, "--read", f"--output={evaluated}") == 0
    assert "| static | 2 | 44.10 ± 2.97 | 0.5250 ± 0.0354 |" in capsys.readouterr().out


def test_a_recorded_table_is_extended_without_its_workdirs(evaluated, tmp_path_factory, program, capsys):
    assert program("static", "--seeds", 0, 1, f"--output={evaluated}") == 0
    other = tmp_path_factory.mktemp("other")
    (other / "ablation.json").write_bytes((evaluated / "ablation.json").read_bytes())
    shutil.copytree(evaluated / "full", other / "full")
    assert program("full", "--seeds", 0, 1, f"--output={other}") == 0
    assert "| static | 2 | 44.10 ± 2.97 |" in capsys.readouterr().out.split("| full | 2 | 48.30")[1]
    assert program("full", "--seeds", 0, f"--output={other}", "--base=pascal_context") == 2
    assert "has runs with base '', not 'pascal_context'" in capsys.readouterr().err


def test_a_table_keeps_what_another_call_added_meanwhile(evaluated, program, monkeypatch):
    def train(*_):
        monkeypatch.undo()
        assert program("full", "--seeds", 0, f"--output={evaluated}", "--read") == 0
        return True

    monkeypatch.setattr(ablation_program, "train", train)
    assert program("static", "--seeds", 0, f"--output={evaluated}") == 0
    assert {run["rung"] for run in json.loads((evaluated / "ablation.json").read_text())["runs"]} == {"static", "full"}


def test_a_run_that_fails_is_said_and_leaves_the_others(evaluated, capsys, program):
    extra = ["--", "--config.no_such_field=1"]
    assert program("static", "dynamic_gates", "--seeds", 0, f"--output={evaluated}", *extra) == 1
    out = capsys.readouterr().out
    assert "dynamic_gates seed 0: --mode=train failed: error: unknown config field 'no_such_field'" in out
    assert "| static | 1 | 42.00 | 0.5000 |" in out


def test_a_rung_trains_and_is_evaluated(tmp_path, program, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla.flags(1))
    setting = ["--base=scenes,tiny", "--seeds", 3, f"--output={tmp_path}"]
    fields = {"tasks": "('semseg','depth')", "model.taps": 2, "model.depth": 2, "num_steps": 2}
    assert program("full", *setting, "--", *(f"--config.{field}={value}" for field, value in fields.items())) == 0
    content = json.loads((tmp_path / "ablation.json").read_text())
    (run,) = content["runs"]
    assert run["rung"] == "full" and run["seed"] == 3 and set(run["gates"]) == {"semseg", "depth"}
    assert content["summary"]["full"]["mean"].keys() == {"semseg/mIoU", "depth/rmse"}
    assert run["losses"]["step"] == [2] and run["losses"]["depth"][0] > 0
    # An evaluation of a run that was stopped before is none of the finished run.
    evaluation = tmp_path / "full" / "seed3" / "evaluation" / "metrics.json"
    evaluation.write_text(evaluation.read_text().replace('"step": 2', '"step": 1'))
    (tmp_path / "ablation.json").unlink()
    assert program("full", *setting, "--read") == 2


def test_a_diverged_seed_makes_the_deviation_nan():
    results = [seeds.Result("full", seed, {"semseg/mIoU": value}) for seed, value in enumerate((10.0, math.nan))]
    assert math.isnan(seeds.summarise(results)["full"]["std"]["semseg/mIoU"])


REST = {"values": {}, "gates": None, "slots": [], "losses": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"setting": {}, "runs": [', "is not a table"),
        ({"setting": {}, "runs": {}}, "runs is {}, and must be an array"),
        ({"setting": {}, "runs": [{"rung": 1, "seed": 0, **REST}]}, "runs.0.rung is 1, and must be text"),
    ],
)
def test_a_damaged_table_is_refused_and_kept(evaluated, capsys, program, content, message):
    text = content if isinstance(content, str) else json.dumps(content)
    (evaluated / "ablation.json").write_text(text)
    assert program("static", "--seeds", 0, f"--output={evaluated}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and "move it away" in line
    assert (evaluated / "ablation.json").read_text() == text


def test_a_recorded_rung_that_no_longer_exists_is_refused(evaluated, capsys, program):
    assert program("static", "--seeds", 0, f"--output={evaluated}") == 0
    table = evaluated / "ablation.json"
    table.write_text(table.read_text().replace('"rung": "static"', '"rung": "gate_former"'))
    assert program("full", "--seeds", 0, f"--output={evaluated}") == 2
    assert "has runs of another version (unknown rung 'gate_former'" in capsys.readouterr().err


def test_wrong_arguments_and_damaged_runs_get_one_line(evaluated, capsys, program):
    assert program("fool", f"--output={evaluated}") == 2
    assert "unknown rung 'fool'" in capsys.readouterr().err
    for argument in ("--jobs=0", "--seeds=-1"):
        with pytest.raises(SystemExit):
            program("static", argument, f"--output={evaluated}")
        assert argument.replace("seeds=", "seeds ") in capsys.readouterr().err
    assert program("taps_1", "--read", f"--output={evaluated}") == 2
    assert "has no finished run of taps_1: train them without --read" in capsys.readouterr().err
    file = evaluated / "static" / "seed0"
    assert program("static", f"--output={file / 'evaluation' / 'metrics.json'}") == 2
    assert "a folder above it, is a file" in capsys.readouterr().err
    (file / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert program("static", "--seeds", 0, f"--output={evaluated}") == 2
    assert "seed0/metrics.jsonl is damaged" in capsys.readouterr().err
    (file / "evaluation" / "metrics.json").write_text("{")
    (file / "metrics.jsonl").unlink()
    assert program("static", "--seeds", 0, f"--output={evaluated}") == 2
    assert "is not an evaluation's metrics.json" in capsys.readouterr().err
    assert not (evaluated / "ablation.json").exists()


def test_finished_runs_of_another_setting_are_not_read(evaluated, capsys, program):
    config = ablation.get_config("static")
    config.seed, config.num_steps, config.dataset.data_dir = 0, 500, "data"
    (evaluated / "static" / "seed0" / "config.json").write_text(config.to_json())
    given = ["static", "--seeds", 0, f"--output={evaluated}"]
    assert program(*given, "--base=nyud,tiny") == 2
    assert "has a run with variant 'static,nyud,small', not 'static,nyud,tiny'" in capsys.readouterr().err
    assert program(*given, "--", "--config.num_steps=600") == 2
    assert "has a run with num_steps 500, not '600'" in capsys.readouterr().err
    assert program(*given, "--", "--config.num_steps=5_00", "--config.dataset.data_dir=elsewhere") == 0


def test_a_reference_without_a_metric_or_with_0_gives_no_gain():
    values = {"semseg/mIoU": 10.0, "depth/rmse": 0.5}
    results = [seeds.Result("full", 0, values), seeds.Result("static", 0, {**values, "semseg/mIoU": 0.0})]
    assert math.isnan(seeds.differences(results, "static")["full"]["mean"]["gain"])
    results[1] = seeds.Result("single_depth", 0, {"depth/rmse": 1.0})
    assert seeds.differences(results, "single_depth")["full"]["mean"]["gain"] == 50.0


def test_null_metrics_are_nan_and_do_not_decide_the_decimals(evaluated, program):
    file = evaluated / "full" / "seed0" / "evaluation" / "metrics.json"
    content = json.loads(file.read_text())
    content["published"]["semseg"]["value"] = None
    file.write_text(json.dumps(content))
    for _ in range(2):  # the second time from the table
        assert program("full", "static", "--seeds", 0, 1, f"--output={evaluated}") == 0
        text = (evaluated / "ablation.md").read_text()
        assert "| full | 2 | nan | 0.4500 ± 0.0707 |" in text and "| static | 2 | 44.10 ± 2.97 |" in text


def test_a_rung_without_runs_to_compare_with_is_named(evaluated, capsys, program):
    assert program("full", "--seeds", 0, "--against=taps_1", f"--output={evaluated}") == 0
    assert "no differences: no finished run of taps_1, which --against names" in capsys.readouterr().out
