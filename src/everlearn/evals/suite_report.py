"""Tables (Markdown) and plots (PNG, SVG) of the from-scratch suites, drawn from their results files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlearn.evals.results import Row, duration, interval, mean_interval, read_results, write_text
from everlearn.evals.suite import TUNING_SEED, VALIDATION

__all__ = ["draw_suite", "headline", "suite_table"]

Column = tuple[str, Callable[[Row], bool]]


@dataclass(frozen=True)
class View:
    """What of a suite is shown first.

    Args:
        metric: the metric of the headline's columns, None for every (task, metric) pair as a column of its own.
        by: what the columns are: ``"task"``, ``"setting"`` or ``"both"``; over the rest is averaged, a seed at a time.
        overall: also show the mean over tasks of the columns.
        scale: factor of the values (100 for per cent).
    """

    metric: str | None
    by: str = "task"
    overall: bool = False
    scale: float = 1.0


# suite -> its headline
VIEWS: dict[str, View] = {
    "formal": View("sequences", by="both", scale=100),
    "mad": View("macro", overall=True, scale=100),
    "niah": View("accuracy", by="setting", scale=100),
    "babilong": View("accuracy", by="setting", scale=100),
    "lm": View(None),
    "ablation": View(None),
}


def draw_suite(path: Path, out: Path | None = None) -> list[Path]:
    """Write ``{suite}.md`` and the plots of a results file, complete or not, and return their paths.

    Args:
        path: a results file of one of :data:`VIEWS`.
        out: folder for them, by default the file's.

    Raises:
        InvalidArgument: it is no results file of such a suite.
    """
    kept = read_results(path, path_suite(path))
    out = path.parent if out is None else out
    paths = [out / f"{path.stem}.md"]
    write_text(paths[0], suite_table(kept))
    rows = _finals(kept["rows"])
    figures = [("", _bars(kept, rows))] if rows else []
    if any(_length(row["setting"]) is not None for row in rows):
        figures = [("", _against_length(kept, rows)), ("-memory", _memory(rows))]
    for ending, figure in figures:
        for kind in ("png", "svg"):
            paths.append(out / f"{path.stem}{ending}.{kind}")
            figure.savefig(paths[-1], dpi=120)
    return paths


def path_suite(path: Path) -> str:
    """Return the suite a results file says it is of, or "" where it says none."""
    import json

    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(kept.get("suite", "")) if isinstance(kept, dict) else ""


def suite_table(kept: dict[str, Any]) -> str:
    """Return the Markdown page of a results file: what was scaled down, the headline, every measure, and the costs."""
    rows, protocol = _finals(kept["rows"]), kept["protocol"]
    lines = [f"# {kept['suite']}: budget {protocol['budget']}", ""]
    if not kept["complete"]:
        lines += ["**Incomplete: the evaluation has not ended.**", ""]
    lines += ["Against the published protocol:", "", *(f"* {note}" for note in protocol["notes"]), ""]
    if not rows:
        return "\n".join(lines)
    models = list(dict.fromkeys(row["model"] for row in rows))
    seeds = sorted({row["seed"] for row in rows})
    columns, scale = headline(kept["suite"], rows)
    percent = " (per cent)" if scale == 100 else ""
    lines += [f"Mean ± half of the 95% interval over seeds {', '.join(map(str, seeds))}{percent}.", ""]
    lines += [*_grid(models, columns, rows, scale), ""]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for task in tasks:
        here = [row for row in rows if row["task"] == task]
        named = list(dict.fromkeys((row["setting"], row["metric"]) for row in here))
        every: list[Column] = [(" ".join(filter(None, pair)), _is(pair)) for pair in named]
        lines += [f"## {task}", "", *_grid(models, every, here, 1.0), ""]
    lines += ["## Runs", "", *_costs(models, kept["rows"]), ""]
    commands = dict.fromkeys((row["command"], row["commit"], row["machine"]) for row in kept["rows"])
    lines += [f"* `{command}`, commit {commit}, {machine}" for command, commit, machine in commands]
    versions = ", ".join(f"{name} {version}" for name, version in kept["rows"][-1]["versions"].items())
    return "\n".join([*lines, f"* {versions}", ""])


def headline(suite: str, rows: Sequence[Row]) -> tuple[list[Column], float]:
    """Return the columns of a suite's first table, each a label and which rows it averages, and their scale."""
    view = VIEWS[suite]
    if view.metric is None:
        pairs = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
        return [(f"{task} {metric}", _has(task=task, metric=metric)) for task, metric in pairs], view.scale
    mine = [row for row in rows if row["metric"] == view.metric]
    names = {"task": ("task",), "setting": ("setting",), "both": ("task", "setting")}[view.by]
    keys = dict.fromkeys(tuple(row[name] for name in names) for row in mine)
    columns: list[Column] = [
        (" ".join(key), _has(metric=view.metric, **dict(zip(names, key, strict=True)))) for key in keys
    ]
    if view.overall:
        columns.append(("mean", _has(metric=view.metric)))
    return columns, view.scale


def cell(rows: Iterable[Row], wanted: Callable[[Row], bool]) -> list[float | None]:
    """Return, for each seed, the mean over a task's settings and then over tasks; None where a value has diverged."""
    seeds: dict[int, dict[str, list[float | None]]] = {}
    for row in rows:
        if wanted(row):
            seeds.setdefault(row["seed"], {}).setdefault(row["task"], []).append(row["value"])
    found: list[float | None] = []
    for tasks in seeds.values():
        means = [
            None if None in values else sum(v for v in values if v is not None) / len(values)
            for values in tasks.values()
        ]
        found.append(None if None in means else sum(m for m in means if m is not None) / len(means))
    return found


def _finals(rows: Sequence[Row]) -> list[Row]:
    """Everything but the trials of hyper-parameters and the scores they are chosen by."""
    return [row for row in rows if row["seed"] != TUNING_SEED and row["metric"] != VALIDATION]


def _has(**wanted: str) -> Callable[[Row], bool]:
    return lambda row: all(row[name] == value for name, value in wanted.items())


def _is(pair: tuple[str, str]) -> Callable[[Row], bool]:
    return lambda row: (row["setting"], row["metric"]) == pair


def _grid(models: Sequence[str], columns: Sequence[Column], rows: Sequence[Row], scale: float) -> list[str]:
    """A model a line; with more columns than models, a column a line."""
    cells: dict[tuple[str, str], str] = {}
    for name in models:
        mine = [row for row in rows if row["model"] == name]
        for label, wanted in columns:
            values = [None if value is None else scale * value for value in cell(mine, wanted)]
            cells[name, label] = interval(values) if values else "-"
    labels = [label for label, _ in columns]
    if len(labels) <= max(len(models), 6):
        lines = ["| model | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
        return [*lines, *(f"| {m} | " + " | ".join(cells[m, label] for label in labels) + " |" for m in models)]
    lines = ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    return [*lines, *(f"| {label} | " + " | ".join(cells[m, label] for m in models) + " |" for label in labels)]


def _costs(models: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """What the runs of each model took: counts, sizes, and the hyper-parameters that were chosen."""
    lines = [
        "| model | parameters | runs | tokens a run | training | in all | peak memory | chosen |",
        "|---" * 8 + "|",
    ]
    for name in models:
        runs = list({row["run"]: row for row in rows if row["model"] == name}.values())
        finals = [row for row in runs if row["seed"] != TUNING_SEED]
        sizes = sorted({row["parameters"] for row in finals})
        chosen = dict.fromkeys(
            ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["options"].items())
            for row in finals
        )
        cells = (
            name,
            f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}",
            str(len(runs)),
            f"{sum(row['tokens'] for row in finals) / len(finals):,.0f}",
            f"{sum(row['seconds'] for row in finals) / len(finals):.3g} s",
            duration(sum(row["total_seconds"] for row in runs)),
            f"{max(row['peak_memory'] for row in runs) / 2**20:.0f} MiB",
            "; ".join(chosen),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _length(setting: str) -> int | None:
    name, _, value = setting.partition("=")
    return int(value) if name == "length" and value.isdecimal() else None


def _bars(kept: dict[str, Any], rows: Sequence[Row]) -> Any:
    """Bars of the headline with intervals: a panel a column where their units differ, else side by side."""
    from matplotlib.figure import Figure

    columns, scale = headline(kept["suite"], rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    apart = VIEWS[kept["suite"]].metric is None
    panels = len(columns) if apart else 1
    across = min(panels, 3)
    size = (5 * across, 0.35 * len(models) + 1.5) if apart else (max(7, 0.16 * len(models) * len(columns)), 5)
    down = -(-panels // across)
    figure = Figure(figsize=(size[0], size[1] * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for panel in axes[panels:]:
        panel.set_visible(False)
    for number, name in enumerate(models):
        mine = [row for row in rows if row["model"] == name]
        for place, (label, wanted) in enumerate(columns):
            values = [scale * v for v in cell(mine, wanted) if v is not None]
            if not values:
                continue
            mean, half = mean_interval(values)
            if apart:
                axes[place].barh(number, mean, xerr=half, color=_color(number))
                axes[place].set(title=label, yticks=range(len(models)), yticklabels=models)
            else:
                width = 0.8 / len(models)
                axes[0].bar(
                    place + width * (number - (len(models) - 1) / 2), mean, width, yerr=half, color=_color(number)
                )
    if not apart:
        axes[0].set_xticks(range(len(columns)), [label for label, _ in columns], rotation=45, ha="right")
        axes[0].set(ylabel=f"{VIEWS[kept['suite']].metric}, per cent", ylim=(0, 100))
        handles = [_handle(_color(i)) for i in range(len(models))]
        axes[0].legend(handles, models, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _color(number: int) -> Any:
    """Return one of twenty colours, the strong ones first: there are more than ten models."""
    from matplotlib import colormaps

    return colormaps["tab20"](number * 2 if number < 10 else (number * 2 + 1) % 20)


def _handle(color: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color)


def _against_length(kept: dict[str, Any], rows: Sequence[Row]) -> Any:
    """Accuracy against the length, the mean over tasks; length 0 stands at the left end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    _lines(figure.subplots(), rows, str(VIEWS[kept["suite"]].metric), 100)
    figure.axes[0].set(ylabel=f"{VIEWS[kept['suite']].metric}, mean over tasks, per cent", ylim=(-2, 102))
    return figure


def _memory(rows: Sequence[Row]) -> Any:
    """Bytes of the state against the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    _lines(figure.subplots(), rows, "cache_bytes", 2**-10)
    figure.axes[0].set(ylabel="state, KiB", yscale="log")
    return figure


def _lines(panel: Any, rows: Sequence[Row], metric: str, scale: float) -> None:
    lengths = sorted({_length(row["setting"]) or 0 for row in rows if _length(row["setting"]) is not None})
    places = [max(length, min(filter(None, lengths), default=2) // 2) for length in lengths]
    for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        mine = [row for row in rows if row["model"] == name]
        points = []
        for length, place in zip(lengths, places):
            values = [v for v in cell(mine, _has(metric=metric, setting=f"length={length}")) if v is not None]
            if values:
                points.append((place, *mean_interval([scale * value for value in values])))
        if points:
            places_, means, halves = zip(*points)
            bars = [half or 0 for half in halves]
            panel.errorbar(places_, means, yerr=bars, marker=".", capsize=2, label=name, color=_color(number))
    panel.set(xlabel="tokens", xscale="log")
    panel.set_xticks(places, [f"{length:,}" for length in lengths], minor=False)
    panel.minorticks_off()
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
