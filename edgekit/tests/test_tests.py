"""What the tests promise about themselves: none passes because there was nothing to look at."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


TESTS = Path(__file__).parent
LOOPS = (ast.For, ast.While)
WRAPPERS = {"enumerate", "zip", "sorted", "reversed", "range", "list", "items", "values", "product"}


def checks(node: ast.AST, checkers: set[str]) -> bool:
    """Tell whether a statement can fail a test by itself."""
    if isinstance(node, ast.Assert):
        return not is_vacuous_all(node)
    if isinstance(node, ast.With):
        return any(called(item.context_expr) == "raises" for item in node.items)
    return called(node) in checkers


def called(node: ast.AST) -> str | None:
    """Return the last part of the name of what is called."""
    match node:
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name
        case _:
            return None


def is_vacuous_all(node: ast.Assert) -> bool:
    """Tell whether this is ``assert all(… for …)`` and nothing else, which holds for nothing."""
    call = node.test
    return (
        isinstance(call, ast.Call)
        and ast.unparse(call.func) == "all"
        and isinstance(call.args[0], ast.GeneratorExp)
        and not is_filled(call.args[0].generators[0].iter, set())
    )


def is_filled(iterable: ast.expr, known: set[str]) -> bool:
    """Tell whether a reader sees that something is there: a literal, or the name of one."""
    match iterable:
        case ast.Constant(value=str() | int() as value):
            found = bool(value)
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            found = any(
                is_filled(item.value, known) if isinstance(item, ast.Starred) else True
                for item in items
            )
        case ast.Dict(keys=keys):
            found = bool(keys)
        case ast.Name(id=name):
            found = name in known
        case ast.Call(func=ast.Name(id=name), args=arguments) if name in WRAPPERS:
            found = any(is_filled(argument, known) for argument in arguments)
        case ast.Call(func=ast.Attribute(value=whole, attr=name)) if name in WRAPPERS:
            found = is_filled(whole, known)
        case ast.BinOp(left=left, right=right):
            found = is_filled(left, known) or is_filled(right, known)
        case _:
            found = False
    return found


def outside_of_loops(node: ast.AST, known: set[str]) -> Iterator[ast.AST]:
    """Yield what certainly runs; a loop over what is certainly there is no loop."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Assign) and is_filled(child.value, known):
            known |= {target.id for target in child.targets if isinstance(target, ast.Name)}
        if isinstance(child, ast.For) and is_filled(child.iter, known):
            yield from outside_of_loops(child, known)
        elif not isinstance(child, (*LOOPS, ast.FunctionDef, ast.Lambda)):
            yield child
            yield from outside_of_loops(child, known)


def literals_of(tree: ast.Module) -> set[str]:
    """Return the names that a module gives to literals."""
    known = set[str]()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if is_filled(node.value, known):
                known |= {target.id for target in targets if isinstance(target, ast.Name)}
    return known


def functions_of(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def vacuous_tests(source: str) -> list[str]:
    """Return the tests whose every check is inside a loop that may have no turn."""
    tree = ast.parse(source)
    functions, constants = functions_of(tree), literals_of(tree)
    checkers: set[str] = {"fail", "assert_allclose", "assert_array_equal", "assert_called"}
    certain = [list(outside_of_loops(function, {*constants})) for function in functions]
    for _ in range(3):  # helpers of helpers
        checkers |= {
            function.name
            for function, nodes in zip(functions, certain, strict=True)
            if not function.name.startswith("test_")
            and any(checks(node, checkers) for node in nodes)
        }
    return [
        function.name
        for function, nodes in zip(functions, certain, strict=True)
        if function.name.startswith("test_")
        and not any(checks(node, checkers) for node in nodes)
        and any(isinstance(n, ast.Assert) or checks(n, set()) for n in ast.walk(function))
    ]


def test_no_test_passes_because_there_was_nothing_to_look_at():
    paths = sorted(TESTS.rglob("test_*.py"))
    found = {path.relative_to(TESTS): vacuous_tests(path.read_text("utf-8")) for path in paths}
    assert TESTS / "test_plan.py" in paths
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("body", "is_vacuous"),
    [
        ("for x in f(): assert x", True),
        ("assert all(x for x in f())", True),
        ("for x in [*f()]: assert x", True),
        ("while f(): assert g()", True),
        ("for x in f(): assert x\n    assert f()", False),
        ("for x in (1, 2): assert x", False),
        ("for x in NAMES: assert x", False),
        ("for x in IMPORTED: assert x", True),
        ("names = {'a': 1}\n    for x in names.items(): assert x", False),
        ("for x in zip(f(), (1, 2), strict=True): assert x", False),
        ("for x in f():\n        with pytest.raises(E): g(x)\n        assert x", True),
        ("with pytest.raises(E): f()\n    for x in f(): assert x", False),
        ("f()", False),  # fails by an exception
    ],
)
def test_such_tests_are_found(body, is_vacuous):
    assert bool(vacuous_tests(f"NAMES = [1]\n\ndef test_it():\n    {body}\n")) is is_vacuous
