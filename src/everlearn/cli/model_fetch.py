"""``everlearn model fetch``: get the base model before it is needed."""

from __future__ import annotations

from everlearn.cli.options import JsonOption, ModelOption, report
from everlearn.cli.progress import Reporter


def model_fetch(model: ModelOption = None, as_json: JsonOption = False) -> None:
    """Get the base model, once; prints where it is."""
    with Reporter(quiet=as_json) as progress:
        progress("looking for the model", 0.0)
        from everlearn.models.hub import DEFAULT_MODEL, fetch_default_model, load_model

        name = model or DEFAULT_MODEL
        if name == DEFAULT_MODEL:
            path = str(fetch_default_model(progress))
        else:
            path = str(load_model(name)[0].config._name_or_path)
    report({"model": name, "path": path}, path, as_json=as_json)
