"""Rules that pages keep: where commands stand, how long cells are, that links lead somewhere, that options exist."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
from jobs import ROOT

from ds_llm.config import run as config

DOCS = ROOT / "docs"
# how something is looked up; a note is what lies in docs/notes, and all other pages are guides
REFERENCE = ("code", "configuration", "faults", "kernels", "model", "scoring_metrics")
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
GUIDES = [page for page in PAGES if page.parent == DOCS and page.stem not in REFERENCE]
RUNS = re.compile(r"^\$? ?([A-Z_]+=\S+ )*(python|deepspeed|torchrun|make|bash|sbatch) ")
LONGEST_CELL = 25  # words
SUBCOMMANDS = ("convert", "evaluate", "prepare")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[int, str]]:
    """Fenced blocks of a page without a language, or of a shell: number of the first line and text."""
    text = re.sub(r"^```(?!bash$)\w+\n.*?^```$", blank, page.read_text(), flags=re.M | re.S)
    found = re.finditer(r"^```(?:bash)?\n(.*?)^```$", text, re.M | re.S)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


def blank(match: re.Match) -> str:
    """As many empty lines as the block has."""
    return "\n" * match[0].count("\n")


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", blank, page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What links to the headings of a page say behind `#`, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "") for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def links(page: Path) -> list[tuple[Path, str]]:
    """File and anchor of each relative link."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    split = [link.partition("#") for link in found if not re.match(r"[a-z]+:", link)]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in split]


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_guide_begins_with_a_command(page):
    first = next((line for line, block in blocks(page) if any(RUNS.match(row) for row in block.splitlines())), None)
    assert first is not None and first <= 10


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_cells_are_short(page):
    for row in re.findall(r"^\|.*\|$", prose(page), re.M):
        for cell in re.split(r"(?<!\\)\|", row):
            assert len(cell.split()) <= LONGEST_CELL, cell


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for file, anchor in links(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file}#{anchor}"


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in reached:
            reached.add(page)
            todo += [file for file, _ in links(page) if file.suffix == ".md" and file.exists()]
    assert not set(PAGES) - reached


def test_tests_named_by_the_page_of_faults_exist():
    named = set(re.findall(r"`(\w+/test_\w+\.py)`", (DOCS / "faults.md").read_text()))
    assert len(named) > 10
    for path in named:
        assert (ROOT / "tests" / path).exists(), path


def commands() -> list[tuple[str, str, list[str]]]:
    """Page, script and arguments of each command of the pages that starts a script of launch/."""
    found = []
    for page in PAGES:
        if page.stem == "extending":  # adds what its commands name, and test_extending.py runs them
            continue
        for _, block in blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                if RUNS.match(line) and (match := re.search(r"launch/(\w+)\.py( .*)?$", line)):
                    words = shlex.split(match[2] or "", comments=True)
                    found.append((name(page), match[1], [word for word in words if word != "..."]))
    return found


def option_names(script: str, command: str | None) -> set[str]:
    """Options that the help of a command names."""
    arguments = [f"launch/{script}.py", *([command] if command else []), "--help"]
    module = importlib.import_module(f"ds_llm.commands.{script}")
    with (
        mock.patch("sys.argv", arguments),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(io.StringIO()) as out,
        pytest.raises(SystemExit) as end,
    ):
        module.main()
    assert end.value.code == 0
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", out.getvalue()))


def test_options_of_commands_exist():
    known: dict[tuple, set[str]] = {}
    checked = 0
    for page, script, words in commands():
        command = words[0] if script in SUBCOMMANDS else None
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        if (script, command) not in known:
            known[script, command] = option_names(script, command)
        assert given <= known[script, command], f"{page}: launch/{script}.py {shlex.join(words)}"
        checked += 1
    assert checked > 60


def test_recipes_and_keys_of_training_commands_exist():
    checked = 0
    for page, script, words in commands():
        if script != "train":
            continue
        recipe = words[words.index("--config") + 1] if "--config" in words else None
        if recipe is not None and not recipe.startswith("ds_configs/"):
            continue  # stands for the reader's own file
        overrides = [word for word in words if re.match(r"[a-z][\w.]*=", word)]
        settings = config.load(recipe and str(ROOT / recipe), overrides)
        assert settings.mode, page
        checked += 1
    assert checked > 25


def test_pages_that_the_code_names_exist():
    files = [file for room in ("ds_llm", "launch", "benchmarks", "ds_configs") for file in (ROOT / room).rglob("*")]
    named = {
        (file, path)
        for file in files
        if file.suffix in (".py", ".yaml", ".sh")
        for path in re.findall(r"docs/[\w/]+\.md", file.read_text())
    }
    assert len(named) > 20
    for file, path in named:
        assert (ROOT / path).exists(), f"{file}: {path}"


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name)
def test_examples_are_python(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        compile(block, name(page), "exec")
