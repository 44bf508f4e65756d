"""The bar on a terminal; plain lines are tested where commands print them."""

from __future__ import annotations

import io

from everlearn.cli.progress import Reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_on_a_terminal_even_when_lines_are_unwanted(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Reporter(quiet=True) as progress:
        progress("dreaming [bold]", 0.0)
        progress("dreaming [bold]", 0.25)
        progress("learning", 0.5, "pass 2")
    shown = terminal.getvalue()
    assert "dreaming [bold]" in shown
    assert "learning: pass 2" in shown
    assert "100%" in shown


def test_a_closed_reporter_can_be_used_again(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Reporter()
    progress.close()
    progress("first", 0.5)
    progress.close()
    before = terminal.tell()
    progress("second", 1.0)
    progress.close()
    assert "second" in terminal.getvalue()[before:]


def test_lines_elsewhere_and_none_when_quiet(capsys):
    with Reporter() as progress:
        for share in (0.0, 0.5, 1.0):
            progress("dreaming", share)
        progress("checking", 1.0)
    with Reporter(quiet=True) as progress:
        progress("dreaming", 0.0)
    assert capsys.readouterr() == ("", "dreaming\nchecking\n")
