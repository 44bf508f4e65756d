"""Plots and table of ``everlearn eval diary``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everlearn.evals.results import interval, read_results, write_text

COLUMNS = (
    *("recall_direct", "recall_paraphrase", "recall_indirect", "retention_day1", "updates"),
    *("forgotten", "forgotten_likelihood", "forgotten_noise"),
    *("locality_top1", "locality_kl", "leak", "invented", "perplexity_ratio"),
    *("sleep_seconds_per_fact", "bytes_per_user", "chat_tokens_per_second", "chat_speed_ratio", "rejected"),
)
PANELS = {"locality_top1": "top-1 agreement with the base", "leak": "neutral replies with a personal answer"}


def report(out: Path) -> list[Path]:
    """Write the table and the plots of the results ``out`` beside it, complete or not; return their paths.

    ``{stem}.md``; ``{stem}-age.png|svg``: recall by the age of the fact; ``{stem}-nights.png|svg``: locality and leak
    by night.

    Raises:
        InvalidArgument: ``out`` holds no results of the diary.
    """
    out = Path(out)
    kept = read_results(out, "diary")
    rows = [row for row in kept["rows"] if row["measured"]]
    paths = [out.with_suffix(".md")]
    write_text(paths[0], table(kept))
    if rows:
        for ending, figure in (("age", _by_age(rows)), ("nights", _by_night(rows))):
            for kind in ("png", "svg"):
                paths.append(out.with_name(f"{out.stem}-{ending}.{kind}"))
                figure.savefig(paths[-1], dpi=120)
    return paths


def table(kept: dict[str, Any]) -> str:
    """Return the Markdown table: after each method's last night, every measure with its 95% interval over seeds."""
    protocol = kept["protocol"]
    lines = [
        f"# Diary: {protocol['split']}, {protocol['days']} days, {protocol['model']}",
        "",
        *([] if kept["complete"] else ["**Incomplete: the evaluation has not ended.**", ""]),
        f"Mean ± half of the 95% interval over seeds, after the last night. `{kept['provenance']['command']}`,"
        f" commit {kept['provenance']['commit']}, {kept['provenance']['machine']}.",
        "",
    ]
    methods = list(dict.fromkeys(row["method"] for row in kept["rows"]))
    lines.append("| measure | " + " | ".join(methods) + " |")
    lines.append("|---" * (len(methods) + 1) + "|")
    last = {name: [row for row in kept["rows"] if row["method"] == name] for name in methods}
    for name, mine in last.items():
        night = max(row["day"] for row in mine)
        last[name] = [row for row in mine if row["day"] == night]
    lines.append("| night | " + " | ".join(str(last[name][0]["day"]) for name in methods) + " |")
    lines.append("| seeds | " + " | ".join(str(len(last[name])) for name in methods) + " |")
    for column in COLUMNS:
        cells = []
        for name in methods:
            values = [row[column] for row in last[name] if row.get(column) is not None]
            cells.append(interval(values) if values else "-")
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _by_age(rows: Sequence[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for name in dict.fromkeys(row["method"] for row in rows):
        by_age: dict[int, list[float]] = {}
        for row in rows:
            if row["method"] == name:
                for age, value in row["recall_by_age"].items():
                    by_age.setdefault(int(age), []).append(value)
        ages = sorted(by_age)
        panel.plot(ages, [sum(by_age[age]) / len(by_age[age]) for age in ages], marker=".", label=name)
    panel.set(xlabel="nights since the fact was told", ylabel="recall, all questions", ylim=(0, 1))
    panel.legend(loc="upper right")
    return figure


def _by_night(rows: Sequence[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, (measure, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name in dict.fromkeys(row["method"] for row in rows):
            by_day: dict[int, list[float]] = {}
            for row in rows:
                if row["method"] == name:
                    by_day.setdefault(row["day"], []).append(row[measure])
            days = sorted(by_day)
            panel.plot(days, [sum(by_day[day]) / len(by_day[day]) for day in days], marker=".", label=name)
        panel.set(xlabel="night", ylabel=label)
        panel.legend(loc="upper right")
    return figure
