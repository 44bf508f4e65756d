"""What the package is from outside: its public names, how light it is to import, and its metadata."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points, metadata
from importlib.resources import files

import pytest

import everlearn

HEAVY = ("torch", "transformers", "numpy", "sqlalchemy", "typer", "matplotlib", "scipy", "datasets", "fastapi", "ray")


@pytest.mark.parametrize("name", [name for name in everlearn.__all__ if name != "__version__"])
def test_public_names_are_there_and_say_what_they_do(name):
    found = getattr(everlearn, name)
    assert found.__name__ == name
    assert len(found.__doc__) > 30
    assert name in dir(everlearn)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'everlearn' has no attribute 'Lerner'"):
        _ = everlearn.Lerner


def test_importing_is_light():
    code = f"import sys, everlearn; sys.exit(', '.join(set({HEAVY!r}) & sys.modules.keys()) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_runtime_imports_no_plots_servers_or_clusters():
    code = "import sys; from everlearn import Learner, stack_levels, HopeForCausalLM\n"
    heavy = {"matplotlib", "peft", "fastapi", "uvicorn", "ray", "sklearn"}
    code += f"sys.exit(', '.join({heavy!r} & sys.modules.keys()) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_metadata():
    about = metadata("everlearn")
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    assert about["Version"] == everlearn.__version__
    assert [script.value for script in entry_points(name="everlearn", group="console_scripts")] == [
        "everlearn.cli:main"
    ]
    assert files("everlearn").joinpath("py.typed").is_file()
