"""How the built-in tasks' options are validated, and libraries that only some of them need."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from shared.errors import ConfigError

Partition = Literal["sharded", "contiguous", "local", "leased"]
Options = TypeVar("Options", bound=BaseModel)


def validated(model: type[Options], options: Mapping[str, Any], task: str) -> Options:
    """The options of the task named `task`. Raises ConfigError for unknown keys and for values that will not do."""
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(_sentence(error, model, task)) from None


def _sentence(error: ValidationError, model: type[BaseModel], task: str) -> str:
    """The first of pydantic's complaints, as one sentence that names the key and what would do. Each field's
    description completes "…; give …"."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # a combination: its message is already a sentence
        return str(first["ctx"]["error"])
    key, fields = str(first["loc"][0]), model.model_fields
    if key not in fields:
        near = difflib.get_close_matches(key, list(fields), n=1)
        way_out = f'did you mean "{near[0]}"?' if near else f"its keys are {', '.join(fields)}"
        return f"[task] or [data] {key}: {task} has no such key; {way_out}"
    if first["type"] == "missing":
        return f"[task] {key}: {task} needs it; give {fields[key].description}"
    return f"[task] or [data] {key}: {first['input']!r} will not do; give {fields[key].description}"


def library(name: str) -> Any:
    """The module `name` of the optional dependencies. Raises ConfigError where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f'the library {name.partition(".")[0]} cannot be imported ({error}); pip install "isthmus[hf]"'
        ) from None
