"""Imports code of the user's own, which options name as `module:name`.

A module lies in the current folder or is installed. An error in the user's code becomes one
sentence that names the option and contains the cause.
"""

import difflib
import importlib
import os
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any


def cause(error: BaseException) -> str:
    """Text with the class and the message of an error, for another message."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def import_module(name: str, *, key: str) -> ModuleType:
    """Imports a module of the user: from the current folder, else from the installed packages.

    This order does not depend on how cerl was started. The current folder is the first one in
    Python's search path only during the import. If the module was found there, the folder stays at
    the end of the path: modules that it imports later are found, but none of them replaces an
    installed package.

    Args:    name of the module; key, the option that names it, for messages.
    Raises:  ImportError naming the folder where the module was looked for, or the package that the
             module lacks; RuntimeError if the module itself fails, or another module of its name is
             in use.
    """
    folder = os.getcwd()
    top = name.partition(".")[0]
    importlib.invalidate_caches()
    here = PathFinder.find_spec(top, [folder])
    there = getattr(sys.modules.get(top), "__file__", None)
    if here and here.origin and there and os.path.realpath(there) != os.path.realpath(here.origin):
        raise RuntimeError(
            f"{key}: {here.origin} cannot be imported, because the module {top} is already in "
            f"use from {there}; give the file another name"
        )
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ImportError(
                f"{key}: module {name} needs a package that is missing: {error}"
            ) from error
        raise ImportError(
            f"{key}: no module {name} in the current folder ({folder}) or among the installed "
            f"packages; run cerl where {name.replace('.', os.sep)}.py lies, or pip install it"
        ) from error
    except Exception as error:
        raise RuntimeError(f"{key}: importing {name} failed ({cause(error)})") from error
    finally:
        sys.path.remove(folder)
    if here and folder not in sys.path:
        sys.path.append(folder)
    return module


def imported(name: str, *, key: str) -> Any:
    """What an option names as `module:name`.

    Args:    name, "module:name"; key, the dotted key of the option, for messages.
    Raises:  ValueError if the module has nothing of that name; ImportError and RuntimeError as
             `import_module`.
    """
    module_name, _, attribute = name.partition(":")
    module = import_module(module_name, key=key)
    if not hasattr(module, attribute):
        public = [word for word in vars(module) if not word.startswith("_")]
        close = difflib.get_close_matches(attribute, public, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{key}: module {module_name} has no {attribute!r}{meant}")
    return getattr(module, attribute)


def imported_callable(name: str, *, key: str) -> Any:
    """A function or class that an option names. Raises: as `imported`; ValueError otherwise."""
    found = imported(name, key=key)
    if not callable(found):
        raise ValueError(
            f"{key}: expected {name} to be a function or a class, got a {type(found).__name__}"
        )
    return found
