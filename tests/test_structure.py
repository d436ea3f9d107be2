"""Checks the source against the rules of the layout: imports, unpickling, the README's tree, a test for every file."""

import ast
import functools
import re
import tomllib
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.scripts.faults import FAULTS, WITHOUT_TEST
from tests.support.paths import ROOT

SOURCES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])
STAGES = {"pretrain", "evaluate", "finetune", "retrieve", "reconstruct", "embed", "export"}
UNSAFE = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {
    *("torch.load", "dcp.load", "checkpoint.load", "jit.load", "export.load", "hub.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("extractall", "unpack_archive"),
    *("Tuner.restore", "Tuner.can_restore", "load_model", "read_pickle", "os.system", "os.popen"),
}
UNSAFE_WORDS = {"allow_pickle": {True}, "shell": {True}, "weights_only": {False}}  # of any call
# The one module that opens pickles, with the restricted unpickler of torch.
WEIGHTS_READER = ROOT / "tasks/nn/weights/checkpoint_files.py"
# The one module that pickles: what a process hands to those that it starts, through a pipe that nobody else has.
JOB_PROCESSES = ROOT / "pipeline/data/prepare/local_jobs.py"


def imported(file: Path) -> Set[str]:
    """Full names of what a file imports, anywhere in it."""
    return imported_by(file.read_text("utf-8"))


@functools.cache
def imported_by(source: str) -> Set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# Each package of `pipeline` imports itself and the packages before it.
LAYERS = ("data", "config", "train", "stages", "tracking", "report", "run", "search", "starter", "look", "cli")
# The modules beside them: those below all layers, and those above some, each with the highest that it imports.
BASE = "base"
BASE_MODULES = (
    *("__init__", "child_module", "code_cache", "errors", "files", "notebook", "process_life", "records", "terminal"),
    "usable_cpus",
)
ROOT_MODULES = {
    **dict.fromkeys(BASE_MODULES, BASE),
    **{"image_encoder": "stages", "api": "search", "first_runs": "starter", "__main__": "cli"},
}
RANKS = (BASE, *LAYERS)
# Only these packages import these libraries.
OWNERS = {"mlflow": {"tracking"}, "matplotlib": {"report", "search"}}
# `data` decodes in processes of its own, which need no torch: 660 MB and seconds for each.
TORCH = {"torch", "torchvision", "timm"}
# Each part of Ray stands behind one module.
RAY = {
    "ray.train": {"run/launch.py"},
    "ray.tune": {"search/tune.py"},
    "ray.data": {"data/ray_data.py"},
}


def test_imports() -> None:
    registered = {f"firstlight.tasks.pretrain.{f.stem}" for f in (ROOT / "tasks/pretrain").glob("*.py")}
    methods = registered - {"firstlight.tasks.pretrain.method", "firstlight.tasks.pretrain.__init__"}
    for file in SOURCES:
        names = imported(file)
        roots = {name.split(".")[0] for name in names}
        assert roots & UNSAFE == ({"pickle"} if file == JOB_PROCESSES else set()), file
        assert not roots & {"tests", "bench", "pipeline", "tasks", "conf"}, f"{file}: one import name: firstlight"
        if file.is_relative_to(ROOT / "tasks"):
            assert not roots & {"ray", "mlflow", "yaml", "pydantic", "rich", "click"}, f"{file}: only torch and its kin"
            assert not any(name.startswith("firstlight.pipeline") for name in names), file
        if file.name != "__init__.py":
            assert not names & methods, f"{file}: nobody but the registry imports a method"
        if file.parent == ROOT / "pipeline/stages" and file.stem in STAGES:
            others = {f"firstlight.pipeline.stages.{stage}" for stage in STAGES - {file.stem}}
            assert not names & others, f"{file}: stages meet through artifacts"


PIPELINE = [file for file in SOURCES if file.is_relative_to(ROOT / "pipeline") and file.parent != ROOT / "pipeline"]


def rank_module(name: str) -> str | None:
    """The layer of a module, or that which a module beside them stands above; None if it is none of the pipeline."""
    parts = name.split(".")
    if parts[:2] != ["firstlight", "pipeline"] or len(parts) < 3:
        return None
    return parts[2] if parts[2] in LAYERS else ROOT_MODULES.get(parts[2])


def list_wrong_imports(layer: str, names: Set[str]) -> list[str]:
    """Modules of the pipeline above `layer` among those that a file imports, and libraries that only others may."""
    higher = [name for name in names if (rank := rank_module(name)) and RANKS.index(rank) > RANKS.index(layer)]
    return higher + [name for name in names if layer not in OWNERS.get(name.split(".")[0], {layer})]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer: str) -> None:
    files = [file for file in PIPELINE if file.is_relative_to(ROOT / "pipeline" / layer)]
    assert files
    for file in files:
        assert not list_wrong_imports(layer, imported(file)), file
    for file, name in [(source, name) for source in files for name in imported(source)]:
        parts = name.split(".")
        if layer == "data":
            assert parts[0] not in TORCH, f"{file.name} imports {name}"
            assert parts[:2] != ["firstlight", "tasks"] or parts[2] == "extensions", f"{file.name} imports {name}"


# The files of the kinds of stages: only here a section is told apart by its class.
FILES_OF_KINDS = [
    *(ROOT / "pipeline/stages" / f"{stage}.py" for stage in STAGES),
    *(ROOT / "pipeline/stages" / folder for folder in ("sections", "pretraining", "finetuning", "exporting")),
]


def list_class_checks(source: str, classes: Set[str]) -> list[str]:
    """Returns the lines of a source that ask whether something is of one of the classes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and write_expression(node.func) in ("isinstance", "issubclass"):
            asked: ast.AST = node.args[1]
        elif isinstance(node, ast.MatchClass):
            asked = node.cls
        else:
            continue
        names = {write_expression(part) for part in ast.walk(asked) if isinstance(part, ast.Name | ast.Attribute)}
        if any(name.rpartition(".")[2] in classes for name in names):
            found.append(ast.unparse(node))
    return found


def test_kinds_of_stages_are_told_apart_in_their_own_files_only() -> None:
    texts = [file.read_text("utf-8") for file in (ROOT / "pipeline/stages/sections").glob("*.py")]
    sections = {
        node.name
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef) and "kind: Literal[" in ast.unparse(node)
    }
    assert len(sections) == len(STAGES)
    others = [file for file in SOURCES if not any(file.is_relative_to(own) for own in FILES_OF_KINDS)]
    found = {file: list_class_checks(file.read_text("utf-8"), sections) for file in others}
    assert not {file: lines for file, lines in found.items() if lines}, "ask the section or its StageKind"


@pytest.mark.parametrize(
    "line", ["isinstance(s, Pretrain)", "isinstance(s, (int, m.Embed))", "issubclass(s, Embed | A)"]
)
def test_a_check_of_a_class_is_noticed(line: str) -> None:
    assert list_class_checks(f"if {line}:\n    pass\n", {"Pretrain", "Embed"}) == [line]
    assert not list_class_checks("isinstance(stage, TrainingOptions)", {"Pretrain", "Embed"})


def list_wrong_root_imports(module: str, names: Set[str]) -> list[str]:
    """Imports that a module beside the layers must not have: what stands above it, MLflow, matplotlib and Ray; below
    all layers, also torch and `tasks`.
    """
    layer, roots = ROOT_MODULES[module], {*OWNERS, "ray"}
    roots |= TORCH if layer == BASE else set()
    tasks = [name for name in names if layer == BASE and name.startswith("firstlight.tasks")]
    return list_wrong_imports(layer, names) + [name for name in names if name.split(".")[0] in roots] + tasks


@pytest.mark.parametrize("file", sorted((ROOT / "pipeline").glob("*.py")), ids=lambda file: file.stem)
def test_modules_beside_the_layers_import_what_is_below_them(file: Path) -> None:
    assert not list_wrong_root_imports(file.stem, imported(file))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("api", "mlflow"), ("notebook", "matplotlib.pyplot"), ("image_encoder", "ray.data"), ("records", "torch")),
        *(("files", "firstlight.pipeline.data.store"), ("errors", "firstlight.pipeline.api")),
        *(("image_encoder", "firstlight.pipeline.run.runner"), ("api", "firstlight.pipeline.first_runs")),
        ("terminal", "firstlight.tasks.nn"),
    ],
)
def test_a_wrong_import_beside_the_layers_is_noticed(module: str, name: str) -> None:
    assert list_wrong_root_imports(module, {name, "json"})


def test_layers_do_not_import_what_stands_above_them() -> None:
    assert list_wrong_imports("run", {"firstlight.pipeline.api"}) == ["firstlight.pipeline.api"]
    assert not list_wrong_imports("cli", {"firstlight.pipeline.api", "firstlight.pipeline.errors"})


def test_packages_of_the_pipeline_are_layers() -> None:
    assert {file.relative_to(ROOT / "pipeline").parts[0] for file in PIPELINE} == set(LAYERS)


@pytest.mark.parametrize("part", RAY)
def test_each_part_of_ray_is_behind_one_module(part: str) -> None:
    users = {
        file.relative_to(ROOT / "pipeline").as_posix()
        for file in PIPELINE
        if any(f"{name}.".startswith(f"{part}.") for name in imported(file))
    }
    assert users == RAY[part]


def test_no_module_imports_itself_through_others() -> None:
    """Also through imports in functions and under `TYPE_CHECKING`."""
    modules = {
        ".".join(["firstlight", *f.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): f
        for f in SOURCES
    }
    graph = {name: {n for n in imported(file) if n in modules and n != name} for name, file in modules.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_file_of_the_pipeline_names_a_method() -> None:
    names = re.findall(r'"(\w+)": \w+', (ROOT / "tasks/pretrain/__init__.py").read_text())
    assert names
    # The augmentations of FixMatch's paper are a pool of ops of that name.
    others = {ROOT / "pipeline/data/augment/policies.py"}
    for file in set((ROOT / "pipeline").rglob("*.py")) - others:
        text = file.read_text()
        if any(name in text for name in names):
            strings = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
            assert not strings & set(names), file


@pytest.mark.fault(51, "nothing in the source unpickles or evaluates")
def test_nothing_is_unpickled_or_evaluated() -> None:
    found = {file: unsafe(file.read_text("utf-8")) for file in SOURCES}
    assert not {file: calls for file, calls in found.items() if calls}


def is_restricted_load(call: ast.Call) -> bool:
    """True for `torch.load(..., weights_only=True)`, with the word as it stands here."""
    words = {word.arg: word.value for word in call.keywords}
    restricted = words.get("weights_only")
    return (
        isinstance(restricted, ast.Constant)
        and write_expression(call.func) == "torch.load"
        and restricted.value is True
        and None not in words
        and "pickle_module" not in words
    )


def test_one_module_opens_checkpoints_of_torch() -> None:
    users = [file for file in SOURCES if read_calls(file.read_text("utf-8")).has_restricted_load]
    assert users == [WEIGHTS_READER]


def write_expression(node: ast.expr) -> str:
    """Returns what `ast.unparse` does, which takes ten times as long for a name with dots."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
        return f"{write_expression(node.value)}.{node.attr}"
    return ast.unparse(node)


@dataclass(frozen=True)
class Calls:
    """The functions that a source calls."""

    functions: Set[str]
    has_restricted_load: bool
    # Functions, and words with values that `UNSAFE_WORDS` has, of all calls but restricted loads.
    others: Set[str]
    unsafe_words: Set[str]
    # The regular expressions: first arguments of functions of `re`, and `pattern=` of fields.
    patterns: tuple[str, ...]


@functools.cache
def read_calls(source: str) -> Calls:
    """Returns the calls of a source, which several tests look at."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [(write_expression(call.func), call) for call in calls]
    others = [(name, call) for name, call in named if not is_restricted_load(call)]
    patterns = [call.args[0] for name, call in named if name.startswith("re.") and call.args]
    patterns += [word.value for call in calls for word in call.keywords if word.arg == "pattern"]
    return Calls(
        {name for name, _ in named},
        len(others) < len(named),
        {name for name, _ in others},
        {
            f"{word.arg}={word.value.value}"
            for _, call in others
            for word in call.keywords
            if isinstance(word.value, ast.Constant) and word.value.value in UNSAFE_WORDS.get(word.arg or "", ())
        },
        tuple(ast.unparse(node) for node in patterns),
    )


def unsafe(source: str) -> Set[str]:
    """Calls that unpickle, evaluate, unpack an archive or start a shell."""
    calls = read_calls(source)
    names = calls.others | imported_by(source) - {"safetensors.torch.load"}
    # Its get_model unpickles, and is a name that others have, too.
    words = calls.unsafe_words | ({"TorchCheckpoint"} if "TorchCheckpoint" in source else set())
    return (
        words
        | (names & BUILTINS)
        | {name for name in names if any(f".{name}".endswith(f".{call}") for call in UNSAFE_CALLS)}
    )


@pytest.mark.parametrize(
    "line",
    [
        *(
            "torch.load(f)",
            "torch.load(f, weights_only=False)",
            "torch.load(f, weights_only=flag)",
            "torch.load(f, weights_only=True, **options)",
            "torch.load(f, weights_only=True, pickle_module=m)",
            "from torch import load",
            "torch.export.load(f)",
            "torch.distributed.checkpoint.load(s)",
            "TorchCheckpoint(c).get_model(m)",
        ),
        *(
            "eval(x)",
            "exec(x)",
            "yaml.load(x, Loader=Own)",
            "tar.extractall()",
            "shutil.unpack_archive(f)",
            "subprocess.run(x, shell=True)",
        ),
        *(
            "tune.Tuner.restore(p)",
            "mlflow.pytorch.load_model(u)",
            "mlflow.pyfunc.load_model(u)",
            "np.load(f, allow_pickle=True)",
            "dcp.load(s)",
        ),
    ],
)
def test_unsafe_calls_are_found(line: str) -> None:
    assert unsafe(line)


def test_parquet_is_opened_where_its_columns_are_looked_at() -> None:
    opening = {"pq.ParquetFile", "pq.read_table", "pq.read_pandas", "pq.ParquetDataset"}
    found = {file.name for file in SOURCES if opening & read_calls(file.read_text("utf-8")).functions}
    assert found == {"parquet.py"}


def test_patterns_end_where_the_text_ends() -> None:
    r"""In Python, `$` also matches before a newline at the end; `\Z` does not, nor does `\z` of pydantic."""
    patterns = [(file, pattern) for file in SOURCES for pattern in read_calls(file.read_text("utf-8")).patterns]
    assert patterns
    assert not [(file, pattern) for file, pattern in patterns if "$" in pattern]


def test_commands_print_through_the_console_that_escapes() -> None:
    for file in SOURCES:
        calls = read_calls(file.read_text("utf-8")).functions
        plain = {"Console", "print", "sys.stdout.write", "sys.stderr.write"}
        assert not calls & (plain - ({"sys.stderr.write"} if file.name == "main.py" else set())), file
        assert "click.echo" not in calls or file.name == "output.py", file


def tree_of_the_readme() -> dict[str, str]:
    """Path -> the line about it, of the README's block `tree`; nesting is by indentation."""
    block = re.search(r"```tree\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert block
    paths: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, block.group(1).splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        names, _, text = line.strip().partition("   ")
        for name in names.split("  "):
            paths["".join(folders[:depth]) + name] = text.strip()
        folders[depth:] = [names] if names.endswith("/") else []
    return paths


def test_readme_tree_names_every_package() -> None:
    tree = tree_of_the_readme()
    for path, text in tree.items():
        if "*" not in path:
            assert (ROOT / path).exists(), f"README.md names {path}, which does not exist"
        assert text, f"README.md says nothing about {path}"
    for folder in ("pipeline", "tasks"):
        for package in (ROOT / folder).rglob("__init__.py"):
            assert package.parent.relative_to(ROOT).as_posix() + "/" in tree


def test_folders_are_small_and_files_begin_with_a_docstring() -> None:
    for file in SOURCES:
        assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), file
    for folder in {file.parent for file in SOURCES}:
        modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(modules) <= 16, f"{folder.relative_to(ROOT)} has {len(modules)} modules"


def test_the_readme_names_real_recipes_and_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for recipe in re.findall(r"conf/recipe/[\w/]+\.yaml", text):
        assert (ROOT / recipe).exists(), recipe
    assert "make demo" in text
    assert "make test" in text


FLOORS = {"torch": "2.10", "ray": "2.54", "mlflow": "3.11", "pillow": "12.3"}  # below: SECURITY.md names the holes


def test_versions_with_known_holes_are_refused() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    wanted = {
        found.name.lower(): found.specifier
        for found in map(Requirement, tomllib.loads(text)["project"]["dependencies"])
    }
    pinned = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for name, floor in FLOORS.items():
        major, minor = map(int, floor.split("."))
        assert not wanted[name].contains(f"{major}.{minor - 1}.99"), name
        assert wanted[name].contains(pinned[name]), name
        assert Version(pinned[name]) >= Version(floor), name
        assert f"{name} >= {floor}" in (ROOT / "SECURITY.md").read_text("utf-8").lower()


def test_methods_and_tasks_have_their_page_of_conf_and_test() -> None:
    for folder, group in (("pretrain", "method"), ("downstream", "task")):
        text = (ROOT / f"tasks/{folder}/__init__.py").read_text()
        for name in re.findall(r'"(\w+)": \w+', text):
            assert (ROOT / f"conf/{group}/{name}.yaml").exists()
            assert (ROOT / f"tests/tasks/{folder}/test_{name}.py").exists()


def faults_of(file: Path) -> list[tuple[object, object]]:
    """Row and text of every `fault` mark in a file of tests."""
    text = file.read_text("utf-8")
    if "fault" not in text:
        return []
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [
        tuple(ast.literal_eval(word) for word in call.args)
        for call in calls
        if write_expression(call.func) == "pytest.mark.fault"
    ]  # type: ignore[misc]


def test_every_fault_has_a_test_or_a_reason_why_not() -> None:
    marks = [mark for file in (ROOT / "tests").rglob("test_*.py") for mark in faults_of(file)]
    assert list(FAULTS) == list(range(1, 61))
    assert all(text for _, text in marks)
    assert {row for row, _ in marks} | WITHOUT_TEST.keys() == FAULTS.keys()
    assert not {row for row, _ in marks} & WITHOUT_TEST.keys(), "a reason why there is no test, and a test"


TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
TEST_MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in TESTS}


def file_of_tests(source: Path) -> Path:
    """tests/<folder>/test_<name>.py of <folder>/<name>.py."""
    path = source.relative_to(ROOT)
    return ROOT / "tests" / path.parent / f"test_{path.name}"


def test_every_source_file_has_tests_of_its_name() -> None:
    named = {source for source in SOURCES if source.stem not in ("__init__", "__main__")}
    untested = {s.relative_to(ROOT).as_posix() for s in named if not file_of_tests(s).exists()}
    assert not untested, "add tests/<folder>/test_<file>.py"


def test_no_test_file_imports_a_test_file() -> None:
    assert TESTS
    assert not [file for file in TESTS if imported(file) & TEST_MODULES], "shared builders belong into tests/support"


def asserts_something(function: ast.FunctionDef) -> bool:
    """Has an `assert`, a `pytest.raises`, or a call of a helper whose name begins with `assert_` or `check_`."""
    if any(isinstance(node, ast.Assert) for node in ast.walk(function)):
        return True
    names = {write_expression(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    return "pytest.raises" in names or any(name.rpartition(".")[2].startswith(("assert_", "check_")) for name in names)


def test_every_test_asserts_something() -> None:
    for file in TESTS:
        functions = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
        tests = [function for function in functions if function.name.startswith("test_")]
        assert tests, file
        assert not [function.name for function in tests if not asserts_something(function)], file


def test_a_test_that_asserts_nothing_is_noticed() -> None:
    (idle,) = ast.parse("def test_x() -> None:\n    run()\n").body
    (busy,) = ast.parse("def test_x() -> None:\n    with pytest.raises(ValueError):\n        run()\n").body
    assert isinstance(idle, ast.FunctionDef)
    assert isinstance(busy, ast.FunctionDef)
    assert not asserts_something(idle)
    assert asserts_something(busy)
