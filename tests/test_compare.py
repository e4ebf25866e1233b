"""Comparison of runs: directions, best results, missing results, delta-m, and errors."""

import json
import os
import pathlib
from typing import Any

import pytest

from taskexpert_jax import compare
from taskexpert_jax.compare import Column
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation.published import PUBLISHED

PAPER = {"semseg": ("mIoU", 55.35), "depth": ("rmse", 0.5157), "normals": ("mean", 18.54), "edge": ("odsF", 78.40)}


def write(
    path: pathlib.Path, values: dict[str, tuple[str, float | None]], examples: int = 654, **dataset: Any
) -> pathlib.Path:
    """Writes the fields of an evaluation's metrics.json that a comparison reads."""
    content: dict[str, Any] = {
        "examples": examples,
        "dataset": {"name": "nyud", "split": "val", "fingerprint": "abc", **dataset},
        "published": {task: {"metric": metric, "value": value} for task, (metric, value) in values.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def cells(table: str) -> dict[str, list[str]]:
    """First cell -> the other cells of a row of the table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_best_is_bold_in_each_direction(tmp_path: pathlib.Path) -> None:
    one = write(tmp_path / "one.json", {"semseg": ("mIoU", 40.0), "depth": ("rmse", 0.61), "normals": ("mean", 20.0)})
    two = write(tmp_path / "two.json", {"semseg": ("mIoU", 41.5), "depth": ("rmse", 0.62), "edge": ("odsF", 70.0)})
    found = cells(compare.compare([one, two]))
    assert found["model"] == ["semseg mIoU (%) ↑", "depth RMSE (m) ↓", "normals mean angle (°) ↓", "edge odsF (%) ↑"]
    assert found[str(one)] == ["40.00", "**0.6100**", "**20.00**", "-"]
    assert found[str(two)] == ["**41.50**", "0.6200", "-", "**70.00**"]


def test_what_was_not_measured_is_a_gap(tmp_path: pathlib.Path) -> None:
    run = write(tmp_path / "run.json", {"semseg": ("mIoU", 40.0), "depth": ("rmse", None)})
    assert cells(compare.compare([run]))[str(run)] == ["**40.00**", "-"]


def test_a_workdir_stands_beside_the_papers_rows(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "run" / "evaluation" / "metrics.json", {**PAPER, "depth": ("rmse", 0.4)})
    found = cells(compare.compare([tmp_path / "run"], paper="nyud"))
    assert found[str(tmp_path / "run")] == ["55.35", "**0.4000**", "18.54", "78.40"]
    (unverified,) = (row for name, row in found.items() if name.startswith("TaskExpert (") and "unverified" in name)
    assert unverified == ["55.35", "0.5157", "18.54", "78.40"]
    assert found["PRISM (distilled ViT-B)"][0] == "**60.22**"
    assert found["MTMamba++ (Swin-L)"][3] == "**79.40**"
    assert len(found) == 2 + len(PUBLISHED["nyud"]) + 1  # head and rule


@pytest.mark.parametrize("benchmark", PUBLISHED)
def test_published_numbers_are_of_published_metrics(benchmark: str) -> None:
    rows = PUBLISHED[benchmark]
    columns = compare.columns(list(rows[0].values))
    assert {column.key for column in columns} == set(rows[0].values)
    assert {column.key for column in columns if not column.higher_is_better} == {
        key for key in rows[0].values if key in ("depth/rmse", "normals/mean")
    }
    for row in rows:
        assert 78 < row.values["semseg/mIoU"] < 85 or benchmark == "nyud"
        assert row.values["normals/mean"] < 20 < row.values["edge/odsF"]


def test_delta_m_is_the_mean_relative_gain() -> None:
    columns = [Column("semseg/mIoU", "", True), Column("depth/rmse", "", False)]
    values, single = {"semseg/mIoU": 44.0, "depth/rmse": 0.60}, {"semseg/mIoU": 40.0, "depth/rmse": 0.50}
    assert compare.delta_m(values, single, columns) == pytest.approx(100 * (0.1 - 0.2) / 2)
    assert compare.delta_m(single, values, columns) == pytest.approx(100 * (-4 / 44 + 0.1 / 0.6) / 2)
    assert compare.delta_m({"semseg/mIoU": 44.0}, single, columns) == pytest.approx(10.0)


def test_delta_m_takes_the_single_task_runs(tmp_path: pathlib.Path) -> None:
    run = write(tmp_path / "run.json", {"semseg": ("mIoU", 44.0), "depth": ("rmse", 0.60)})
    single = [
        write(tmp_path / "s.json", {"semseg": ("mIoU", 40.0)}),
        write(tmp_path / "d.json", {"depth": ("rmse", 0.50)}),
    ]
    assert cells(compare.compare([run], single=single))[str(run)][-1] == "**-5.00**"
    with_paper = cells(compare.compare([run], single=single, paper="nyud"))
    assert with_paper[str(run)][-1] == "**-5.00**"
    assert with_paper["InvPT"][-1] == "-"  # no single-task results for its other tasks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fingerprint": "other"},
            r"^.*two.json was evaluated on other data than .*one.json \(dataset.fingerprint 'oth",
        ),
        ({"name": "pascal_context"}, r"dataset.name 'pascal_context' and 'nyud'\)"),
        ({"split": "train"}, r"dataset.split 'train'"),
        ({"downscale": 0.5}, r"dataset.downscale 0.5 and 1.0\)"),
        ({"examples": 10}, r"\(examples 10 and 654\); .*evaluate both alike"),
    ],
)
def test_runs_on_other_data_are_refused(tmp_path: pathlib.Path, change: dict[str, Any], message: str) -> None:
    one = write(tmp_path / "one.json", PAPER)
    two = write(tmp_path / "two.json", PAPER, **change)
    with pytest.raises(UserError, match=message):
        compare.compare([one, two])
    with pytest.raises(UserError, match=message):
        compare.compare([one], single=[two])


def test_single_task_runs_on_a_folder_have_fingerprints_of_fewer_labels(tmp_path: pathlib.Path) -> None:
    run = write(tmp_path / "run.json", PAPER, fingerprint="sizes-1")
    single = [
        write(tmp_path / f"{task}.json", {task: found}, fingerprint=f"sizes-{task}") for task, found in PAPER.items()
    ]
    assert cells(compare.compare([run], single=single))[str(run)][-1] == "**+0.00**"
    with pytest.raises(UserError, match="on other data"):
        compare.compare([run, write(tmp_path / "other.json", PAPER, fingerprint="sizes-2")])


def test_what_cannot_be_compared_is_said_in_a_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: Any) -> str:
        assert compare.main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err

    good = write(tmp_path / "good.json", PAPER)
    (tmp_path / "run").mkdir()
    assert "run/evaluation/metrics.json is missing" in error(tmp_path / "run")
    (tmp_path / "bad.json").write_text("{}")
    assert "bad.json is not an evaluation's metrics.json" in error(good, tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("no JSON")
    assert "bad.json is not an evaluation's metrics.json" in error(tmp_path / "bad.json")
    for text, why in (
        ("[" * 100_000, "it is nested too deeply"),
        ('{"dataset": null, "published": {}, "examples": 1}', "dataset is None, and must be an object with fields"),
        (
            good.read_text().replace("55.35", '"55.35"'),
            "published.semseg.value is '55.35', and must be a finite number",
        ),
        (good.read_text().replace("55.35", "1e999"), "published.semseg.value is inf, and must be a finite number"),
        (good.read_text().replace("55.35", "9" * 400), "published.semseg.value is 999"),
        (good.read_text().replace("55.35", "9" * 5000), "it has a number of too many digits"),
        (good.read_text().replace("55.35", "[55.35]"), "published.semseg.value is [55.35], and must be"),
        (good.read_text().replace('"dataset"', '"published": {}, "dataset"'), "the key 'published' is given twice"),
        ("\xff", "it is not text in UTF-8"),
        ("", "it is empty"),
    ):
        (tmp_path / "bad.json").write_bytes(text.encode("latin-1"))
        assert f"bad.json is not an evaluation's metrics.json ({why}" in error(tmp_path / "bad.json")
    assert "--paper=pascal_context, but" in error(good, "--paper=pascal_context")
    single = write(tmp_path / "single.json", {"semseg": ("mIoU", 40.0)})
    assert "no single-task result for depth/rmse" in error(good, "--single", single)
    assert f"{single} has semseg/mIoU" in error(good, "--single", single, single)


def test_the_program_prints_the_table(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run.json", PAPER)
    assert compare.main([str(run), "--paper=nyud", "--markdown"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == compare.compare([run], paper="nyud")


def test_an_evaluation_that_is_older_than_a_checkpoint_is_said(tmp_path: pathlib.Path, capsys: Any) -> None:
    file = write(tmp_path / "run" / "evaluation" / "metrics.json", {"semseg": ("mIoU", 40.0)})
    for step, seconds in ((20, -60), (40, 60)):
        assert compare.compare([tmp_path / "run"]) and capsys.readouterr().err == ""
        folder = tmp_path / "run" / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        os.utime(folder, (0, file.stat().st_mtime + seconds))
    compare.compare([tmp_path / "run"])
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'run'} was trained further after this evaluation; evaluate it again\n"
    )
