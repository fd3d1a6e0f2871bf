"""codebase_import.py, on small codebases whose modules have the names of the caller's modules."""

import pickle
import sys
import types

import pytest

from codebase_import import import_modules

FILES = {
    "main.py": """
        import helpers
        import pack.part
        import pack.part as part
        import os.path, json
        from helpers import Thing as Renamed
        from pack import part as third
        def late():
            from other import VALUE
            return VALUE
    """,
    "helpers.py": "class Thing: whose = {name!r}",
    "other.py": "VALUE = {name!r}",
    "pack/__init__.py": "",
    "pack/part.py": "from .inner import VALUE\nfrom helpers import Thing",
    "pack/inner.py": "VALUE = {name!r}",
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a codebase into a folder. The packages and finders that a test adds are removed at its end."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)

    def write(folder, name):
        for file, text in FILES.items():
            path = tmp_path / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(line.removeprefix(" " * 8) for line in text.format(name=name).splitlines()))
        return tmp_path / folder

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_codebase_uses_its_own_modules_and_leaves_the_callers_alone(write, monkeypatch):
    for name in ("main", "helpers", "other", "pack"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    before, path = dict(sys.modules), list(sys.path)
    main, part = import_modules(write("a-codebase", "ours"), "main", "pack.part")
    assert main.late() == "ours"  # also what is imported after the codebase
    assert main.Renamed is main.helpers.Thing is part.Thing and main.Renamed.whose == "ours"
    assert main.pack.part is main.part is main.third is part and part.VALUE == "ours"
    assert main.os.path is sys.modules["os.path"] and main.json is sys.modules["json"]
    assert {name: module for name, module in sys.modules.items() if name in before} == before and sys.path == path
    assert main.__name__ == "a_codebase.main"
    assert type(pickle.loads(pickle.dumps(main.Renamed()))) is main.Renamed


def test_a_codebase_is_imported_once_and_folders_of_the_same_name_are_kept_apart(write):
    first, second = write("one/codebase", "first"), write("two/codebase", "second")
    (main,) = import_modules(first, "main")
    (other_main,) = import_modules(second, "main")
    assert main.late() == "first" and other_main.late() == "second"
    assert import_modules(first, "main") == [main] and import_modules(second, "main") == [other_main]


def test_tracebacks_show_the_lines_of_the_file(write):
    folder = write("codebase", "ours")
    (folder / "other.py").write_text("import helpers\n\nhelpers.missing\n")
    (main,) = import_modules(folder, "main")
    with pytest.raises(AttributeError) as caught:
        main.late()
    assert caught.traceback[-1].path == folder / "other.py" and caught.traceback[-1].lineno + 1 == 3
