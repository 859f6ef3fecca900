"A grid of runs: what is done is skipped, what was killed continues, the table says all."
import csv
import os

import pytest

from camflow.files import InputError
from camflow.lab import sweep as sweeping
from camflow.lab.registry import scan, update
from camflow.lab.sweep import axis, split_values, sweep
from tests.test_cli import camflow
from tests.test_lab import make_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMFLOW_REPORTS", str(folder/"reports"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CAMFLOW_GRACE", "1")
        yield make_toy(folder)


def table(folder): return list(csv.DictReader((folder/"table.csv").open()))


def test_values_of_an_axis(toy):
    from camflow.lab.parameters import notebook_parameters
    declared = notebook_parameters(toy)
    assert axis("lr=0.1, 0.2", declared) == ("lr", [0.1, 0.2]) and axis("steps=3", declared) == ("steps", [3])
    assert split_values('a="x,y",[1,[2,3]]') == ['a="x,y"', "[1,[2,3]]"]
    for wrong, words in (("lr", "must read"), ("lr=0.1,0.1", "given twice")):
        with pytest.raises(InputError, match=words): axis(wrong, declared)


def test_bad_points_start_nothing(toy, tmp_path):
    with pytest.raises(InputError, match="steps must be int"): sweep(str(toy), {"steps": [1, "many"]}, root=tmp_path)
    done = camflow("sweep", str(toy), "-p", "steps=3", CAMFLOW_REPORTS=str(tmp_path))
    assert done.returncode == 2 and "nothing to sweep over" in done.stderr
    done = camflow("sweep", str(toy), "--seeds", "0,1", CAMFLOW_REPORTS=str(tmp_path))
    assert done.returncode == 2 and "no parameter seed" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_sweep_runs_and_skips_what_is_done(toy):
    done = camflow("sweep", str(toy), "-p", "steps=2", "-p", "lr=0.1,0.5", "--jobs", "2")
    assert done.returncode == 0 and "2/2 ok" in done.stderr, done.stderr
    page = sweeping.Path(done.stdout.strip())
    assert [(row["lr"], row["status"], float(row["loss"])) for row in table(page.parent)] == [("0.1", "ok", pytest.approx(0.81)), ("0.5", "ok", 0.25)]
    assert "2 points" in page.read_text() and page.read_text().count("report.html") == 2 and len(scan()) == 2
    assert sweep(str(toy), {"lr": [0.1, 0.5]}, params={"steps": 2}) == page.parent and len(scan()) == 2


@pytest.mark.slow
def test_a_killed_point_continues_and_a_grid_grows(toy):
    sweep(str(toy), {"lr": [0.1, 0.5]}, params={"steps": 2})
    folder = sweeping.sweep_folder(str(toy), None, {"steps": 2}, {"lr": []})
    first = table(folder)
    update(first[1]["run"], status="killed")                                      # as after a power loss: it continues in its own folder
    before = len(scan())
    assert sweep(str(toy), {"lr": [0.1, 0.5, 0.9]}, params={"steps": 2}, jobs=2) == folder
    rows = table(folder)
    assert [row["run"] for row in rows[:2]] == [row["run"] for row in first] and [row["status"] for row in rows] == ["ok"] * 3 and len(scan()) == before + 1
    assert float(rows[2]["loss"]) == pytest.approx(0.01) and sum(len(run.info.get("attempts", [])) for run in scan()) == 1


def test_mean_over_seeds():
    rows = [{"lr": lr, "seed": seed, "status": "ok" if seed < 2 else "failed", "loss": lr + seed if seed < 2 else None, "run": ""} for lr in (1, 2) for seed in (0, 1, 2)]
    means = sweeping.over_seeds(rows, {"lr": [1, 2], "seed": [0, 1, 2]})
    assert [(m["lr"], m["seeds"], m["failed"], m["loss"]) for m in means] == [(1, 2, 1, 1.5), (2, 2, 1, 2.5)] and means[0]["loss sd"] == pytest.approx(0.5**0.5)
