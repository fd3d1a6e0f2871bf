"""Import the modules of a codebase as a package, for torch.hub.

Both codebases run from their own folders, so their modules have short names: `models`, `datasets`, `main`. A program
that calls torch.hub may have modules of these names itself, or load models of both codebases. `import_modules`
therefore makes the folder a package of its own: `models/detr.py` of `DETR-with-iRPE` becomes the module
`DETR_with_iRPE.models.detr`. Within the package, `from util.misc import x` means the `util` of the same folder: the
loader compiles it as `from DETR_with_iRPE.util.misc import x`. `sys.path` and other modules stay as they are.

Both codebases contain the same copy of this file.
"""

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path


def import_modules(folder: Path, *names: str) -> list[types.ModuleType]:
    """Import modules of the codebase in `folder`.

    Args:
        folder: absolute path of the codebase.
        names: modules as the codebase itself names them, for example `util.misc`.
    Returns: the modules, in the order of their names.
    """
    package = _package_name(folder)
    if package not in sys.modules:
        spec = importlib.machinery.ModuleSpec(package, loader=None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[package] = importlib.util.module_from_spec(spec)
        sys.meta_path.insert(0, _Finder(package, folder))
    return [importlib.import_module(f"{package}.{name}") for name in names]


def _package_name(folder: Path) -> str:
    """The folder's name as an identifier, with underscores appended if a package of another folder has that name."""
    name = re.sub(r"\W", "_", folder.name)
    while name in sys.modules and list(getattr(sys.modules[name], "__path__", ())) != [str(folder)]:
        name += "_"
    return name


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of one codebase's package."""

    def __init__(self, package: str, folder: Path) -> None:
        self.package = package
        self.siblings = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/*.py")
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{self.package}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path, _ImportRewriter(self.package, self.siblings))
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module after its imports of siblings were redirected into the package."""

    def __init__(self, name: str, path: str, rewriter: "_ImportRewriter") -> None:
        super().__init__(name, path)
        self.rewriter = rewriter

    def get_code(self, name: str) -> types.CodeType:
        # Not the inherited method: it would read and write the cached bytecode of the file as a top-level module.
        tree = self.rewriter.visit(ast.parse(self.get_data(self.path), self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _ImportRewriter(ast.NodeTransformer):
    """Puts the package's name before the names of sibling modules in import statements."""

    def __init__(self, package: str, siblings: set[str]) -> None:
        self.package, self.siblings = package, siblings

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.level == 0 and self._is_sibling(node.module):
            node.module = f"{self.package}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> ast.Import:
        aliases = []
        for alias in node.names:
            if not self._is_sibling(alias.name):
                aliases.append(alias)
                continue
            aliases.append(ast.alias(f"{self.package}.{alias.name}", alias.asname))
            if alias.asname is None:  # `import util.misc` binds the name `util`
                top = alias.name.partition(".")[0]
                aliases.append(ast.alias(f"{self.package}.{top}", top))
        return ast.copy_location(ast.Import(aliases), node)

    def _is_sibling(self, name: str) -> bool:
        return name.partition(".")[0] in self.siblings
