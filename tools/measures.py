"""How large the code is, and how much of it a reader meets: `uv run python tools/measures.py [--json]`.

Counts are of `packages/*/src`, by `ast` and `tokenize`. "Behind" an import is how many modules of ours, and lines of
them, a fresh interpreter has loaded after it. "Used once": a private function or method whose name occurs, besides its
definition, once in its package.

"To read for a change" is computed from the definitions that the change is made in, see `Change`: where they stand, what
they use, who uses them, and who is coupled to them by a name; annotations do not count, nor does the room `runtime/`
unless the change is made there. What someone reads to understand more than that, no script can know.
With `--root FOLDER` the counts and that table are of another checkout; imports need its interpreter and are left out.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("repvitok", "latent_action", "repwam_client", "repwam_core")
BEHIND = {
    "a tokenizer's training step": "repvitok.training.module",
    "a latent action training step": "latent_action.training",
    "a world action model's training step": "repwam_core.training.module",
    "the model alone": "repwam_core.model.wam",
    "a policy": "repwam_core.policy.policy",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Change:
    """A change that a researcher makes, by what it begins at; names are looked up wherever they are defined.

    Attributes:
        begins: top-level definitions, or a method as Class.method, that are edited or replaced.
        coupled: attributes and keys by whose name other code relies on them.
        callers: whether who uses the definitions is read, too, also through functions of the same module.
        users_of: a package: all modules outside of it that import it would have to be edited.
    """

    begins: tuple[str, ...]
    coupled: tuple[str, ...] = ()
    callers: bool = True
    users_of: str = ""


CHANGES = {
    "another loss of the world action model": Change(("wam_loss", "documents_loss", "loss_terms")),
    "another loss of the tokenizer": Change(("RepViTokTraining.losses", "LossWeights")),
    "another attention mask": Change(("visible",)),
    "another simulator": Change(("SimTask",), callers=False, users_of="repwam_core.sim.metaworld"),
    "another robot's layout": Change(("DatasetLayout",), callers=False),
    "another optimizer": Change(("MuonAdamW", "build_optimizer")),
    "another action head": Change(("SpaceProjections", "Velocities"), coupled=("action_in", "action_out")),
}


def main() -> None:
    """Print a table of every package and of all, then what stands behind imports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="FOLDER", help="another checkout")
    options = parser.parse_args()
    files = {name: sorted((options.root / "packages").glob(f"*/src/{name}/**/*.py")) for name in PACKAGES}
    measured = {name: measure(paths) for name, paths in files.items()}
    measured["all"] = measure([path for paths in files.values() for path in paths])
    loaded = {what: behind(module) for what, module in BEHIND.items()} if options.root == ROOT else {}
    house = House.of([path for paths in files.values() for path in paths])
    read = {what: sorted(house.to_read(change)) for what, change in CHANGES.items()}
    if options.json:
        print(json.dumps({"packages": measured, "behind": loaded, "to read": read}, indent=2))
        return
    columns = list(measured)
    print(f"{'':<34}" + "".join(f"{name:>15}" for name in columns))
    for what in measured["all"]:
        print(f"{what:<34}" + "".join(f"{measured[name][what]:>15,g}" for name in columns))
    print(f"\n{'behind the import of':<40}{'modules':>10}{'lines':>10}")
    for what, (modules, lines) in loaded.items():
        print(f"{what:<40}{modules:>10}{lines:>10,}")
    print(f"\n{'to read for':<40}{'modules':>10}{'lines':>10}")
    for what, names in read.items():
        told = ", ".join(name.removeprefix("repwam_core.") for name in names)
        print(f"{what:<40}{len(names):>10}{sum(house.lines[name] for name in names):>10,}  {told}")


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


@dataclass(frozen=True)
class House:
    """The modules by name: their definitions, and what each name that they import stands for.

    Attributes:
        lines: of each module.
        names: what each module mentions.
        keys: the attributes it takes, and the parts of its strings.
        defined: module -> name -> its top-level definition.
        imported: module -> name there -> (module, name) that it was imported as; the name is "" for a module.
    """

    lines: dict[str, int]
    names: dict[str, set[str]]
    keys: dict[str, set[str]]
    defined: dict[str, dict[str, ast.AST]]
    imported: dict[str, dict[str, tuple[str, str]]]

    @classmethod
    def of(cls, paths: list[Path]) -> House:
        """Reads the source files of a checkout."""
        house, froms = cls({}, {}, {}, {}, {}), dict[str, list[ast.ImportFrom]]()
        for path in paths:
            text = path.read_text(encoding="utf-8")
            name = ".".join(path.with_suffix("").parts[path.parts.index("src") + 1 :]).removesuffix(".__init__")
            tree = ast.parse(text)
            nodes = list(ast.walk(tree))
            texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            house.lines[name], house.defined[name] = text.count("\n"), dict(_definitions(tree))
            house.names[name] = {node.id for node in nodes if isinstance(node, ast.Name)}
            house.keys[name] = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            house.keys[name] |= {part for text in texts for part in re.split(r"[.{}]", text)}
            froms[name] = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        for name, nodes in froms.items():
            house.imported[name] = {
                alias.asname or alias.name: house.home(str(node.module), alias.name)
                for node in nodes
                for alias in node.names
                if str(node.module).split(".")[0] in PACKAGES
            }
        return house

    def home(self, module: str, name: str) -> tuple[str, str]:
        """Where a name is defined that is imported from a module, which may be a package that hands it on."""
        if f"{module}.{name}" in self.names:
            return f"{module}.{name}", ""
        below = (other for other in self.names if other.startswith(f"{module}.") and name in self.defined[other])
        return (module if name in self.defined.get(module, {}) else next(below, module)), name

    def to_read(self, change: Change) -> set[str]:
        """The modules that someone reads who makes a change."""
        found: set[str] = set()
        begun: set[str] = set()
        for begin in change.begins:
            name, _, method = begin.partition(".")
            for module in [module for module, names in self.defined.items() if name in names]:
                begun.add(module)
                used = self._mentioned(module, self._node(module, name, method))
                found |= {home for alias, (home, _) in self.imported[module].items() if alias in used}
                if change.callers and not method:
                    own = [other for other, node in self.defined[module].items() if isinstance(node, Function)]
                    through = {other for other in own if name in self._mentioned(module, self.defined[module][other])}
                    found |= {other for other in self.names if self._uses(other, module, {name, *through})}
        for module, keys in self.keys.items():
            outside = change.users_of and not module.startswith(change.users_of)
            if keys & set(change.coupled) or (outside and self._imports(module, change.users_of)):
                found.add(module)
        return begun | {module for module in found if ".runtime" not in module and module not in PACKAGES}

    def _node(self, module: str, name: str, method: str) -> ast.AST:
        node = self.defined[module][name]
        parts = node.body if method and isinstance(node, ast.ClassDef) else []
        return next((part for part in parts if isinstance(part, Function) and part.name == method), node)

    def _mentioned(self, module: str, begin: ast.AST) -> set[str]:
        """Names that a definition mentions, itself or in what it uses of its own module."""
        found: set[str] = set()
        waiting = _names(begin)
        while waiting:
            name = waiting.pop()
            found.add(name)
            own = self.defined[module].get(name)
            waiting |= _names(own) - found if own is not None else set()
        return found

    def _uses(self, module: str, home: str, names: set[str]) -> bool:
        ours = {alias for alias, (where, what) in self.imported[module].items() if where == home and what in names}
        return bool(ours & self.names[module])

    def _imports(self, module: str, package: str) -> bool:
        return any(f"{home}.".startswith(f"{package}.") for home, _ in self.imported[module].values())


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            yield node.name, node
        for target in node.targets if isinstance(node, ast.Assign) else []:
            if isinstance(target, ast.Name):
                yield target.id, node


def _names(node: ast.AST) -> set[str]:
    """Names that the code of a definition mentions; not those of its annotations, which are read only if they help."""
    annotations = [part.annotation for part in ast.walk(node) if isinstance(part, ast.arg | ast.AnnAssign)]
    annotations += [part.returns for part in ast.walk(node) if isinstance(part, Function)]
    hidden = {id(name) for annotation in annotations if annotation is not None for name in ast.walk(annotation)}
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and id(part) not in hidden}


if __name__ == "__main__":
    main()
