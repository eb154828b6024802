"""The argument ``MODEL``: ``package.module:callable``, or a folder with a Hugging Face ``config.json``."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabric_init.cli import CommandError

if TYPE_CHECKING:
    from torch import nn

HELP = "How to build the model: `package.module:callable`, or a folder with a Hugging Face `config.json`."

_FORMS = "give package.module:callable, or a folder with a config.json"


def model_builder(argument: str) -> Callable[[], nn.Module]:
    """Return a callable that builds the model that a user named; import it, but do not call it yet.

    Args:
        argument: ``package.module:callable``, where the callable takes no arguments and returns a module (modules of
            the current directory are found, as under ``python -m``); or a folder, or the path of its ``config.json``.

    Returns:
        A callable that builds the model, and raises ``CommandError`` if the result is no module.

    Raises:
        CommandError: There is no such module, attribute or folder, or it cannot build a model.
    """
    path = Path(argument)
    if path.is_dir() or path.name == "config.json":
        return _from_config(path if path.is_dir() else path.parent)
    module_name, colon, attribute = argument.partition(":")
    if not colon or not module_name or not attribute:
        raise CommandError(f"{argument}: no such folder, and no package.module:callable; {_FORMS}")
    return _checked(argument, _callable(argument, module_name, attribute))


def _callable(argument: str, module_name: str, attribute: str) -> Callable[[], Any]:
    if os.getcwd() not in sys.path:  # an entry point starts without it
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise CommandError(f"{argument}: no module {error.name!r} in {os.getcwd()} or on sys.path") from None
        raise CommandError(f"{argument}: {module_name} cannot be imported: {error}") from error
    except ImportError as error:
        raise CommandError(f"{argument}: {module_name} cannot be imported: {error}") from error
    except Exception as error:  # whatever a user's module does
        raise CommandError(f"{argument}: {module_name} cannot be imported: {_one_line(error)}") from error
    for name in attribute.split("."):
        try:
            target = getattr(target, name)
        except AttributeError:
            raise CommandError(f"{argument}: {getattr(target, '__name__', target)} has no attribute {name!r}") from None
    from torch import nn

    if isinstance(target, nn.Module):
        raise CommandError(f"{argument} is a module that is built already; name the class or function that builds it")
    if not callable(target):
        raise CommandError(f"{argument} is of type {type(target).__name__}, which builds no model; {_FORMS}")
    required = _required_arguments(target)
    if required:
        raise CommandError(
            f"{argument} needs arguments ({', '.join(required)}): name a function without any that returns the model"
        )
    build: Callable[[], Any] = target
    return build


def _required_arguments(build: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature: calling it will show
        return []
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _checked(argument: str, build: Callable[[], Any]) -> Callable[[], nn.Module]:
    def checked() -> nn.Module:
        from torch import nn

        from fabric_init.errors import FabricInitError

        try:
            model = build()
        except FabricInitError:
            raise
        except Exception as error:  # whatever a user's code, or a config's, runs into
            raise CommandError(f"{argument} does not build: {_one_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise CommandError(f"{argument} returned a value of type {type(model).__name__}, not a torch.nn.Module")
        return model

    return checked


def _one_line(error: Exception) -> str:
    """Return an exception in one line, with the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" (raised at {place.filename}:{place.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _from_config(folder: Path) -> Callable[[], nn.Module]:
    """Return a callable that builds the class in ``architectures`` from the config, without weights."""
    path = folder / "config.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("architectures")
    except FileNotFoundError:
        raise CommandError(f"{folder}: no config.json in this folder; {_FORMS}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise CommandError(f"{path}: not a Hugging Face config: {error}") from None
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CommandError(f'{path}: name the model class in it: "architectures": ["LlamaForCausalLM"]')
    try:
        import transformers
    except ImportError:
        raise CommandError(f"{path}: building it takes transformers: pip install transformers") from None
    model_class: Any = getattr(transformers, names[0], None)
    if not isinstance(model_class, type) or not hasattr(model_class, "config_class"):
        raise CommandError(
            f"{path}: transformers {transformers.__version__} has no model class {names[0]!r}. If the model brings "
            "code of its own, name a function that builds it: package.module:callable"
        )
    try:
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each config's own checks raise kinds of their own
        raise CommandError(f"{path}: transformers cannot read it: {' '.join(str(error).split())}") from None

    def build() -> nn.Module:
        model: nn.Module = model_class(config)
        return model

    return _checked(str(path), build)
