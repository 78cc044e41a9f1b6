"""Looks up names that a library may move or drop, and says in one line which version has them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from ds_llm.compat.versions import installed, requirement
from ds_llm.errors import UserError


def gone(library: str, name: str, reason: object = "") -> UserError:
    """The error for a name that the installed version of a library lacks."""
    because = f" ({reason})" if reason else ""
    return UserError(
        f"{library} {installed(library)} has no {name}{because}; install a tested version: "
        f"pip install '{requirement(library)}'"
    )


def lookup(library: str, names: dict[str, tuple[str, str]]) -> Callable[[str], object]:
    """A `__getattr__` for a module that stands between us and a library.

    names: for each name the module it lies in and what it is for. A name is looked up when it is first asked for, so
    that a process imports no more than it uses. Raises `UserError` where the installed version lacks it.
    """

    def find(name: str) -> object:
        if name not in names:
            raise AttributeError(f"ds_llm.compat lists no name {name!r} of {library}")
        module = names[name][0]
        try:
            found = import_module(module)
        except ImportError as error:
            raise gone(library, module, error) from None
        if not hasattr(found, name):  # a submodule that nobody has imported is no attribute
            try:
                return import_module(f"{module}.{name}")
            except ImportError:
                raise gone(library, f"{module}.{name}") from None
        return getattr(found, name)

    return find
