"""Names that the pages give to other programs can be imported, whatever room holds what they stand for."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
PAGES.remove(ROOT / "docs" / "extending.md")  # makes the modules that it imports, see test_extending.py
IMPORTS = sorted(
    {
        (module, name.strip())
        for page in PAGES
        for module, names in re.findall(r"^from (ds_llm[\w.]*) import ([\w, ]+)$", page.read_text(), re.M)
        for name in names.split(",")
    }
    # documented before the code had rooms
    | {("ds_llm.models.loading", "load_model"), ("ds_llm.scoring.run", "compute_entropy_for_model")}
)


@pytest.mark.parametrize("module, name", IMPORTS)
def test_can_be_imported(module, name):
    if not hasattr(import_module(module), name):
        import_module(f"{module}.{name}")


def test_pages_give_examples():
    assert len(IMPORTS) > 6


def test_unknown_names_are_refused():
    for module in ("ds_llm", "ds_llm.generation", "ds_llm.models"):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = import_module(module).nothing
