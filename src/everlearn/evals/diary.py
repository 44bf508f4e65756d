"""``everlearn eval diary``: personal memory in weights, measured night by night.

Every day some facts are told among small talk, what the user wants forgotten from the day before is forgotten, and the
method sleeps. Then, in an empty context, every question of every past day is asked, and neutral prompts. Results:
``out`` (JSON, see :mod:`~everlearn.evals.results`: one row a method, seed and day), a table and plots beside it. Each
day's row is written when the day ends, so a killed evaluation loses at most one day.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlearn.errors import InvalidArgument, SleepRejected
from everlearn.evals.diary_data import load_diary
from everlearn.evals.diary_exam import Exam, read_text
from everlearn.evals.diary_measures import REPLY_TOKENS, Reference
from everlearn.evals.diary_methods import Factory, Method, Setting, opened, registry
from everlearn.evals.diary_plots import report
from everlearn.evals.results import Results, Row, duration, provenance, spread, write_json
from everlearn.models.hub import DEFAULT_MODEL, load_model
from everlearn.models.memory_file import fingerprint

SUITE, VERSION = "diary", 1
KEYS = ("method", "seed", "day")

Progress = Callable[[int, int, str], None]

__all__ = ["report", "run"]


def run(
    data: Path,
    split: str,
    days: int,
    seeds: int,
    out: Path,
    *,
    first_seed: int = 0,
    methods: Sequence[str] = ("everlearn",),
    baselines: Sequence[str] = (),
    model: str = DEFAULT_MODEL,
    eval_days: str | Sequence[int] = "all",
    smalltalk: int = 4,
    text_tokens: int = 8192,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the diary with every method and seed, or go on where an earlier run stopped, and return the results.

    Args:
        data: the diary's folder, or a folder that holds it as ``diary``; ``wikitext2/test.txt`` in or beside it is
            what perplexity is measured on, which is left out where it is missing.
        split: name of the files, ``{split}.jsonl`` and so on.
        days: days to live through, from the first.
        seeds: how many seeds, each another order of what is told and another sampling.
        first_seed: the first of them. Several processes may fill one results file, each with seeds of its own.
        out: the JSON file of the results; ``{stem}.work`` beside it keeps what is needed to go on, all replies, and
            each method as it was in the end (``{method}-{seed}/day-{days}``).
        methods, baselines: names of :func:`~everlearn.evals.diary_methods.registry`; methods come first.
        model: a name for :func:`~everlearn.models.hub.load_model`.
        eval_days: ``"all"``, ``"last"``, or the days after whose night everything is measured; the last always is.
        smalltalk: messages of small talk a day.
        text_tokens: tokens of text for perplexity; 0 leaves it out.
        progress: called with days done, days in all, and what comes next with the time left.

    Raises:
        InvalidArgument: a folder, file, split, name or number that is not as expected; ``out`` holds other results.
    """
    data, out = Path(data), Path(out)
    diary = load_diary(data, split)
    factories = _choose(list(dict.fromkeys([*methods, *baselines])))
    names = list(factories)
    measured = _measured_days(days, diary.days, eval_days)
    for name, value, least in (
        ("seeds", seeds, 1),
        ("first_seed", first_seed, 0),
        ("smalltalk", smalltalk, 0),
        ("text_tokens", text_tokens, 0),
    ):
        if value < least:
            raise InvalidArgument(f"{name}: got {value}, expected {least} or more")
    text = read_text(data) if text_tokens else None
    base, tokenizer = load_model(model)
    identity = fingerprint(base)
    protocol = {
        "split": split,
        "data": diary.digest,
        "days": days,
        "eval_days": measured,
        "model": model,
        "fingerprint": identity,
        "smalltalk": smalltalk,
        "text_tokens": text_tokens if text is not None else 0,
        "reply_tokens": REPLY_TOKENS,
    }
    results = Results(out, suite=SUITE, version=VERSION, protocol=protocol, keys=KEYS)
    work = out.with_name(f"{out.stem}.work")
    exam = Exam(diary, Reference(base, tokenizer, work / f"base-{identity[:12]}.json"), text, text_tokens)
    chosen = range(first_seed, first_seed + seeds)
    plan = Plan(days, measured, smalltalk, results, exam, work, Clock(results, names, chosen, days, progress))
    settings = {
        (name, seed): Setting(
            base, tokenizer, model, work / f"{name}-{seed}" / "now", work / "dreams", None, diary, seed
        )
        for name in names
        for seed in chosen
    }
    _try_all(plan, factories, settings)
    for (name, _), setting in settings.items():
        plan.live(name, factories[name], setting)
    figures = results.finish(lambda rows: summary(rows, names, range(chosen.stop)))
    report(out)
    plan.clock.tell("done")
    return {"complete": True, "protocol": protocol, "rows": results.rows, "summary": figures}


@dataclass
class Clock:
    """Counts days done and guesses the time left from how long each method's days took."""

    results: Results
    names: Sequence[str]
    seeds: Sequence[int]
    days: int
    progress: Progress | None

    def tell(self, what: str) -> None:
        """Report ``what`` comes next."""
        if self.progress is None:
            return
        wanted = [(name, seed, day) for name in self.names for seed in self.seeds for day in self._days()]
        known = {tuple(row[key] for key in KEYS): row["seconds"] for row in self.results.rows}
        left = [key for key in wanted if key not in known]
        means = {}
        for name in self.names:
            took = [seconds for key, seconds in known.items() if key[0] == name] or list(known.values())
            means[name] = sum(took) / len(took) if took else None
        guesses = [means[name] for name, _, _ in left]
        if left and None not in guesses:
            what += f" ({duration(sum(guess for guess in guesses if guess is not None))} left)"
        self.progress(len(wanted) - len(left), len(wanted), what)

    def _days(self) -> range:
        return range(1, self.days + 1)


@dataclass
class Plan:
    """How the days go by: which are measured, where everything is kept."""

    days: int
    measured: Sequence[int]
    smalltalk: int
    results: Results
    exam: Exam
    work: Path
    clock: Clock

    def next_day(self, name: str, seed: int) -> int:
        """Return the first day of which there is no row."""
        return next((d for d in range(1, self.days + 1) if self.results.find(name, seed, d) is None), self.days + 1)

    def checkpoint(self, name: str, seed: int, day: int) -> Path | None:
        """Return where the end of ``day`` is kept, None before the first.

        Raises:
            InvalidArgument: it is gone.
        """
        if day == 0:
            return None
        folder = self.work / f"{name}-{seed}" / f"day-{day}"
        if not folder.is_dir():
            raise InvalidArgument(
                f"out: {self.results.path} ends after day {day} of {name}, seed {seed}, but {folder}, from which to go"
                " on, is gone; delete the results to start anew"
            )
        return folder

    def live(self, name: str, factory: Factory, setting: Setting) -> None:
        """Live through the days that are left."""
        first = self.next_day(name, setting.seed)
        if first > self.days:
            return
        checkpoint = self.checkpoint(name, setting.seed, first - 1)
        shutil.rmtree(setting.folder, ignore_errors=True)
        setting.folder.mkdir(parents=True)
        with opened(factory, setting, checkpoint) as method:
            for day in range(first, self.days + 1):
                self._one_day(name, method, day)
        shutil.rmtree(setting.folder)

    def _one_day(self, name: str, method: Method, day: int) -> None:
        setting, began = method.setting, time.perf_counter()
        where = f"{name}, seed {setting.seed}, day {day}"
        self.clock.tell(f"{where}: telling and sleeping")
        row: Row = {"method": name, "seed": setting.seed, "day": day, "measured": day in self.measured}
        row |= self._waking_and_sleeping(method, day)
        place = self.work / f"{name}-{setting.seed}"
        if name == "everlearn":
            write_json(setting.dreams / f"{setting.seed}-{day}.json", method.dreams())
        if day in self.measured:
            self.clock.tell(f"{where}: asking")
            figures, record = self.exam.measure(method, day)
            write_json(place / f"night-{day:02d}.json", record)
            row |= figures
        row["seconds"] = time.perf_counter() - began
        row["commit"] = provenance()["commit"]
        _save(method, place / f"day-{day}")
        self.results.add(row)
        shutil.rmtree(place / f"day-{day - 1}", ignore_errors=True)

    def _waking_and_sleeping(self, method: Method, day: int) -> Row:
        """Tell the day, forget what is to be forgotten, sleep; a sleep that is given up leaves the day heard."""
        diary, rejected = method.setting.diary, 0
        for text in diary.messages(day, method.setting.seed, self.smalltalk):
            method.tell(text)
        began = time.perf_counter()
        for fact in diary.to_forget(day):
            try:
                method.forget(fact.said)
            except SleepRejected:
                rejected += 1
        forgot = time.perf_counter()
        try:
            method.sleep()
        except SleepRejected:
            rejected += 1
        slept = time.perf_counter() - forgot + method.spared()
        return {
            "facts": len(diary.on(day)),
            "sleep_seconds": slept,
            "sleep_seconds_per_fact": slept / max(len(diary.on(day)), 1),
            "sleep_seconds_spared": method.spared(),
            "forget_seconds": forgot - began if diary.to_forget(day) else None,
            "rejected": rejected,
            "bytes_per_user": method.bytes(),
            "bytes_on_disk": method.bytes_on_disk(),
        }


def summary(rows: Sequence[Row], names: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return, for each method and day, every measure's mean over seeds with its 95% t-interval.

    Each is ``{"mean", "low", "high", "n"}``; low and high are None for one seed, the measure None where no seed has it.
    """
    lines = []
    for name in names:
        mine = [row for row in rows if row["method"] == name and row["seed"] in seeds]
        for day in sorted({row["day"] for row in mine}):
            today = [row for row in mine if row["day"] == day]
            line: dict[str, Any] = {"method": name, "day": day, "seeds": len(today)}
            for measure in dict.fromkeys(measure for row in today for measure in row):
                values = [row.get(measure) for row in today]
                if measure not in (*KEYS, "commit", "measured") and not any(isinstance(v, dict | str) for v in values):
                    known = [float(value) for value in values if value is not None]
                    line[measure] = spread(known) if known else None
            lines.append(line)
    return lines


def _choose(names: Sequence[str]) -> dict[str, Factory]:
    known = registry()
    odd = [name for name in names if name not in known]
    if odd or not names:
        raise InvalidArgument(f"methods, baselines: got {odd or 'none'}, expected some of {', '.join(known)}")
    hungry = [name for name in names if getattr(getattr(known[name], "func", known[name]), "needs_dreams", False)]
    if hungry and "everlearn" not in names:
        raise InvalidArgument(f"baselines: {hungry[0]} learns the dreams of everlearn; add it to the methods")
    first = sorted(names, key=lambda name: name != "everlearn")
    return {name: known[name] for name in first}


def _measured_days(days: int, there: int, eval_days: str | Sequence[int]) -> list[int]:
    if not 1 <= days <= there:
        raise InvalidArgument(f"days: got {days}, expected 1 to {there}, the days of this split")
    if eval_days == "all":
        return list(range(1, days + 1))
    if eval_days == "last":
        return [days]
    chosen = sorted(set(eval_days)) if not isinstance(eval_days, str) else []
    if not chosen or not all(isinstance(day, int) and 1 <= day <= days for day in chosen):
        raise InvalidArgument(f"eval_days: got {eval_days!r}, expected 'all', 'last' or days from 1 to {days}")
    return sorted({*chosen, days})


def _try_all(plan: Plan, factories: dict[str, Factory], settings: dict[tuple[str, int], Setting]) -> None:
    """Open every method that has days left, once, so that what is missing shows now and not after hours."""
    for (name, seed), setting in settings.items():
        first = plan.next_day(name, seed)
        if first > plan.days:
            continue
        plan.checkpoint(name, seed, first - 1)
        if seed == plan.clock.seeds[0]:
            shutil.rmtree(setting.folder, ignore_errors=True)
            setting.folder.mkdir(parents=True)
            with opened(factories[name], setting, None):
                pass


def _save(method: Method, folder: Path) -> None:
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.mkdir(parents=True)
    method.save(unfinished)
    unfinished.rename(folder)
