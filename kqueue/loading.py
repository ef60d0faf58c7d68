"""Importing the operator's job modules: the only place where a name becomes code, and it only takes names from kqueue.yaml.

Used by the supervisor (`jobs.modules`) and by the template (`jobs.isolated_modules` too).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from .commands import Command
from .errors import DuplicateJob, Refused, UsageError
from .registry import registry
from .security import SecurityConfig, check_handler_path, check_module_path, find_module_file


class ImportFailed(Exception):
    """A module of kqueue.yaml cannot be used. `key`: which, e.g. "jobs.modules.0"."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def prepare_path(search_path: Sequence[str]) -> None:
    """Put `jobs.path` at the front of sys.path, in its order."""
    for directory in reversed(search_path):
        if directory not in sys.path:
            sys.path.insert(0, directory)


def import_modules(key: str, modules: Sequence[str], search_path: Sequence[str], security: SecurityConfig) -> None:
    """Import each of `modules`, which stand under `key` in kqueue.yaml. Raises ImportFailed, whatever a module does."""
    prepare_path(search_path)
    for index, module in enumerate(modules):
        before = set(registry.names())
        try:
            file = find_module_file(module, search_path)
            if file is not None or module in sys.builtin_module_names:
                check_module_path(security, module, file)
            importlib.import_module(module)
            for name in set(registry.names()) - before:
                registration = registry.get(name)
                if registration is not None:
                    check_handler_path(security, registration)
        except Refused as error:
            raise ImportFailed(f"{key}.{index}", str(error)) from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module may call sys.exit()
            raise ImportFailed(f"{key}.{index}", _why(module, error, search_path)) from None


def register_commands(commands: Sequence[Command]) -> None:
    """Make jobs of `jobs.commands`. Raises ImportFailed."""
    for command in commands:
        try:
            registry.add(command.registration())
        except (UsageError, DuplicateJob) as error:
            raise ImportFailed(f"jobs.commands.{command.name}", str(error)) from None


def import_script(file: str) -> None:
    """Import the script that embeds a runtime, under another name than `__main__`, so that its main part does not run again."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("__kqueue_main__", file)
    if spec is None or spec.loader is None:
        raise ImportFailed("", f"{file} cannot be imported")
    module = module_from_spec(spec)
    sys.modules["__kqueue_main__"] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ImportFailed("", _why(file, error, ())) from None


def template_config(
    path: Sequence[str] = (), modules: Sequence[str] = (), isolated_modules: Sequence[str] = (), *,
    security: SecurityConfig | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a template is told to import. Without `modules`: wherever the jobs registered here were defined, the script too."""
    main_file = None
    if not modules and not isolated_modules:
        path = [entry or os.getcwd() for entry in sys.path]
        defined_in = sorted({registration.module for registration in registry if registration.parameters is None})
        if "__main__" in defined_in:
            main_file = getattr(sys.modules["__main__"], "__file__", None)
        modules = [module for module in defined_in if module != "__main__"]
    allowed = security.allowed_paths if security is not None else None
    return {
        "path": list(path), "modules": list(modules), "isolated_modules": list(isolated_modules),
        "main_file": main_file and os.path.abspath(main_file), "allowed_paths": None if allowed is None else list(allowed),
        "needed": bool(isolated_modules) or any(registration.isolated for registration in registry),
    }  # fmt: skip


def _why(module: str, error: BaseException, search_path: Sequence[str]) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and (module == error.name or module.startswith(error.name + ".")):
        return f"there is no module {module!r} on jobs.path ({', '.join(search_path)}) nor among the installed packages"
    trace = error.__traceback__
    place = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "importlib" not in file:
            place = f" ({file}:{trace.tb_lineno})"
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}:{error.lineno})"
        return f"module {module!r} cannot be imported: SyntaxError: {error.msg}{place}"
    message = " ".join(str(error).split())  # one line, whatever it says
    return f"module {module!r} raised at import: {type(error).__name__}: {message}{place}"
