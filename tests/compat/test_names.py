"""Unstable names of other libraries are reached through `ds_llm.compat` alone, exist, and are missed in one line."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ds_llm.compat
from ds_llm.compat import deepspeed, transformers, versions
from ds_llm.compat.deepspeed_optimizers import KINDS

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("ds_llm", "kernels", "launch")
    for path in (ROOT / folder).rglob("*.py")
    if ROOT / "ds_llm" / "compat" not in path.parents
)
LIBRARIES = ("deepspeed", "lm_eval", "optuna", "peft", "tensorboard", "torch", "transformers", "triton")
MODULES = [name for name in LIBRARIES if name != "peft"]  # of which names are listed; of peft only public ones are used
# documented modules of the libraries
PUBLIC = {
    "torch": [
        "torch.autograd.function",
        "torch.distributed",
        "torch.nn",
        "torch.nn.functional",
        "torch.nn.utils",
        "torch.utils.checkpoint",
        "torch.utils.tensorboard",
        "torch.utils.data",
    ],
    "triton": ["triton.language"],
}
PYTHON = {"_exit", "_asdict", "_replace", "_fields"}  # documented names of Python that begin with an underscore


def trees():
    return [(path, ast.parse(path.read_text())) for path in SOURCES]


def imported(tree: ast.AST):
    """(line, module, name) of each import of one of the libraries; name None for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
            yield from ((node.lineno, node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from ((node.lineno, name, None) for name in names if name.split(".")[0] in LIBRARIES)


def listed(library: str) -> dict:
    return importlib.import_module(f"ds_llm.compat.{library}").NAMES


def test_only_top_level_and_documented_modules_are_imported_elsewhere():
    found = []
    for path, tree in trees():
        for line, module, name in imported(tree):
            library = module.split(".")[0]
            public = module == library or module in PUBLIC.get(library, ())
            if not public or (name or "").startswith("_") or (library in MODULES and name in listed(library)):
                found.append(
                    f"{path.relative_to(ROOT)}:{line}: {module} {name or ''}; list it in ds_llm/compat/{library}.py"
                )
    assert not found, "\n".join(found)


def test_private_attributes_and_fields_of_deepspeed_are_named_nowhere_else():
    own, used = set(PYTHON), []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") in ("self", "cls"):
                    own.add(node.attr)
                used.append((node.attr, path, node.lineno))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                used.append((node.value, path, node.lineno))
    assert {"_masters", "_engine"} <= own
    # "_std" and the like are endings of names of metrics, no attributes
    attributes = [(name, path, line) for name, path, line in used if name in deepspeed.FIELDS or name in HF_ATTRIBUTES]
    attributes += [
        (name, path, line)
        for path, tree in trees()
        for name, line in ((n.attr, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Attribute))
        if name.startswith("_") and not name.startswith("__") and name not in own
    ]
    found = [f"{path.relative_to(ROOT)}:{line}: {name}" for name, path, line in attributes]
    assert not found, "\n".join(found)


HF_ATTRIBUTES = ("_attn_implementation", "_experts_implementation", "_apply_gate", "_supports_sdpa", "past_key_values")


@pytest.mark.parametrize("library", MODULES)
def test_every_listed_name_exists_and_is_used(library):
    module = importlib.import_module(f"ds_llm.compat.{library}")
    words = {
        word.id if isinstance(word, ast.Name) else word.name
        for path in (ROOT / "ds_llm").rglob("*.py")
        for word in ast.walk(ast.parse(path.read_text()))
        if isinstance(word, ast.Name | ast.alias)
    } | {alias for path, tree in trees() for _, alias in aliases(tree)}
    for name, (_, purpose) in module.NAMES.items():
        assert getattr(module, name) is not None
        assert purpose
        assert name in words, f"{name} is listed and not used"
    with pytest.raises(AttributeError, match="lists no name 'nothing'"):
        _ = module.nothing


def aliases(tree):
    return [(n.lineno, a.name) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]


def test_class_names_of_transformers_exist():
    for table in (transformers.ATTENTION, transformers.ROUTERS):
        for file, name in table.items():
            assert hasattr(importlib.import_module(f"transformers.models.{file}.modeling_{file}"), name)
    blocks = {
        name
        for file in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
        for name in vars(importlib.import_module(f"transformers.models.{file}.modeling_{file}"))
    }
    assert set(transformers.MOE_BLOCKS) - {"MoEBlock"} <= blocks


def test_fields_of_the_optimizers_stand_in_deepspeed():
    """The sources of DeepSpeed name every field of its optimizers that ours reads: a renamed one fails here first."""
    kinds = {
        "Zero12": deepspeed.DeepSpeedZeroOptimizer,
        "Zero1Bf16": deepspeed.BF16_Optimizer,
        "Zero3": deepspeed.DeepSpeedZeroOptimizer_Stage3,
        "Fused16": deepspeed.FP16_Optimizer,
        "Unfused16": deepspeed.FP16_UnfusedOptimizer,
    }
    tree = ast.parse((ROOT / "ds_llm/compat/deepspeed_optimizers.py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    assert set(kinds) <= set(KINDS)
    for name, owner in kinds.items():
        source = Path(sys.modules[owner.__module__].__file__).read_text()
        fields = {
            node.attr
            for node in ast.walk(classes[name])
            if isinstance(node, ast.Attribute)
            and (getattr(node.value, "id", "") == "opt" or getattr(node.value, "attr", "") == "optimizer")
        }
        assert fields, name
        missing = [field for field in fields if field not in source]
        assert not missing, (name, missing)


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "tensorboard"])
def test_docstrings_say_the_tested_range(library):
    text = importlib.import_module(f"ds_llm.compat.{library}").__doc__.splitlines()[0]
    low, high = versions.TESTED[library.replace("_", "-")]
    assert f"{library.replace('_', '-')} {low}" in text.replace("DeepSpeed", "deepspeed").replace("Triton", "triton")
    if " to " in text:
        last = text.split(" to ")[1].split(":")[0]
        assert [int(x) for x in last.split(".")][-1] + 1 == int(high.split(".")[-1])


def test_bounds_in_setup_are_the_tested_ones():
    text = (ROOT / "setup.py").read_text()
    for library, (low, high) in versions.TESTED.items():
        assert f'"{library}>={low},<{high}"' in text, library


def test_lock_files_hold_one_tested_version_of_each():
    for name in ("constraints-cpu.txt", "constraints-cuda.txt"):
        pins = dict(line.split(" ")[0].split("==") for line in (ROOT / name).read_text().splitlines())
        for library, (low, high) in versions.TESTED.items():
            assert versions.numbers(low) <= versions.numbers(pins[library]) < versions.numbers(high), (name, library)
    assert not any(line.startswith("nvidia") for line in (ROOT / "constraints-cpu.txt").read_text().splitlines())


def test_documented_versions_are_those_of_the_lock_and_the_bounds():
    page = (ROOT / "docs" / "versions.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    table = {row[0]: row[1:] for row in rows}
    locked = dict(
        line.split(" ")[0].split("==") for line in (ROOT / "constraints-cpu.txt").read_text().splitlines()[::-1]
    )
    for library, (low, _) in versions.TESTED.items():
        tested, oldest, _ = table[library]
        assert tested == locked[library], library
        assert versions.numbers(oldest)[: low.count(".") + 1] == versions.numbers(low), library


def test_untested_version_is_one_line_with_both_versions(monkeypatch):
    monkeypatch.setattr(versions.metadata, "version", lambda name: "99.1" if name == "peft" else "0.0.1")
    lines = versions.untested()
    assert len(lines) == len(versions.TESTED)
    (line,) = (line for line in lines if line.startswith("peft"))
    low, high = versions.TESTED["peft"]
    assert "peft 99.1" in line and low in line and high in line and "\n" not in line
    monkeypatch.setattr(versions.metadata, "version", lambda name: versions.TESTED[name][0] + ".0+cpu")
    assert not versions.untested()


HIDE = """
import sys, runpy
import transformers.utils.output_capturing as module
del module.capture_outputs
sys.argv = ["launch/train.py", "mode=pretrain", "data.train=nowhere.bin", "output=/tmp/never", "model.dim=16"]
runpy.run_path("launch/train.py", run_name="__main__")
"""


def test_a_name_that_is_gone_is_one_line_before_anything_is_loaded():
    job = subprocess.run([sys.executable, "-c", HIDE], capture_output=True, text=True, cwd=ROOT)
    assert job.returncode == 1
    *others, line = job.stderr.strip().splitlines()
    assert all(other.startswith("warning: ") for other in others)  # of versions outside the tested range
    assert line.startswith("error: transformers ")
    assert "transformers.utils.output_capturing.capture_outputs" in line
    assert f"pip install '{versions.requirement('transformers')}'" in line


def test_package_says_what_it_is():
    assert "NAMES" in ds_llm.compat.__doc__
