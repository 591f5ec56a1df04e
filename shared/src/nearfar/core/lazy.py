"""A package's main names, each imported when it is first asked for."""

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def offer(package: str, file: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of `package`, whose `__init__.py` is `file`.

    The names stand beside it in `__init__.pyi`, as imports `from nearfar.x.y import Name as Name`, where type checkers
    and editors read them too.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    where = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"{package} has no {name}; it offers {', '.join(sorted(where))}")
        module, attribute = where[name]
        return getattr(import_module(module), attribute)

    return sorted(where), get, lambda: sorted(where)
