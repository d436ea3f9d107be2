"""The rules of the layout, checked over the source: who may import whom, nothing unpickled, the README's tree and table of commands are true."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.faults import FAULTS, WITHOUT_TEST

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])
STAGES = {"prepare", "pretrain", "evaluate", "finetune", "retrieve", "embed", "export"}
UNSAFE = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {
    *("torch.load", "dcp.load", "checkpoint.load", "jit.load", "export.load", "hub.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("extractall", "unpack_archive"),
    *("Tuner.restore", "Tuner.can_restore", "load_model", "read_pickle", "os.system", "os.popen"),
}
UNSAFE_WORDS = {"allow_pickle": {True}, "shell": {True}, "weights_only": {False}}  # of any call


def imported(source: str) -> set[str]:
    """Full names of what a source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports(file: Path) -> None:
    names = imported(file.read_text("utf-8"))
    roots = {name.split(".")[0] for name in names}
    assert not roots & UNSAFE
    assert "tests" not in roots
    if file.is_relative_to(ROOT / "tasks"):
        assert not roots & {"ray", "mlflow", "yaml", "pipeline", "pydantic", "rich", "click"}, "tasks knows only torch, torchvision, timm and scipy"
    methods = {f"tasks.pretrain.{f.stem}" for f in (ROOT / "tasks/pretrain").glob("*.py")} - {"tasks.pretrain.method", "tasks.pretrain.__init__"}
    if file.name != "__init__.py":
        assert not names & methods, "nobody but the registry imports a method"
    if file.parent.name == "pipeline" and file.stem in STAGES:
        assert not names & {f"pipeline.{stage}" for stage in STAGES - {file.stem}}, "stages meet through artifacts"


def test_no_file_of_the_pipeline_names_a_method() -> None:
    names = re.findall(r'"(\w+)": \w+', (ROOT / "tasks/pretrain/__init__.py").read_text())
    assert names
    for file in (ROOT / "pipeline").glob("*.py"):
        strings = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & set(names), file


@pytest.mark.fault(51, "nothing in the source unpickles or evaluates")
@pytest.mark.parametrize("file", SOURCES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    assert not unsafe(file.read_text("utf-8"))


def calls_in(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def unsafe(source: str) -> set[str]:
    """Calls that unpickle, evaluate, unpack an archive or start a shell."""
    calls = calls_in(source)
    names = {ast.unparse(call.func) for call in calls} | imported(source) - {"safetensors.torch.load"}
    words = {
        f"{word.arg}={word.value.value}"
        for call in calls
        for word in call.keywords
        if isinstance(word.value, ast.Constant) and word.value.value in UNSAFE_WORDS.get(word.arg or "", ())
    }
    words |= {"TorchCheckpoint"} if "TorchCheckpoint" in source else set()  # its get_model unpickles, and is a name that others have, too
    return words | (names & BUILTINS) | {name for name in names if any(f".{name}".endswith(f".{call}") for call in UNSAFE_CALLS)}


@pytest.mark.parametrize(
    "line",
    [
        *(
            "torch.load(f)",
            "from torch import load",
            "torch.export.load(f)",
            "torch.distributed.checkpoint.load(s)",
            "TorchCheckpoint(c).get_model(m)",
        ),
        *("eval(x)", "exec(x)", "yaml.load(x, Loader=Own)", "tar.extractall()", "shutil.unpack_archive(f)", "subprocess.run(x, shell=True)"),
        *("tune.Tuner.restore(p)", "mlflow.pytorch.load_model(u)", "mlflow.pyfunc.load_model(u)", "np.load(f, allow_pickle=True)", "dcp.load(s)"),
    ],
)
def test_what_is_unsafe_is_seen(line: str) -> None:
    assert unsafe(line)


def test_parquet_is_opened_where_its_columns_are_looked_at() -> None:
    opening = {"pq.ParquetFile", "pq.read_table", "pq.read_pandas", "pq.ParquetDataset"}
    found = {file.name for file in SOURCES if opening & {ast.unparse(call.func) for call in calls_in(file.read_text("utf-8"))}}
    assert found == {"plain_parquet.py"}


def test_the_decoding_tasks_import_no_torch() -> None:
    """660 MB and seconds per process, for nothing."""
    seen, waiting = set(), ["pipeline.stream", "pipeline.prepare", "pipeline.inference"]
    while waiting:
        name = waiting.pop()
        file = ROOT / (name.replace(".", "/") + ".py")
        file = file if file.exists() else ROOT / name.replace(".", "/") / "__init__.py"
        if name in seen or not file.exists():
            continue
        seen.add(name)
        tree = ast.parse(file.read_text("utf-8"))
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        for node in top:
            waiting += (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module), *(f"{node.module}.{a.name}" for a in node.names)]
            )
        assert not any(name.startswith(("torch", "tasks")) for name in waiting), (file, waiting)


def tree_of_the_readme() -> dict[str, str]:
    block = re.search(r"```tree\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert block
    lines = [line for line in block.group(1).splitlines() if line.strip()]
    paths: dict[str, str] = {}
    folder = ""
    for line in lines:
        name, _, text = line.strip().partition("  ")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            paths[name] = text.strip()
        else:
            paths[folder + name] = text.strip()
    return paths


def test_the_tree_of_the_readme_is_true() -> None:
    told = tree_of_the_readme()
    for path, text in told.items():
        assert (ROOT / path).exists(), f"README.md tells of {path}, which is not there"
        assert text, f"README.md says nothing of {path}"
    for folder in ("pipeline", "tasks"):
        for file in (ROOT / folder).rglob("*.py"):
            path = file.relative_to(ROOT).as_posix()
            if file.name not in ("__init__.py", "__main__.py"):
                assert path in told, f"README.md does not tell of {path}"


def test_the_readme_names_real_recipes_and_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for recipe in re.findall(r"conf/recipe/[\w/]+\.yaml", text):
        assert (ROOT / recipe).exists(), recipe
    assert "make demo" in text
    assert "make test" in text


FLOORS = {"torch": "2.10", "ray": "2.54", "mlflow": "3.11", "pillow": "12.3"}  # below: SECURITY.md names the holes


def test_versions_with_known_holes_are_refused() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    wanted = {found.name.lower(): found.specifier for found in map(Requirement, tomllib.loads(text)["project"]["dependencies"])}
    pinned = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
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
    calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
    return [tuple(ast.literal_eval(word) for word in call.args) for call in calls if ast.unparse(call.func) == "pytest.mark.fault"]  # type: ignore[misc]


def test_every_fault_has_a_test_or_a_reason_why_not() -> None:
    marks = [mark for file in (ROOT / "tests").rglob("test_*.py") for mark in faults_of(file)]
    assert list(FAULTS) == list(range(1, 57))
    assert all(text for _, text in marks)
    assert {row for row, _ in marks} | WITHOUT_TEST.keys() == FAULTS.keys()
    assert not {row for row, _ in marks} & WITHOUT_TEST.keys(), "a reason why there is no test, and a test"
