"""The floor plan: who imports whom, what is optional, one name for one thing, and versions that agree."""

import ast
import graphlib
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "general_preference"
# A module imports its own floor and those below; `models` and modules of the root may import each other.
FLOORS = {"models": 0, "datasets": 1, "trainer": 2, "inference": 2}
FLOORS |= dict.fromkeys(("evaluation", "alignment", "serving", "probing"), 3)
SEPARATE = {("trainer", "inference"), ("inference", "trainer")}
ABOVE = ("scripts", "eval", "rewardbench_eval", "benchmarks", "tests", "data")
OPTIONAL = {"deepspeed", "wandb", "peft", "flash_attn", "matplotlib", "datasets", "accelerate", "scipy", "pandas"}
HAVE_FLAGS = ("cli", "arguments", "export_card")  # the last: of the servers whose commands a README.md gives
PLUGINS = {f"{PACKAGE}.serving.{name}": name for name in ("openrlhf", "verl")}  # only the framework loads its file
NAMES_OF_DISTRIBUTIONS = {"yaml": "pyyaml"}  # where the name that is imported is another


def read_modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every file of the package."""
    found = {}
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    return found


MODULES = read_modules()


def imports(name: str) -> set[str]:
    """What a module imports, inside functions too: dotted names of the package's modules, and other top-level names."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {
                inner if (inner := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
    return {target if target.split(".")[0] == PACKAGE else target.split(".")[0] for target in found}


def room(name: str) -> str:
    """`general_preference.models.score` -> models; modules of the root -> ''."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / PACKAGE / parts[1]).is_dir() else ""


@pytest.mark.parametrize("name", [name for name in MODULES if name != PACKAGE])
def test_imports_go_down(name):
    own = room(name)
    assert own in FLOORS or not own, f"the floor of {own} is not known: add it to FLOORS"
    for target in imports(name):
        assert target not in ABOVE, f"{name} imports {target}, which is not installed with the package"
        if target.split(".")[0] == PACKAGE:
            other = room(target)
            assert FLOORS.get(other, 0) <= FLOORS.get(own, 0) and (own, other) not in SEPARATE, f"{name} -> {target}"


def test_no_import_is_circular():
    graph = {name: {target for target in imports(name) if target.split(".")[0] == PACKAGE} for name in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize(("library", "file"), [("deepspeed", "trainer.deepspeed_engine"), ("matplotlib", "plots")])
def test_one_file_knows_a_library(library, file):
    assert [name for name in MODULES if library in imports(name)] == [f"{PACKAGE}.{file}"]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.split(".")[-1].endswith(HAVE_FLAGS)])
def test_messages_name_arguments_not_flags(name):
    texts = [node.value for node in ast.walk(MODULES[name]) if isinstance(node, ast.Constant)]
    flags = [flag for text in texts if isinstance(text, str) for flag in re.findall(r"(?<![\w-])--[a-z]\w+", text)]
    assert not flags, f"{name} may be used from a notebook, where no one knows {flags}"


def test_a_public_name_is_defined_once():
    places = defaultdict(list)
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def closure(*names: str) -> set[str]:
    """Distributions that these need, themselves included, without extras."""
    found, waiting = set(), list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # not on this system
            continue
        needed = [
            line for line in map(Requirement, lines) if line.marker is None or line.marker.evaluate({"extra": ""})
        ]
        waiting += [line.name for line in needed]
    return found


def test_only_torch_and_transformers_are_needed_to_compare(saved):
    allowed = closure("torch", "transformers")
    installed = metadata.packages_distributions()
    blocked = {name for name, owners in installed.items() if not allowed & set(map(canonicalize_name, owners))}
    blocked = sorted((blocked | OPTIONAL) - {PACKAGE})
    assert not OPTIONAL & allowed
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked}))  # None: cannot be imported\n"
        "from general_preference import GPMPipeline\n"
        "model = GPMPipeline(sys.argv[1], device='cpu')\n"
        "print(model.compare([{'role': 'user', 'content': 'q'}], 'a', 'b') + model.compare('q', 'b', 'a'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, saved()], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(1.0, abs=1e-5)


@pytest.fixture
def packaging(monkeypatch) -> dict:
    """The arguments that setup.py gives to setuptools."""
    found = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: found.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def test_what_is_imported_is_required(packaging):
    extras = [line for name, lines in packaging["extras_require"].items() if name != "dev" for line in lines]
    required = {canonicalize_name(Requirement(line).name) for line in packaging["install_requires"] + extras}
    for name in MODULES:
        others = {target for target in imports(name) if target.split(".")[0] != PACKAGE} - sys.stdlib_module_names
        others -= {PLUGINS.get(name)}
        missing = {canonicalize_name(NAMES_OF_DISTRIBUTIONS.get(target, target)) for target in others} - required
        assert not missing, f"{name} imports {missing}, which setup.py does not require"


def test_the_oldest_versions_are_the_floors_of_setup(packaging):
    lines = packaging["install_requires"] + [line for lines in packaging["extras_require"].values() for line in lines]
    floors = defaultdict(set)
    for line in map(Requirement, lines):
        floors[canonicalize_name(line.name)] |= {spec.version for spec in line.specifier if spec.operator == ">="}
    pinned = {}
    for text in (ROOT / "requirements-oldest.txt").read_text(encoding="utf-8").splitlines():
        if text and not text.startswith(("#", "-e")):
            (spec,) = (line := Requirement(text)).specifier
            assert spec.operator == "=="
            pinned[canonicalize_name(line.name)] = {spec.version}
    assert {name: floors[name] for name in pinned} == pinned
    needed = {canonicalize_name(Requirement(line).name) for line in packaging["install_requires"]}
    assert needed <= set(pinned)
