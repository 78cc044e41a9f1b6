"""Versions of the libraries whose inner workings we use: what was tested, what is installed.

`python -m ds_llm.compat.versions` prints the lower bounds alone, by which `make test-newest` looks past the upper ones.
"""

from __future__ import annotations

import sys
from importlib import metadata

# library: the lowest version that was tested, and the first that was not; setup.py has the same bounds, which a test
# compares. docs/versions.md says what was run with which.
TESTED = {
    "torch": ("2.11", "2.14"),
    "deepspeed": ("0.19.8", "0.19.9"),
    "transformers": ("5.17", "5.25"),
    "peft": ("0.19", "0.22"),
    "triton": ("3.6", "3.10"),
    "datasets": ("4.0", "5.3"),
    "lm-eval": ("0.4.13", "0.4.14"),
    "optuna": ("5.0", "5.1"),
}


def installed(library: str) -> str | None:
    """The installed version of a library, None where it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def requirement(library: str) -> str:
    """The tested range as pip reads it, for example `peft>=0.19,<0.22`; just the name where none is listed."""
    if library not in TESTED:
        return library
    low, high = TESTED[library]
    return f"{library}>={low},<{high}"


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of `2.13.0+cpu`."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def untested() -> list[str]:
    """One line for each installed library whose version lies outside the tested range."""
    lines = []
    for library, (low, high) in TESTED.items():
        found = installed(library)
        if found is None:
            continue
        if not numbers(low) <= numbers(found) < numbers(high):
            lines.append(
                f"{library} {found} is outside the tested range, {low} up to but without {high}; "
                f"if something fails: pip install '{requirement(library)}'"
            )
    return lines


def warn_untested() -> None:
    """Print what `untested` finds on stderr."""
    for line in untested():
        print(f"warning: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    for _library, (_low, _) in TESTED.items():
        print(f"{_library}>={_low}")
