"""Who imports whom: a package knows only what lies below it, and importing pulls in nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ldm_audio

ROOT = Path(ldm_audio.__file__).parent
CHECKOUT = ROOT.parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if "checkout" not in path.parts)

ALONE = {"errors", "files", "randomness"}  # layer 0, and free to be used by the rest of it
LAYER_0 = ALONE | {"layers", "distributed", "audio"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "randomness": set(),
    "layers": ALONE,
    "distributed": ALONE,
    "audio": ALONE,
    "models": ALONE | {"layers", "audio", "distributed"},
    "diffusion": ALONE,
    "data": ALONE | {"audio"},
    "objectives": ALONE | {"diffusion", "distributed", "audio"},
    "pipelines": ALONE | {"layers", "diffusion", "audio"},
    "evaluation": ALONE | {"models", "audio"},
    "convert": LAYER_0 | {"models", "diffusion", "data"},
    "training": ALONE | {"distributed", "audio", "objectives.base"},
}
# May import anything.
ON_TOP = {"config", "exchange", "pretrained", "speech_system", "quickstart", "cli", "sampling"}
HEAVY = (
    "wandb", "librosa", "tokenizers", "torchaudio", "matplotlib", "transformers", "diffusers", "tensorboard",
    "sympy",
)  # fmt: skip


def imports(path: Path) -> list[str]:
    """Every module that a file imports anywhere, names behind `from` included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def package(path: Path) -> str:
    """`models` for `ldm_audio/models/unet.py`, `layers` for `ldm_audio/layers.py`."""
    inside = path.relative_to(ROOT)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def allowed(imported: str, own: str) -> bool:
    inside = imported.removeprefix("ldm_audio.")
    return any(inside == name or inside.startswith(f"{name}.") for name in MAY_IMPORT[own] | {own})


BELOW = [path for path in MODULES if package(path) not in ON_TOP and path != ROOT / "__init__.py"]
below_the_top = pytest.mark.parametrize("path", BELOW, ids=lambda path: path.relative_to(ROOT).as_posix())


@below_the_top
def test_a_module_imports_only_what_lies_below_it(path):
    own = package(path)
    assert own in MAY_IMPORT, f"{path}: a package without a place in the table"
    ours = [name for name in imports(path) if name.split(".")[0] == "ldm_audio"]
    assert [name for name in ours if not allowed(name, own)] == []


@below_the_top
def test_only_the_top_knows_of_hydra(path):
    assert {name.split(".")[0] for name in imports(path)} & {"hydra", "omegaconf"} == set()


def test_only_the_top_is_imported_by_the_entry_points():
    for name in ("train.py", "sample.py"):
        ours = {i.split(".")[1] for i in imports(CHECKOUT / name) if i.startswith("ldm_audio")}
        assert ours <= ON_TOP | {"pipelines"}, name


def test_package_files_are_empty():
    inner = [path for path in ROOT.rglob("__init__.py") if path.parent != ROOT]
    assert [path for path in inner if path.read_text().strip()] == []


def test_importing_everything_pulls_in_nothing_heavy():
    names = [".".join(path.relative_to(CHECKOUT).with_suffix("").parts) for path in MODULES]
    names = [name.removesuffix(".__init__") for name in names]
    code = f"""
import importlib, random, sys
state = random.getstate()
for name in {names!r}:
    importlib.import_module(name)
assert random.getstate() == state
print(*sorted({{name.split(".")[0] for name in sys.modules}} & set({HEAVY!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
