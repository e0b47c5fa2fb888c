import json

import pytest


@pytest.mark.parametrize("what", ["train", "fewshot", "augment", "data", "start"])
def test_every_benchmark_prints_its_table_and_leaves_only_the_figures(what, run, tmp_path, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    options = ("--rounds", 1, "--images", 32, "--device", "cpu", "--json", "figures.json")
    process = run("tests/benchmark.py", what, *options, TMPDIR=str(temporary))
    assert process.returncode == 0, process.stderr
    assert not list(temporary.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    rows = json.loads((tmp_path / "figures.json").read_text())[what]
    lines = [line for line in process.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    for row in rows:
        assert any(row["what"] in line for line in lines)
        assert row["values"] and all(value > 0 for value in row["values"].values())
