"""How large the code is, and how much of it a reader meets: `uv run python tools/measures.py [--json]`.

Counts are of `packages/*/src`, by `ast` and `tokenize`. "Behind" an import is how many modules of ours, and lines of
them, a fresh interpreter has loaded after it. "Used once": a private function or method whose name occurs, besides its
definition, once in its package.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("repvitok", "latent_action", "repwam_core")
BEHIND = {
    "a tokenizer's training step": "repvitok.training.module",
    "a latent action training step": "latent_action.training",
    "a world action model's training step": "repwam_core.training.module",
    "the model alone": "repwam_core.model.wam",
    "a policy": "repwam_core.policy.policy",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Print a table of every package and of all, then what stands behind imports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    options = parser.parse_args()
    files = {name: sorted((ROOT / "packages").glob(f"*/src/{name}/**/*.py")) for name in PACKAGES}
    measured = {name: measure(paths) for name, paths in files.items()}
    measured["all"] = measure([path for paths in files.values() for path in paths])
    loaded = {what: behind(module) for what, module in BEHIND.items()}
    if options.json:
        print(json.dumps({"packages": measured, "behind": loaded}, indent=2))
        return
    columns = list(measured)
    print(f"{'':<34}" + "".join(f"{name:>15}" for name in columns))
    for what in measured["all"]:
        print(f"{what:<34}" + "".join(f"{measured[name][what]:>15,g}" for name in columns))
    print(f"\n{'behind the import of':<40}{'modules':>10}{'lines':>10}")
    for what, (modules, lines) in loaded.items():
        print(f"{what:<40}{modules:>10}{lines:>10,}")


def measure(paths: list[Path]) -> dict[str, float]:
    """Numbers of some source files."""
    texts = [path.read_text(encoding="utf-8") for path in paths]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    functions = [node for node in nodes if isinstance(node, Function)]
    lengths = sorted(node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno is not None)
    words = Counter(word for text in texts for word in re.findall(r"\w+", text))
    private = [node.name for node in functions if node.name.startswith("_") and not node.name.startswith("__")]
    lines = sum(text.count("\n") for text in texts)
    tenths = statistics.quantiles(lengths, n=10)
    return {
        "modules": len(paths),
        "lines": lines,
        "functions": len(functions),
        "functions per 1,000 lines": round(1000 * len(functions) / lines, 1),
        "lines of a function, median": statistics.median(lengths),
        "lines of a function, p90": tenths[-1],
        "lines of a function, longest": lengths[-1],
        "classes": sum(isinstance(node, ast.ClassDef) for node in nodes),
        "private helpers": len(private),
        "private helpers used once": sum(words[name] == 2 for name in private),
        "modules under 40 lines": sum(text.count("\n") < 40 for text in texts),
        "docstrings, % of lines": round(100 * sum(map(_docstring_lines, nodes)) / lines, 1),
        "comments, % of lines": round(100 * sum(map(_comments, texts)) / lines, 1),
    }


def _docstring_lines(node: ast.AST) -> int:
    if not isinstance(node, ast.Module | ast.ClassDef | Function) or not node.body or ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def _comments(text: str) -> int:
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))


def behind(module: str) -> tuple[int, int]:
    """How many modules of ours, and lines of them, are loaded by importing one."""
    code = (
        f"import json, sys, {module}\n"
        f"ours = [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in {PACKAGES} and m.__file__]\n"
        "print(json.dumps(sorted(set(ours))))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    paths = [Path(path) for path in json.loads(found.stdout.splitlines()[-1])]
    return len(paths), sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


if __name__ == "__main__":
    main()
