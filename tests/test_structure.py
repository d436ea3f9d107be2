"""The rules of the layout, checked over the source: who may import whom, nothing unpickled, the README's tree and table of commands are true."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])
STAGES = {"prepare", "pretrain", "evaluate", "finetune", "retrieve", "embed", "export"}
UNSAFE = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "extractall", "dcp.load", "Tuner.restore", "load_model"}


def imported(file: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports(file: Path) -> None:
    names = imported(file)
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
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)}
    allowed = {"yaml.load"} if file.name == "yaml_strict.py" else set()  # with its own SafeLoader
    found = {call for call in calls if call in ("eval", "exec") or any(f".{call}".endswith(f".{unsafe}") for unsafe in UNSAFE_CALLS)}
    assert not found - allowed


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


def test_the_cluster_file_is_what_rays_launcher_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))


def test_methods_and_tasks_have_their_page_of_conf_and_test() -> None:
    for folder, group in (("pretrain", "method"), ("downstream", "task")):
        text = (ROOT / f"tasks/{folder}/__init__.py").read_text()
        for name in re.findall(r'"(\w+)": \w+', text):
            assert (ROOT / f"conf/{group}/{name}.yaml").exists()
            assert (ROOT / f"tests/tasks/{folder}/test_{name}.py").exists()
