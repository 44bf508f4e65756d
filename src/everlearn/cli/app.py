"""The command tree."""

from __future__ import annotations

from typing import Annotated

import typer

from everlearn import __version__
from everlearn.cli.ask import ask
from everlearn.cli.chat import chat
from everlearn.cli.demo import demo
from everlearn.cli.diff import diff
from everlearn.cli.eval_ablation import eval_ablation
from everlearn.cli.eval_babilong import eval_babilong
from everlearn.cli.eval_diary import eval_diary
from everlearn.cli.eval_formal import eval_formal
from everlearn.cli.eval_learns import eval_learns
from everlearn.cli.eval_lm import eval_lm
from everlearn.cli.eval_mad import eval_mad
from everlearn.cli.eval_niah import eval_niah
from everlearn.cli.eval_optim import eval_optim
from everlearn.cli.export import export
from everlearn.cli.forget import forget
from everlearn.cli.generate import generate
from everlearn.cli.history import history
from everlearn.cli.import_ import import_
from everlearn.cli.model_fetch import model_fetch
from everlearn.cli.options import command
from everlearn.cli.report import report
from everlearn.cli.rollback import rollback
from everlearn.cli.sleep import sleep
from everlearn.cli.status import status
from everlearn.cli.tell import tell
from everlearn.cli.train import train

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
model_app = typer.Typer(no_args_is_help=True, help="Base models.")
eval_app = typer.Typer(no_args_is_help=True, help="Benchmarks.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"everlearn {__version__}")
        raise typer.Exit


@app.callback()
def _everlearn(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """A language model that remembers you in its weights: tell it something, let it sleep, and ask.

    Results go to stdout, errors and progress to stderr, with --json too (an error is then a JSON object on stderr).
    Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted.
    """


for _function in (tell, ask, chat, sleep, forget, history, rollback, diff, status, export, import_, demo):
    command(app)(_function)
command(app)(train)
command(app)(generate)
command(model_app, "fetch")(model_fetch)
command(eval_app, "diary")(eval_diary)
command(eval_app, "optim")(eval_optim)
command(eval_app, "learns")(eval_learns)
for _function in (eval_formal, eval_mad, eval_niah, eval_babilong, eval_lm, eval_ablation):
    command(eval_app, _function.__name__.removeprefix("eval_"))(_function)
command(app)(report)
app.add_typer(model_app, name="model")
app.add_typer(eval_app, name="eval")

__all__ = ["app"]
