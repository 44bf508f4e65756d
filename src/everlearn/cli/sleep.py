"""``everlearn sleep``: what was heard goes into the weights."""

from __future__ import annotations

from dataclasses import asdict

from everlearn.cli.options import Options


def sleep(options: Options) -> None:
    """Let it sleep: what was heard since the last sleep is learned, or dismissed as small talk."""
    with options.learner() as (learner, _):
        report = learner.sleep()
    lines = [f"{len(report.consolidated)} learned, {len(report.dismissed)} dismissed, {report.seconds:.1f} s"]
    if report.learning is not None:
        found = report.learning
        lines.append(f"{found.recall:.0%} of what was dreamt answered, {found.agreement:.1%} of its own words kept")
    night = "nothing to learn" if report.night is None else f"night {report.night}"
    options.report(asdict(report), f"{night}: {'; '.join(lines)}")
