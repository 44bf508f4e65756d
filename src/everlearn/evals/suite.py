"""What all from-scratch suites share: training runs by name, one results file, tuning, resuming, and the time left.

A suite is a list of tasks, and a function that makes one training run and measures it. Here is decided which runs are
needed, they are made one after the other or by several processes, and each is on disk, whole, before the next begins.
Every row of the results file has the columns ``COLUMNS``.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from everlearn.errors import InvalidArgument
from everlearn.evals.contestants import Contestant, choose
from everlearn.evals.fitting import PeakMemory
from everlearn.evals.results import Results, Row, duration, provenance, spread

__all__ = ["COLUMNS", "TUNING_SEED", "Job", "Measure", "Outcome", "Suite", "run_suite"]

COLUMNS = (
    *("task", "setting", "model", "seed", "metric", "value", "parameters", "tokens", "steps", "seconds"),
    *("total_seconds", "peak_memory", "options", "run", "versions", "machine", "commit", "command"),
)
"""Of every row. ``setting``: the task's difficulty, length or bin; ``options``: the hyper-parameters; ``run``: the name
of the training run, which all rows of one share; ``seconds``: of training, ``total_seconds``: with data and measuring;
``peak_memory``: bytes of the whole process."""

KEYS = ("run", "task", "setting", "metric")
TUNING_SEED = 1000
"""Hyper-parameters are tried with a seed of their own."""
VALIDATION = "validation"
"""The metric hyper-parameters are chosen by, highest first: measured on data that no other metric is measured on, but
for the formal languages, where it is the accuracy on Bin0."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Job:
    """One training run: a model on a task in one setting, with a seed and hyper-parameters."""

    task: str
    setting: str
    contestant: Contestant
    seed: int
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """What its rows are found by."""
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return "|".join((self.task, self.setting, self.contestant.name, str(self.seed), options))


@dataclass(frozen=True)
class Measure:
    """One measurement; ``task`` and ``setting`` are the job's unless named; a ``value`` of None has diverged."""

    metric: str
    value: float | None
    task: str | None = None
    setting: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a training run gave; ``validation`` (higher is better) is what hyper-parameters are chosen by."""

    measures: list[Measure]
    validation: float | None
    parameters: int
    tokens: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Suite:
    """A from-scratch evaluation.

    Args:
        name: of the command and of the results file.
        version: of its protocol's code; results of another one are refused.
        tasks: all tasks, each with its settings under a budget: ``settings(budget, task)``.
        budgets: name -> a dataclass with the numbers of the protocol; its ``grid`` are the hyper-parameters to try.
        settings: ``(budget, task)`` -> the names of the settings that are trained in, the first the basic one.
        run: ``(job, budget, data, tell)`` -> :class:`Outcome`; called in any process; ``tell(what, share)``.
        notes: ``(budget)`` -> what was scaled down from the published protocol, a line each.
        variants: models that only this suite has: name -> (family, changes).
        left_out: families that take part only when they are named.
        digest: ``(data)`` -> what identifies the data, or None where there is none to read.
        better: metric -> ``"high"`` or ``"low"``.
    """

    name: str
    version: int
    tasks: tuple[str, ...]
    budgets: Mapping[str, Any]
    settings: Callable[[Any, str], Sequence[str]]
    run: Callable[[Job, Any, Any, Callable[[str, float], None]], Outcome]
    notes: Callable[[Any], Sequence[str]]
    variants: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ("lstm",)
    only_variants: bool = False
    digest: Callable[[Any], str] | None = None
    better: Mapping[str, str] = field(default_factory=dict)


def run_suite(
    suite: Suite,
    out: str | Path,
    *,
    models: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: int = 3,
    budget: str = "small",
    data: str | Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a suite, or go on where an earlier run stopped, and return the results.

    Args:
        suite: see :class:`Suite`.
        out: the JSON file of the results.
        models: names of the registry, or of the suite's variants; None is all of them.
        tasks: names out of ``suite.tasks``; None is all of them.
        seeds: seeds 0, 1, ... of the final runs.
        budget: a key of ``suite.budgets``.
        data: folder laid out like the data folder; without it public datasets are fetched by name.
        workers: processes that train at the same time, each with one thread.
        progress: called with runs done, runs in all, and what comes next with the time left.

    Raises:
        InvalidArgument: an unknown name, a number out of range, missing data, or ``out`` holds other results.
    """
    if budget not in suite.budgets:
        raise InvalidArgument(f"budget: got {budget!r}, expected one of {', '.join(suite.budgets)}")
    for name, value in (("seeds", seeds), ("workers", workers)):
        if value < 1:
            raise InvalidArgument(f"{name}: got {value}, expected 1 or more")
    odd = [task for task in tasks or () if task not in suite.tasks]
    if odd or (tasks is not None and not tasks):
        raise InvalidArgument(f"tasks: got {odd or 'none'}, expected some of {', '.join(suite.tasks)}")
    chosen = choose(models, suite.variants, left_out=suite.left_out, only_variants=suite.only_variants)
    plan = suite.budgets[budget]
    digest = suite.digest(data) if suite.digest is not None else None
    notes = list(suite.notes(plan))
    protocol = {"budget": budget, **dataclasses.asdict(plan), "data": digest, "notes": notes}
    results = Results(Path(out), suite=suite.name, version=suite.version, protocol=protocol, keys=KEYS)
    places = [(t, s, c) for t in tasks or suite.tasks for s in suite.settings(plan, t) for c in chosen]
    runner = _Runner(suite, plan, data, results, places, seeds, progress)
    with _pool(workers) as pool:
        runner.make([job for place in places for job in runner.trials(*place)], pool)
        runner.make([job for place in places for job in runner.finals(*place)], pool)
    figures = results.finish(summary)
    runner.report("done")
    return {"complete": True, "protocol": protocol, "rows": results.rows, "summary": figures}


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return mean and 95% interval over seeds by task, setting, model and metric; a mean of None has diverged."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row["seed"] != TUNING_SEED:
            found.setdefault((row["task"], row["setting"], row["model"], row["metric"]), []).append(row)
    lines = []
    for (task, setting, model, metric), mine in found.items():
        values = [row["value"] for row in mine]
        whole = None not in values
        figures = spread(values) if whole else {"mean": None, "low": None, "high": None, "n": len(values)}
        lines.append({"task": task, "setting": setting, "model": model, "metric": metric, **figures})
    return lines


@dataclass
class _Runner:
    """Makes training runs and counts them."""

    suite: Suite
    plan: Any
    data: Any
    results: Results
    places: Sequence[tuple[str, str, Contestant]]
    seeds: int
    progress: Progress | None

    def __post_init__(self) -> None:
        self.grid: Sequence[Mapping[str, Any]] = self.plan.grid
        self.took: dict[str, float] = {}
        self.seen: dict[str, Row] = {}
        for row in self.results.rows:
            self._count(row)

    def trials(self, task: str, setting: str, contestant: Contestant) -> list[Job]:
        """Return the runs that hyper-parameters are chosen by; none where there is nothing to choose."""
        if len(self.grid) < 2 or not self._tuned(task, setting):
            return []
        return [Job(task, setting, contestant, TUNING_SEED, tuple(options.items())) for options in self.grid]

    def finals(self, task: str, setting: str, contestant: Contestant) -> list[Job]:
        """Return the runs of every seed with the best hyper-parameters."""
        options = self._best(task, setting, contestant) if len(self.grid) > 1 else tuple(self.grid[0].items())
        return [Job(task, setting, contestant, seed, options) for seed in range(self.seeds)]

    def make(self, jobs: Sequence[Job], pool: ProcessPoolExecutor | None) -> None:
        """Make those runs that are not on disk."""
        missing = [job for job in jobs if job.name not in self.seen]
        if pool is None:
            for job in missing:
                self.report(_words(job))
                self._keep(job, *_run(self.suite, job, self.plan, self.data, self._tell(job)))
            return
        waiting: dict[Future, Job] = {}
        for job in missing:
            waiting[pool.submit(_run_by_name, self.suite.name, job, self.plan, self.data)] = job
        self.report(_words(missing[0]) if missing else "")
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    self._keep(waiting.pop(future), *future.result())
                    self.report(_words(next(iter(waiting.values()))) if waiting else "")
        except BaseException:
            for future in waiting:
                future.cancel()
            raise

    def report(self, what: str, share: float = 0.0) -> None:
        """Say what comes next and, as soon as a run has been timed, how long is left."""
        if self.progress is None:
            return
        trials = len(self.grid) if len(self.grid) > 1 else 0
        counts: dict[str, int] = {}
        for task, setting, contestant in self.places:
            name = contestant.name
            counts[name] = counts.get(name, 0) + self.seeds + (trials if self._tuned(task, setting) else 0)
        wanted = {contestant.name for _, _, contestant in self.places}
        mine = [row for row in self.seen.values() if row["model"] in wanted]
        done = {name: sum(row["model"] == name for row in mine) for name in counts}
        total = sum(counts.values())
        if mine and what != "done":
            mean = sum(row["total_seconds"] for row in mine) / len(mine)
            left = -share * mean
            for name, count in counts.items():
                own = [row["total_seconds"] for row in mine if row["model"] == name]
                left += max(count - done[name], 0) * (sum(own) / len(own) if own else mean)
            what = f"{what} ({duration(max(left, 0))} left)"
        self.progress(min(sum(done.values()), total), total, what)

    def _tell(self, job: Job) -> Callable[[str, float], None]:
        return lambda what, share: self.report(f"{_words(job)}: {what}", share)

    def _tuned(self, task: str, setting: str) -> bool:
        """Whether hyper-parameters are chosen in this setting, and not taken over from the task's basic one."""
        return self.plan.tune_each or setting == self.suite.settings(self.plan, task)[0]

    def _best(self, task: str, setting: str, contestant: Contestant) -> tuple[tuple[str, Any], ...]:
        if not self._tuned(task, setting):
            setting = self.suite.settings(self.plan, task)[0]
        tried = self.trials(task, setting, contestant)
        scores = [self.seen[job.name][VALIDATION] for job in tried]
        best = max(range(len(tried)), key=lambda i: float("-inf") if scores[i] is None else scores[i])
        return tried[best].options

    def _keep(self, job: Job, outcome: Outcome, total_seconds: float, peak_memory: int) -> None:
        common = {
            "model": job.contestant.name,
            "seed": job.seed,
            "parameters": outcome.parameters,
            "tokens": outcome.tokens,
            "steps": outcome.steps,
            "seconds": outcome.seconds,
            "total_seconds": total_seconds,
            "peak_memory": peak_memory,
            "options": dict(job.options),
            "run": job.name,
            **provenance(),
        }
        measures = [*outcome.measures, Measure(VALIDATION, outcome.validation)]
        rows = [
            {
                "task": job.task if measure.task is None else measure.task,
                "setting": job.setting if measure.setting is None else measure.setting,
                "metric": measure.metric,
                "value": measure.value,
                **common,
            }
            for measure in measures
        ]
        self.results.extend([{column: row[column] for column in COLUMNS} for row in rows])
        for row in rows:
            self._count(row)

    def _count(self, row: Row) -> None:
        kept = self.seen.setdefault(row["run"], {"model": row["model"], "total_seconds": row["total_seconds"]})
        if row["metric"] == VALIDATION:
            kept[VALIDATION] = row["value"]


def _words(job: Job) -> str:
    setting = f" {job.setting}" if job.setting else ""
    seed = "trying " + ", ".join(f"{k} {v}" for k, v in job.options) if job.seed == TUNING_SEED else f"seed {job.seed}"
    return f"{job.task}{setting}: {job.contestant.name}, {seed}"


def _run(
    suite: Suite, job: Job, plan: Any, data: Any, tell: Callable[[str, float], None]
) -> tuple[Outcome, float, int]:
    began, memory = time.perf_counter(), PeakMemory()
    torch.manual_seed(job.seed)
    outcome = suite.run(job, plan, data, tell)
    return outcome, time.perf_counter() - began, memory.bytes()


def _run_by_name(name: str, job: Job, plan: Any, data: Any) -> tuple[Outcome, float, int]:
    from everlearn.evals.suites import SUITES

    return _run(SUITES[name], job, plan, data, lambda what, share: None)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent has, however that ended: nobody would take the results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for ``workers`` above 1, None for one: the runs are then made here."""
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
