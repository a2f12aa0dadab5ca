"""What must not stand in the source: calls by which a file, a model or a command line could run code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.model.loading import model_type_of

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("symphony_vlm", "train", "eval", "demo", "benchmarks", "docs")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Each of them runs what it finds in a file.
FORBIDDEN_MODULES = {"cloudpickle", "cPickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "tempfile.mktemp": "another process can take the name first",
    "yaml.load": "use yaml.safe_load",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.full_load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
    "pandas.read_pickle": "a pickle",
    "pd.read_pickle": "a pickle",
    "torch.hub.load": "runs the code of a repository",
}
FORBIDDEN_METHODS = {"extract": "members may leave the folder", "extractall": "members may leave the folder"}
# Functions whose default may read a pickle: the argument must be there, as a literal.
REQUIRED_ARGUMENTS = {"torch.load": ("weights_only", True), "open_clip.create_model": ("weights_only", True)}
FORBIDDEN_ARGUMENTS = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "verify": True}
"""Arguments, whatever the function is, with the one literal that they may have."""


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or an attribute of one; an attribute of anything else begins with a dot."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def _is_literal(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _faults(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        yield from (f"imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
    elif isinstance(node, ast.Dict):  # arguments that are collected before the call
        for key, value in zip(node.keys, node.values, strict=True):
            name = key.value if isinstance(key, ast.Constant) else None
            if name in FORBIDDEN_ARGUMENTS and not _is_literal(value, FORBIDDEN_ARGUMENTS[name]):
                yield f"{name!r} set to {ast.unparse(value)}"
    elif isinstance(node, ast.Call):
        yield from _faults_of_call(node)


def _faults_of_call(node: ast.Call) -> Iterator[str]:
    name = _dotted(node.func)
    arguments = {keyword.arg: keyword.value for keyword in node.keywords}
    if isinstance(node.func, ast.Name) and name in FORBIDDEN_BUILTINS:
        yield f"{name}()"
    if name in FORBIDDEN_CALLS:
        yield f"{name}(): {FORBIDDEN_CALLS[name]}"
    if isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS:
        yield f".{node.func.attr}(): {FORBIDDEN_METHODS[node.func.attr]}"
    if name in REQUIRED_ARGUMENTS:
        argument, value = REQUIRED_ARGUMENTS[name]
        if argument not in arguments or not _is_literal(arguments[argument], value):
            yield f"{name}() without {argument}={value}"
    for argument, allowed in FORBIDDEN_ARGUMENTS.items():
        if argument in arguments and not _is_literal(arguments[argument], allowed):
            yield f"{argument}={ast.unparse(arguments[argument])}"


def faults(source: str) -> list[str]:
    """Every forbidden thing in a module, with its line."""
    nodes = ast.walk(ast.parse(source))
    return [f"{getattr(node, 'lineno', 0)}: {fault}" for node in nodes for fault in _faults(node)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_that_it_reads(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=choice)",
        "open_clip.create_model(name, pretrained=tag)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=options.trust)",
        "options = {'trust_remote_code': True}",
        "tar.extractall(folder)",
        "archive.extract(member)",
        "requests.get(url, verify=False)",
        "tempfile.mktemp()",
    ],
)
def test_a_forbidden_call_is_found(source: str) -> None:
    assert len(faults(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "yaml.safe_load(text)",
        "model.eval()",
        "torch.compile(model)",
        "re.compile(pattern)",
        "subprocess.run(command, check=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "requests.get(url)",
        "options = {'trust_remote_code': False}",
    ],
)
def test_what_is_allowed_is_not(source: str) -> None:
    assert faults(source) == []


def test_a_model_whose_configuration_never_ends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 200_000)
    with pytest.raises(InputError, match="not valid JSON"):
        model_type_of(str(tmp_path))
