"""Lists functions and files that have grown too long. Knows nothing of what they do.

Usage: check_sizes.py [FOLDER ...]   (default: tprt launch scripts)
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 300
FOLDERS = ("tprt", "launch", "scripts")


def offenders(file: Path) -> Iterator[str]:
    """Yield `path:line: what is too long` for the file and each function in it, in the order of lines.

    A function's lines run from `def` to its last statement, with docstring and inner functions and without
    decorators.

    Raises:
        SyntaxError: the file is not Python.
    """
    text = file.read_text(encoding="utf-8")
    num_lines = len(text.splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{file}:1: the file has {num_lines} lines; {MAX_FILE_LINES} at most"
    functions = [
        node
        for node in ast.walk(ast.parse(text, str(file)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for function in sorted(functions, key=lambda node: node.lineno):
        num_lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            yield (
                f"{file}:{function.lineno}: {function.name} has {num_lines} lines; {MAX_FUNCTION_LINES} at most"
            )


def main(folders: Sequence[str]) -> int:
    """Print every offender under `folders`; return 1 if there are any, 2 if there was nothing to check."""
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.py"))
    if not files:
        print(f"there is no Python file under {', '.join(folders)}; run this from the repository's root")
        return 2
    found = [offender for file in files for offender in offenders(file)]
    for offender in found:
        print(offender)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or FOLDERS))
