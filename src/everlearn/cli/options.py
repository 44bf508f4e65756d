"""What all commands share: the common options, where results and errors go, and exit codes.

Results go to stdout, and nothing else does: with ``--json`` stdout is one JSON document (one a line in ``chat``) or,
after an error, empty. Errors go to stderr, one line; with ``--json`` that line is ``{"error": ..., "type": ...}``, so a
pipe into jq never takes an error for a result.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import platformdirs
import typer
from rich.console import Console, RenderableType

from everlearn.cli.progress import Reporter
from everlearn.errors import EverlearnError

if TYPE_CHECKING:
    from everlearn.learner import Learner, MemoryStore

Function = TypeVar("Function", bound=Callable[..., None])

_PANEL = "Common options"

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        envvar="EVERLEARN_MODEL",
        show_default=False,
        rich_help_panel=_PANEL,
        help="Base model: a folder or a Hugging Face id; by default the one that `everlearn model fetch` gets. Not"
        " used by commands that need no model.",
    ),
]
MemoryOption = Annotated[
    Path | None,
    typer.Option(
        "--memory",
        envvar="EVERLEARN_MEMORY",
        show_default=False,
        rich_help_panel=_PANEL,
        help="The user's memory folder; by default one in the platform's folder for user data.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", show_default=False, rich_help_panel=_PANEL, help="Of everything random."),
]
JsonOption = Annotated[bool, typer.Option("--json", rich_help_panel=_PANEL, help="Print the result as JSON.")]

CautionOption = Annotated[
    float | None,
    typer.Option(
        "--caution",
        min=-1.3,
        max=1.3,
        show_default=False,
        help="How like a question must be to what it dreamt for the memory to answer: with 0.15, the default, it tries"
        " most questions about your life, with 0.35 those that it knows well.",
    ),
]

_COMMON = {"model": (ModelOption, None), "memory": (MemoryOption, None), "seed": (SeedOption, None)}
_COMMON |= {"as_json": (JsonOption, False)}


@dataclass(frozen=True)
class Options:
    """The common options as given; None is the default."""

    model: str | None = None
    memory: Path | None = None
    seed: int | None = None
    as_json: bool = False

    @property
    def folder(self) -> Path:
        """The memory folder."""
        return self.memory or platformdirs.user_data_path("everlearn") / "memory"

    def store(self, *, create: bool = False, read_only: bool = False) -> MemoryStore:
        """Open the memory without a model."""
        from everlearn.learner.store import MemoryStore

        return MemoryStore.open(self.folder, create=create, read_only=read_only)

    @contextlib.contextmanager
    def learner(self, *, create: bool = False, **parts: Any) -> Iterator[tuple[Learner, Reporter]]:
        """Yield the memory on its model, and what shows its progress (which the caller may close early).

        ``parts`` go to the learner; of these and the options those that are None are left at their defaults.
        """
        with Reporter(quiet=self.as_json) as progress:
            progress("loading the model", 0.0)
            from transformers.utils import logging

            from everlearn.learner import Learner

            logging.set_verbosity_error()
            parts |= {"model": self.model, "seed": self.seed}
            given = {name: value for name, value in parts.items() if value is not None}
            with Learner.from_pretrained(memory=self.folder, create=create, progress=progress, **given) as learner:
                progress("loading the model", 1.0)
                yield learner, progress

    def report(self, result: Any, *shown: RenderableType) -> None:
        """Print ``result`` as JSON if that was asked for, else what is ``shown``."""
        report(result, *shown, as_json=self.as_json)


def report(result: Any, *shown: RenderableType, as_json: bool) -> None:
    """Print ``result`` as JSON if ``as_json``, else what is ``shown``; user's words are never taken for markup."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2), flush=True)
        return
    console = Console(markup=False, highlight=False, emoji=False)
    for item in shown:
        console.print(item, soft_wrap=isinstance(item, str))


def command(app: typer.Typer, name: str | None = None) -> Callable[[Function], Function]:
    """Register a function as a command of ``app``; an ``options`` parameter stands for the common options.

    An :class:`EverlearnError` ends the command with one line on stderr and exit code 1, an interrupt with 130.
    """

    def register(function: Function) -> Function:
        signature = inspect.signature(function, eval_str=True)
        own = [parameter for parameter in signature.parameters.values() if parameter.name != "options"]
        common = _COMMON if "options" in signature.parameters else {}
        added = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for key, (annotation, default) in common.items()
        ]

        @functools.wraps(function)
        def run(**given: Any) -> None:
            as_json = given.get("as_json") is True
            if common:
                given["options"] = Options(**{key: given.pop(key) for key in common})
            try:
                function(**given)
            except EverlearnError as error:
                print_error(error, as_json=as_json)
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                raise typer.Exit(130) from None

        parameters = [*(item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own), *added]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del run.__wrapped__  # typer would look through to the bare function
        app.command(name or function.__name__.rstrip("_"))(run)
        return function

    return register


def print_error(error: Exception, *, as_json: bool) -> None:
    """Print one line on stderr that says what went wrong."""
    text = " ".join(str(error).split())
    line = json.dumps({"error": text, "type": type(error).__name__}) if as_json else f"everlearn: {text}"
    print(line, file=sys.stderr, flush=True)
