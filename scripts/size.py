"""Print size and density of the package: AST nodes, statements per code line, nodes per statement, long functions.

    python scripts/size.py                     # the package
    python scripts/size.py --by-folder         # one row for each folder of the package
    python scripts/size.py --dense 20          # the 20 functions with the most nodes for each statement
    python scripts/size.py PATH ...            # other files or folders

Docstrings and comments are counted on neither side. A code line is a line that holds at least one token of code.
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FUNCTION_LINES = 60
PACKAGE = Path(__file__).parents[1] / "lowrank_tune"

_NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Size:
    """Counts of one or more files, without docstrings and comments."""

    nodes: int = 0
    statements: int = 0
    code_lines: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.nodes + other.nodes, self.statements + other.statements, self.code_lines + other.code_lines)

    @property
    def statements_per_line(self) -> float:
        return self.statements / max(self.code_lines, 1)

    @property
    def nodes_per_statement(self) -> float:
        return self.nodes / max(self.statements, 1)


@dataclass(frozen=True)
class FunctionSize:
    """Counts of one function, its nested functions included."""

    place: str
    lines: int
    size: Size


def docstrings(tree: ast.AST) -> set[ast.stmt]:
    """Returns the statements of `tree` that are docstrings."""
    found: set[ast.stmt] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | _Function) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            found.add(first)
    return found


def count(tree: ast.AST, skipped: set[ast.stmt]) -> tuple[int, int]:
    """Returns (nodes, statements) of `tree` without the statements `skipped`."""
    nodes = statements = 0
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if node in skipped:
            continue
        nodes += 1
        statements += isinstance(node, ast.stmt)
        waiting += ast.iter_child_nodes(node)
    return nodes, statements


def code_lines(source: str, skipped: set[ast.stmt]) -> set[int]:
    """Returns the numbers of the lines of `source` that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for statement in skipped:
        lines -= set(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return lines


def read(files: list[Path]) -> dict[Path, Size]:
    """Returns the counts of each file."""
    sizes: dict[Path, Size] = {}
    for file in files:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
        skipped = docstrings(tree)
        nodes, statements = count(tree, skipped)
        sizes[file] = Size(nodes, statements, len(code_lines(source, skipped)))
    return sizes


def functions(file: Path) -> Iterator[FunctionSize]:
    """Yields the counts of each function of a file."""
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    skipped = docstrings(tree)
    lines = code_lines(source, skipped)
    for node in ast.walk(tree):
        if not isinstance(node, _Function):
            continue
        last = node.end_lineno or node.lineno
        nodes, statements = count(node, skipped)
        size = Size(nodes, statements, len(lines & set(range(node.lineno, last + 1))))
        yield FunctionSize(f"{file}:{node.lineno} {node.name}", last - node.lineno + 1, size)


def print_row(name: str, size: Size) -> None:
    print(
        f"{name:28} {size.nodes:>8,} nodes {size.statements:>7,} statements {size.code_lines:>7,} code lines"
        f"   {size.statements_per_line:.3f} statements per line {size.nodes_per_statement:6.2f} nodes per statement"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[PACKAGE])
    parser.add_argument("--by-folder", action="store_true", help="one row for each folder")
    parser.add_argument("--dense", type=int, default=0, metavar="N", help="the N functions with the densest statements")
    options = parser.parse_args()
    files: list[Path] = []
    for path in options.paths:
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    sizes = read(files)
    if options.by_folder:
        for folder in sorted({file.parent for file in files}):
            print_row(str(folder), sum((size for file, size in sizes.items() if file.parent == folder), Size()))
    print_row("all", sum(sizes.values(), Size()))
    found = [function for file in files for function in functions(file)]
    for function in sorted(found, key=lambda each: -each.lines):
        if function.lines > MAX_FUNCTION_LINES:
            print(f"{function.lines} lines: {function.place}")
    large = [function for function in found if function.size.statements > 3]
    for function in sorted(large, key=lambda each: -each.size.nodes_per_statement)[: options.dense]:
        print(f"{function.size.nodes_per_statement:5.1f} nodes per statement: {function.place}")


if __name__ == "__main__":
    main()
