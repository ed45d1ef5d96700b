"""A linter for chat templates: an allow-list over the Jinja syntax, then one bounded rendering.

Decides whether a template does nothing but arrange messages. The sandbox of Jinja stops escapes
into Python but not a loop that writes 100 MB, so a child with limits of time, memory and output
renders the template once. Obeys docs/design/bundle.md, 5.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bundle.scan.strict import parse_text
from policy.errors import FaultError, RefusedError

CODE = "scan.template"
TEMPLATE_LIMIT = 64 * 1024
MAX_NODES = 20_000
MAX_NESTING = 60
OUTPUT_LIMIT = 256 * 1024
SECONDS = 20
_RAISED = 3  # exit status of the child when the template raised

_HINT = "remove the template: a scientific model is prompted by task, never through a chat template"
_FILTERS = frozenset(
    [
        *("trim", "tojson", "length", "count", "join"),
        *("default", "d", "first", "last", "upper"),
        *("lower", "title", "capitalize", "replace", "string"),
        *("int", "list", "items", "map", "select"),
        *("selectattr", "reject", "rejectattr", "indent", "safe"),
        *("e", "escape"),
    ]
)
_TESTS = frozenset(
    [
        *("defined", "undefined", "none", "string", "mapping"),
        *("iterable", "sequence", "number", "boolean", "integer"),
        *("true", "false", "equalto", "eq", "ne"),
        *("in", "odd", "even", "sameas"),
    ]
)
_GLOBALS = frozenset(["raise_exception", "namespace", "range", "strftime_now", "dict"])
_METHODS = frozenset(
    [
        *("strip", "lstrip", "rstrip", "split", "rsplit"),
        *("startswith", "endswith", "upper", "lower", "title"),
        *("items", "keys", "values", "get", "replace"),
        *("join", "append"),
    ]
)
_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign),
    *(nodes.AssignBlock, nodes.Macro, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair),
    *(nodes.Name, nodes.NSRef, nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Call, nodes.Filter),
    *(nodes.Test, nodes.Compare, nodes.Operand, nodes.Not, nodes.And, nodes.Or, nodes.Concat),
    *(nodes.Add, nodes.Sub, nodes.Mod, nodes.Neg, nodes.CondExpr, nodes.Keyword, nodes.Break),
    nodes.Continue,
)


def lint_template(data: memoryview, what: str) -> None:
    """Refuse a template that does more than arrange messages, or that renders without bound.

    Raises:
        RefusedError: `scan.template`.
        FaultError: `host.self`; the child could not be started.

    """
    text = parse_text(data, code=CODE, what=what, limit=TEMPLATE_LIMIT)
    check_syntax(text, what)
    render(text, what)


def check_syntax(text: str, what: str) -> None:
    """Walk the syntax tree against the allow-list; RefusedError `scan.template`."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(text)
    except (jinja2.TemplateError, RecursionError, ValueError, OverflowError) as error:
        raise _no(what, f"it is not a template: {error!s:.120}") from error
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    count = 0
    pending: list[tuple[nodes.Node, int]] = [(tree, 0)]
    while pending:
        node, depth = pending.pop()
        count += 1
        if count > MAX_NODES or depth > MAX_NESTING:
            raise _no(what, "it is too large or nested too deeply")
        problem = _problem(node, macros)
        if problem:
            raise _no(what, f"line {node.lineno}: {problem}")
        pending.extend((child, depth + 1) for child in node.iter_child_nodes())


def render(text: str, what: str) -> None:
    """Render once with a small conversation, in a child that cannot take the machine along."""
    program = Path(__file__).with_name("render_main.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", os.fspath(program), str(OUTPUT_LIMIT)],
            input=text.encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        )
    except subprocess.TimeoutExpired as error:
        raise _no(what, f"it does not finish within {SECONDS} s") from error
    except OSError as error:
        raise FaultError("host.self", f"cannot start the template child: {error}") from error
    if done.returncode == _RAISED:
        reason = done.stderr.decode("utf-8", "replace").strip()
        raise _no(what, f"it does not render: {reason:.160}")
    if done.returncode != 0:
        raise _no(what, "it exceeds the limits of time, memory or output")


def _problem(node: nodes.Node, macros: set[str]) -> str:
    """Say what is wrong with one node, or nothing."""
    if not isinstance(node, _NODES):
        return f"{type(node).__name__.lower()} is not allowed"
    if isinstance(node, nodes.Call):
        return _call_problem(node, macros)
    what, name, allowed = "", "", True
    if isinstance(node, nodes.Getattr):
        what, name, allowed = "attribute", node.attr, not node.attr.startswith("_")
    elif isinstance(node, nodes.Name):
        what, name, allowed = "name", node.name, not node.name.startswith("_")
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        what, name, allowed = "item", str(node.arg.value), not str(node.arg.value).startswith("_")
    elif isinstance(node, nodes.Filter):
        what, name, allowed = "filter", node.name, node.name in _FILTERS
    elif isinstance(node, nodes.Test):
        what, name, allowed = "test", node.name, node.name in _TESTS
    return "" if allowed else f"{what} {name!r:.60} is not allowed"


def _call_problem(node: nodes.Call, macros: set[str]) -> str:
    called = node.node
    if isinstance(called, nodes.Name) and called.name in _GLOBALS | macros:
        return ""
    if isinstance(called, nodes.Getattr) and called.attr in _METHODS:
        return ""
    name = getattr(called, "attr", getattr(called, "name", "an expression"))
    return f"call of {name!r:.60} is not allowed"


def _no(what: str, reason: str) -> RefusedError:
    return RefusedError(CODE, f"{what}: {reason}", hint=_HINT)
