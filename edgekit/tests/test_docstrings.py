"""What a signature cannot say, the docstrings of public functions do."""

import ast
import re
from pathlib import Path

import pytest

import edgekit


PACKAGE = Path(edgekit.__file__).parent
ARRAYS = re.compile(r"NDArray|Rows|Logits|Columns|Values|Blocks|Codes|_Bytes|torch\.Tensor")
SHAPES = re.compile(r"shape|float32|float64|float16|uint8|uint16|\(rows|same type")
# The docstrings of commands are their help texts.
COMMANDS = PACKAGE / "cli.py"


def public_functions():
    for path in sorted(PACKAGE.rglob("*.py")):
        if "tests" in path.relative_to(PACKAGE).parts or path == COMMANDS:
            continue
        module = ast.parse(path.read_text(encoding="utf-8"))
        for holder in holders(module):
            for function in holder.body:
                if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                    yield f"{path.relative_to(PACKAGE)}:{function.name}", function


def holders(node):
    """Yield a module and its classes; expressions, the most of a tree, hold none."""
    if isinstance(node, ast.Module | ast.ClassDef) and not is_private(node):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from holders(child)


def is_private(holder):
    return isinstance(holder, ast.ClassDef) and holder.name.startswith("_")


def raised_by(function):
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(named).rpartition(".")[2]
            if name not in {"NotImplementedError", "AttributeError", "AssertionError"}:
                yield name


def is_property(function):
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def returned(function):
    return ast.unparse(function.returns) if function.returns else ""


@pytest.fixture(scope="module")
def functions():
    return dict(public_functions())


def test_there_are_functions_to_look_at(functions):
    assert len(functions) > 500


def test_what_returns_an_array_says_of_what_type_or_shape(functions):
    arrays = {name: f for name, f in functions.items() if ARRAYS.search(returned(f))}
    assert len(arrays) > 40
    silent = [name for name, f in arrays.items() if not SHAPES.search(ast.get_docstring(f) or "")]
    assert silent == []


def test_what_raises_says_so(functions):
    raising = {name: f for name, f in functions.items() if list(raised_by(f))}
    assert len(raising) > 100
    silent = [name for name, f in raising.items() if "Raises:" not in (ast.get_docstring(f) or "")]
    assert silent == []


def test_no_property_raises(functions):
    properties = {name: f for name, f in functions.items() if is_property(f)}
    assert len(properties) > 100
    assert [name for name, f in properties.items() if list(raised_by(f))] == []
