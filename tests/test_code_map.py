"""The map of the code names every room, in the order that import-linter holds, and no module that does not exist."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "code.md").read_text()


def test_rooms_stand_in_the_order_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "rooms")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE, re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    place = {name.strip(): i for i, layer in enumerate(layers) for name in layer.split("|")}
    assert sorted(named) == sorted(place)
    assert [place[name] for name in named] == sorted(place.values())
    found = {
        path.stem for path in (ROOT / "ds_llm").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(named)


def test_modules_and_their_members_exist():
    words = re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_]+)`", PAGE)
    assert len(words) > 20
    for word in words:
        if word.endswith((".py", ".toml")):
            assert (ROOT / word).exists(), word
            continue
        path = ROOT / "ds_llm" / Path(*word.removeprefix("ds_llm.").split("."))
        if word == "ds_llm.kernels" or path.is_dir() or path.with_suffix(".py").exists():
            continue
        source = path.parent.with_suffix(".py").read_text()
        assert re.search(rf"^(def|class) {path.name}\b", source, re.M), word


def test_paths_named_in_the_pages_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        if page.name == "extending.md":  # names files that it makes, see test_extending.py
            continue
        for path in re.findall(r"`((?:ds_llm|launch|tests|benchmarks|ds_configs|kernels)/[\w./-]+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
