"""The house's rules, read from the sources: layers, who may know which library, nothing executable, no long files."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import REPOSITORY

# A folder imports only from lower layers, never from one of its own layer. Inside a folder there is no cycle.
LAYERS = ("core", "config", "model data", "sample", "report", "train prepare", "release")
LAYER_OF = {folder: number for number, folders in enumerate(LAYERS) for folder in folders.split()}
KNOW_ACCELERATE = {"train.loop", "train.launch", "train.progress"}
ONLY_FOR_SOME_RUNS = {"wandb", "bitsandbytes", "xformers", "tensorboard", "webdataset", "datasets"}
MAX_LINES = {"trainer": 320, "scripts": 400, "tests": 450}
ONE_THING = {  # why a file may be longer
    "schema.py": 450,  # every field of the config, each with its comment
    "base.py": 450,  # a base, wherever its weights come from
    "export.py": 450,  # what an export is made of, what it is checked against, and what it says of itself
}
MAX_FUNCTION_LINES = 60


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


MODULES = {module_name(path): path for path in sources("trainer")}
PACKAGES = {"trainer", *(f"trainer.{folder}" for folder in LAYER_OF)}


def folder_of(module: str) -> str | None:
    """The folder of a module; None for the package itself."""
    return (module.split(".")[1:] or [None])[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that are imported anywhere in a tree, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "write imports in full"
            # `from trainer import checkpoint` imports a module, `from trainer import __version__` a name
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from whole or {node.module}


def imported_at_module_level(tree: ast.Module) -> Iterator[str]:
    """The same for what runs when the module is imported: all but the bodies of functions."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def own_imports(name: str) -> set[str]:
    """The package's modules that a module imports."""
    return {module for module in imported(parse(MODULES[name])) if module.split(".")[0] == "trainer"}


def test_every_module_lies_in_a_folder_with_a_layer() -> None:
    assert {folder_of(module) for module in MODULES} == {None, *LAYER_OF}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_only(name: str) -> None:
    own = own_imports(name)
    if name in PACKAGES:
        assert own == set()  # else importing any module would import what the package does
        return
    folder = folder_of(name)
    assert folder is not None
    allowed = {None, folder, *(other for other, layer in LAYER_OF.items() if layer < LAYER_OF[folder])}
    upward = {module for module in own if folder_of(module) not in allowed}
    assert upward == set(), f"{name} (in {folder}/) imports from its own layer or above"


def test_no_module_imports_itself_by_a_detour() -> None:
    waiting = {name: own_imports(name) - {name, *PACKAGES} for name in MODULES}
    while ready := {name for name, imports in waiting.items() if not imports & waiting.keys()}:
        waiting = {name: imports for name, imports in waiting.items() if name not in ready}
    assert waiting == {}, "these import each other in a circle"


def names_of(tree: ast.Module) -> Iterator[str]:
    """What a module defines at its top level; imports are another module's."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def test_no_name_stands_for_two_things() -> None:
    owners: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for name in names_of(parse(path)):
            owners.setdefault(name, []).append(module)
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}
    assert sorted(names_of(ast.parse("a, b = 1, 2\nc: int = 3\nimport d\ndef e(): f = 1\nclass G: h = 1"))) == [
        "G", "a", "b", "c", "e",
    ]  # fmt: skip


def test_the_design_maps_the_same_layers() -> None:
    text = (REPOSITORY / "docs/design.md").read_text(encoding="utf-8")
    mapped = {folder: int(layer) - 1 for layer, folder in re.findall(r"^\| (\d) \| `(\w+)/` \|", text, re.MULTILINE)}
    assert mapped == LAYER_OF


def test_the_ten_stops_of_a_post_exist() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    stops = re.findall(r"^\| \d+\. .* \| `(.*)` \| `(\w+)` \|$", text, re.MULTILINE)
    assert len(stops) == 10
    for file, function in stops:
        defined = {node.name for node in parse(REPOSITORY / file).body if isinstance(node, ast.FunctionDef)}
        assert function in defined, file


def test_the_package_knows_neither_scripts_nor_tests() -> None:
    for path in sources("trainer"):
        assert not {module.split(".")[0] for module in imported(parse(path))} & {"scripts", "tests", "train"}, path


def test_only_a_few_modules_know_accelerate() -> None:
    knowing = {
        name
        for name, path in MODULES.items()
        for module in imported(parse(path))
        if module.split(".")[0] == "accelerate"
    }
    assert knowing == {f"trainer.{name}" for name in KNOW_ACCELERATE}


def test_packages_that_few_runs_need_are_imported_where_they_are_needed() -> None:
    for path in sources("trainer", "scripts"):
        early = {module.split(".")[0] for module in imported_at_module_level(parse(path))}
        assert not early & ONLY_FOR_SOME_RUNS, path


# --- nothing executable is ever loaded

LOADERS = {"torch.load", "yaml.load", "torch.hub.load", "runpy.run_path", "joblib.load"}
MODULES_THAT_EXECUTE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy"}
NUMPY_LOADERS = {"np.load", "numpy.load", "np.lib.format.read_array", "read_array"}


def dangers(tree: ast.AST) -> Iterator[str]:
    """What could run code from a file."""
    yield from {module for module in imported(tree) if module.split(".")[0] in MODULES_THAT_EXECUTE}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        if name in LOADERS | {"eval", "exec", "compile", "__import__"}:
            yield name
        allowed = keywords.get("allow_pickle")
        if "allow_pickle" in keywords and not (isinstance(allowed, ast.Constant) and allowed.value is False):
            yield f"{name}(allow_pickle=...)"
        if name in NUMPY_LOADERS and "allow_pickle" not in keywords:
            yield f"{name} without allow_pickle=False"
        for word in ("weights_only", "trust_remote_code"):
            if word in keywords:
                yield f"{name}({word}=...)"


@pytest.mark.parametrize("path", [*sources("trainer", "scripts"), REPOSITORY / "train.py"], ids=lambda path: path.name)
def test_nothing_executable_is_loaded(path: Path) -> None:
    assert list(dangers(parse(path))) == []


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from pickle import load", "def f():\n    import dill", "torch.load('a')", "x = np.load(f)",
     "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)", "np.save(f, x, allow_pickle=True)",
     "torch.load(f, weights_only=True)", "eval('1')", "A.from_pretrained(f, trust_remote_code=True)"],
)  # fmt: skip
def test_the_check_sees_each_danger(text: str) -> None:
    assert list(dangers(ast.parse(text)))


# --- size, and what must not be in a file


@pytest.mark.parametrize("folder", sorted(MAX_LINES))
def test_no_file_is_long(folder: str) -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(folder)}
    limits = {name: ONE_THING.get(name, MAX_LINES[folder]) for name in lengths}
    assert lengths and {name: length for name, length in lengths.items() if length > limits[name]} == {}


def test_every_function_of_the_package_fits_a_screen() -> None:
    lengths = {
        f"{path.name}:{node.name}": node.end_lineno - node.lineno + 1
        for path in sources("trainer") for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }  # fmt: skip
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_every_module_says_what_it_is_for() -> None:
    assert [path.name for path in sources("trainer", "scripts", "tests") if not ast.get_docstring(parse(path))] == []


MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:home|root|work)/(?!someone/)")  # someone's home is an example's


def test_no_file_names_a_path_of_a_machine() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    naming = []
    for path in paths:
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content and MACHINE_PATH.search(content.decode("utf-8", errors="replace")):
            naming.append(str(path.relative_to(REPOSITORY)))
    assert len(paths) > 50
    assert naming == []
    assert MACHINE_PATH.search("in " + "/".join(["", "work", "main"])) and not MACHINE_PATH.search("https://a.b/work/c")
