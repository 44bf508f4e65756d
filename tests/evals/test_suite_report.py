"""Tables and plots from results files alone: means over settings and tasks by hand, incomplete files, other files."""

from __future__ import annotations

import json

import pytest

from everlearn.errors import InvalidArgument
from everlearn.evals import report, suite_report
from everlearn.evals.results import write_json
from everlearn.evals.suite import COLUMNS, TUNING_SEED
from everlearn.evals.suite_report import VIEWS, cell, draw_suite, headline, suite_table


def row(task, setting, model, seed, metric, value, **changes):
    common = dict.fromkeys(COLUMNS, 1)
    named = {"task": task, "setting": setting, "model": model, "seed": seed, "metric": metric, "value": value}
    rest = {"options": {"lr": 0.01}, "run": f"{model}|{seed}", "versions": {"torch": "2"}, "command": "everlearn eval"}
    return {**common, "total_seconds": 90, "parameters": 1000, **rest, **named, **changes}


def results(suite, rows, complete=True):
    protocol = {"budget": "small", "notes": ["less of everything"]}
    return {"complete": complete, "suite": suite, "version": 1, "protocol": protocol, "rows": rows}


MAD_ROWS = [
    row(task, setting, "hope", seed, "macro", value)
    for task, setting, values in (
        ("a", "baseline", (0.5, 0.7)),
        ("a", "vocab=32", (0.1, 0.3)),
        ("b", "baseline", (0.9, 0.9)),
    )
    for seed, value in enumerate(values)
] + [row("a", "baseline", "hope", TUNING_SEED, "macro", 0.0), row("a", "baseline", "hope", 0, "validation", 0.0)]


def test_a_score_is_the_mean_over_tasks_of_the_mean_over_settings():
    finals = [r for r in MAD_ROWS if r["seed"] != TUNING_SEED and r["metric"] == "macro"]
    columns, scale = headline("mad", finals)
    assert ([label for label, _ in columns], scale) == (["a", "b", "mean"], 100)
    cells = {label: cell(finals, wanted) for label, wanted in columns}
    assert cells["a"] == pytest.approx([0.3, 0.5])
    assert cells["b"] == pytest.approx([0.9, 0.9])
    assert cells["mean"] == pytest.approx([0.6, 0.7])


def test_the_table_has_notes_intervals_costs_and_commands():
    text = suite_table(results("mad", [*MAD_ROWS, *(row("a", "baseline", "samba", s, "macro", None) for s in (0, 1))]))
    assert "* less of everything" in text
    assert "| model | a | b | mean |" in text
    assert "| hope | 40 ± 1.3e+02 | 90 ± 0 | 65 ± 64 |" in text
    assert "| samba | diverged | - | diverged |" in text
    assert "| hope | 1,000 | 3 | 1 | 1 s | 4 min | 0 MiB | lr 0.01 |" in text
    assert "* `everlearn eval`, commit 1, 1" in text
    assert "Incomplete" not in text
    assert "Incomplete" in suite_table(results("mad", MAD_ROWS, complete=False))
    assert suite_table(results("mad", [], complete=False)).startswith("# mad: budget small")


def test_plots_and_pages_are_drawn_for_every_suite(tmp_path):
    lengths = [
        row(task, f"length={n}", model, seed, metric, 0.5)
        for task, metric in (("qa1", "accuracy"), ("memory", "cache_bytes"))
        for n in (0, 64, 128)
        for model in ("hope", "samba")
        for seed in (0, 1)
    ]
    books = [row("books", "", "hope", 0, "perplexity", 12.0), row("blimp", "", "hope", 0, "accuracy", 0.6)]
    made = {
        "formal": [row("parity", "bin1", "hope", 0, "sequences", 1.0)],
        "mad": MAD_ROWS, "niah": lengths, "babilong": lengths, "lm": books, "ablation": books[:1],
    }  # fmt: skip
    assert set(made) == set(VIEWS)
    for suite, rows in made.items():
        write_json(tmp_path / f"{suite}.json", results(suite, rows))
    write_json(tmp_path / "lm-longer.json", results("lm", books))
    (tmp_path / "speed.json").write_text("[]")
    written = {path.name for path in report.draw_all(tmp_path)}
    assert "README.md" in written
    for suite in made:
        endings = ("", "-memory") if suite in ("niah", "babilong") else ("",)
        assert {f"{suite}.md", *(f"{suite}{e}.{kind}" for e in endings for kind in ("png", "svg"))} <= written
    assert all((tmp_path / name).stat().st_size for name in written)
    index = (tmp_path / "README.md").read_text()
    assert "* [niah](niah.md)\n  ![niah.png](niah.png)\n  ![niah-memory.png](niah-memory.png)" in index
    assert "* [lm](lm.md)\n  ![lm.png](lm.png)\n" in index, "only its own plots"
    assert "| hope | 50 ± 0 | 50 ± 0 | 50 ± 0 |" in (tmp_path / "babilong.md").read_text()


def test_an_empty_incomplete_file_has_a_page_and_no_plot(tmp_path):
    write_json(tmp_path / "lm.json", results("lm", [], complete=False))
    assert [path.name for path in draw_suite(tmp_path / "lm.json")] == ["lm.md"]


def test_a_folder_without_results_is_an_error(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"suite": "other"}))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InvalidArgument, match="folder: there is no results file"):
        report.draw_all(tmp_path)
    assert suite_report.path_suite(tmp_path / "broken.json") == ""


def test_no_two_models_have_one_colour():
    assert len({suite_report._color(number) for number in range(20)}) == 20
