"""The rules of the house: which way imports run, and that an import changes nothing."""

import ast
import subprocess
import sys

import pytest

from tests.runs import ROOT

WINGS = ("src.data", "src.runtime", "src.evaluation")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for pattern in ("*.py", "src/*.py", "src/*/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
}


def imports(module: str) -> set[str]:
    """The modules of ours that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(MODULES)


ARROWS = {module: imports(module) for module in MODULES}
HALL = [module for module in MODULES if module.count(".") == 1]


def wing(module: str) -> str:
    return module.rpartition(".")[0] if module.count(".") == 2 else ""


@pytest.mark.parametrize("module", HALL)
def test_the_hall_needs_no_wing_but_the_dataset_its_data(module):
    allowed = {"src.data"} if module == "src.dataset" else set()
    assert {wing(target) for target in ARROWS[module]} - {""} <= allowed


@pytest.mark.parametrize("module", [module for module in MODULES if wing(module)])
def test_wings_import_in_one_direction(module):
    allowed = {"src.data": [""], "src.runtime": ["", "src.runtime"], "src.evaluation": ["", *WINGS]}[wing(module)]
    assert {wing(target) for target in ARROWS[module]} <= {*allowed, wing(module)}
    if wing(module) == "src.data":
        assert {target for target in ARROWS[module] if not wing(target)} <= {"src.utils", "src.noise", "src.progress"}
    assert not ARROWS[module] & {"config", "train", "sample", "evaluate", "export"}, "a module imports a script"


def test_imports_run_in_no_circle():
    def reachable(module: str, seen: frozenset = frozenset()) -> set[str]:
        assert module not in seen, f"{module} imports itself by way of {seen}"
        return {module}.union(*(reachable(target, seen | {module}) for target in ARROWS[module]))

    assert reachable("train") >= {*HALL, "config"}


def test_importing_a_module_changes_nothing():
    """No signal handler, no environment variable, no thread count, no running thread."""
    program = f"""
import os, signal, sys, threading
import torch, torch.distributed, torch.utils.tensorboard, tqdm, torchvision, PIL.Image, requests  # what others change is theirs
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    hooks = [sys.excepthook, sys.unraisablehook, threading.excepthook]
    return handlers, dict(os.environ), torch.get_num_threads(), threading.enumerate(), hooks, torch.get_default_dtype()
before = state()
for name in {sorted(set(MODULES) - {"conftest"})}:
    __import__(name)
assert state() == before, [(a, b) for a, b in zip(before, state()) if a != b]
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_no_file_is_longer_than_300_lines():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert not {module: length for module, length in lengths.items() if length > 300}


def test_the_training_loop_fits_on_one_screen_and_no_function_is_longer_than_60_lines():
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    functions = [(name, node) for name, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {(name, node.name): node.end_lineno - node.lineno + 1 for name, node in functions}
    assert not {name: length for name, length in lengths.items() if length > 60}
    (loop,) = (node for node in ast.walk(trees["train"]) if isinstance(node, ast.While))
    assert loop.end_lineno - loop.lineno < 45
