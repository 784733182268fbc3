"""The wheel holds what the tree holds, the folder names shadow nobody, and imports run one way."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LINKED = {"kernels": "kernels", "export": "export", "bench": "bench"}


def _modules(repository: Path) -> dict[str, Path]:
    """Import name -> file of every module we ship."""
    found: dict[str, Path] = {}
    for file in sorted((repository / "sbs_edge").rglob("*.py")):
        relative = file.relative_to(repository)
        if relative.parts[1] in LINKED and len(relative.parts) > 2:
            continue  # reached through its own folder below
        found[".".join(relative.with_suffix("").parts)] = file
    for folder in LINKED:
        for file in sorted((repository / folder).rglob("*.py")):
            name = ".".join(("sbs_edge", *file.relative_to(repository).with_suffix("").parts))
            found[name] = file
    return found


def test_the_folders_are_links_for_editors_and_type_checkers(repository: Path) -> None:
    for link, target in LINKED.items():
        assert (repository / "sbs_edge" / link).resolve() == repository / target


def test_kernels_has_no_init_so_that_transformers_never_takes_it_for_the_kernels_package(
    repository: Path,
) -> None:
    assert not (repository / "kernels" / "__init__.py").exists()
    code = (
        "import sys, importlib.util; sys.path.insert(0, sys.argv[1]);"
        "spec = importlib.util.find_spec('kernels');"
        "print(spec.origin if spec else None)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(repository)], capture_output=True, text=True, check=True
    )
    assert str(repository) not in out.stdout


@pytest.mark.long
def test_the_wheel_holds_exactly_the_tree(repository: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(repository)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")}
    expected = {name.replace(".", "/") + ".py" for name in _modules(repository)}
    assert names == expected
    assert {n.split("/")[0] for n in names} == {"sbs_edge"}


FORBIDDEN_IMPORTS = {
    # Names that no module of a package may import, at its top or in a function.
    "sbs_edge.analysis": {"torch", "transformers", "onnx", "onnxruntime", "sbs_edge.training", "sbs_edge.export",
                          "sbs_edge.serve", "sbs_edge.runtime", "sbs_edge.kernels", "sbs_edge.report", "sbs_edge.bench",
                          "sbs_edge.cli"},
    "sbs_edge.runtime": {"torch", "transformers", "triton", "onnx", "sbs_edge.training", "sbs_edge.data",
                         "sbs_edge.export", "sbs_edge.serve", "sbs_edge.teacher", "sbs_edge.kernels",
                         "sbs_edge.bench", "sbs_edge.cli"},
    "sbs_edge.serve": {"torch", "transformers", "triton", "onnx", "sbs_edge.training", "sbs_edge.data",
                       "sbs_edge.export", "sbs_edge.teacher", "sbs_edge.kernels", "sbs_edge.bench",
                       "sbs_edge.cli"},
    "sbs_edge.kernels": {"transformers", "onnx", "onnxruntime", "sbs_edge.training", "sbs_edge.data",
                         "sbs_edge.export", "sbs_edge.serve", "sbs_edge.runtime", "sbs_edge.bench",
                         "sbs_edge.cli"},
    "sbs_edge.data": {"torch", "transformers", "sbs_edge.training", "sbs_edge.export", "sbs_edge.serve",
                      "sbs_edge.runtime", "sbs_edge.kernels", "sbs_edge.bench", "sbs_edge.cli"},
    "sbs_edge.training": {"onnx", "onnxruntime", "sbs_edge.export", "sbs_edge.serve", "sbs_edge.runtime",
                         "sbs_edge.bench", "sbs_edge.cli"},
    "sbs_edge.export": {"sbs_edge.serve", "sbs_edge.teacher", "sbs_edge.bench", "sbs_edge.cli"},
    "sbs_edge.bench": {"sbs_edge.cli"},
}  # fmt: skip


def _imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN_IMPORTS))
def test_imports_run_one_way(repository: Path, package: str) -> None:
    modules = {n: f for n, f in _modules(repository).items() if n == package or n.startswith(package + ".")}
    assert modules, f"no module found in {package}"
    wrong = [
        f"{name} imports {imported}"
        for name, file in modules.items()
        for imported in sorted(_imports(file))
        for banned in FORBIDDEN_IMPORTS[package]
        if imported == banned or imported.startswith(banned + ".")
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["sbs_edge", "sbs_edge.runtime.student", "sbs_edge.serve.app"])
def test_production_modules_load_without_torch_or_transformers(module: str) -> None:
    code = (
        f"import sys, {module};"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'triton', 'onnx'}))"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_public_surface_is_what_it_says() -> None:
    import sbs_edge

    assert sorted(sbs_edge.__all__) == [
        "AnswerError", "DataError", "Explanation", "ExportResult", "GuardError", "IntegrityError", "MissingExtra",
        "OutOfMemory", "Prediction", "SbsEdgeError", "Student", "TrainConfig", "TrainResult", "UsageError",
        "__version__", "export", "train",
    ]  # fmt: skip
    assert set(sbs_edge.__all__) <= set(dir(sbs_edge))
    code = (
        "from sbs_edge import *; assert all(map(callable, (Student, export, train, Prediction, DataError)))"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_every_public_name_is_documented(repository: Path) -> None:
    import sbs_edge

    page = (repository / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    for name in set(sbs_edge.__all__) - {"__version__"}:
        home = sbs_edge._MODULE_OF[name]
        found = getattr(
            importlib.import_module(home), name
        )  # sbs_edge.export may be the package of that name
        assert f"\n::: {home}.{name}\n" in page + "\n", f"{name} is not on docs/api/index.md"
        own = found.__doc__ or ""
        assert own.strip(), f"{name} has no docstring"
        assert not own.startswith(f"{name}("), f"{name} has only a generated docstring"
    assert "__version__" in page
    for name, member in vars(sbs_edge.Student).items():
        if not name.startswith("_"):
            assert getattr(member, "__doc__", None), f"Student.{name} has no docstring"


def test_errors_are_the_built_in_exceptions_that_describe_them() -> None:
    import pickle

    import sbs_edge

    for name, built_in, code in (
        ("SbsEdgeError", Exception, 1), ("UsageError", ValueError, 2), ("DataError", ValueError, 2),
        ("GuardError", Exception, 3), ("AnswerError", ArithmeticError, 1), ("OutOfMemory", MemoryError, 1),
        ("IntegrityError", OSError, 4),
    ):  # fmt: skip
        error = getattr(sbs_edge, name)("what is wrong")
        assert isinstance(error, built_in), name
        assert isinstance(error, sbs_edge.SbsEdgeError), name
        assert (str(error), error.exit_code) == ("what is wrong", code)
        assert str(pickle.loads(pickle.dumps(error))) == "what is wrong"
    lacking = sbs_edge.MissingExtra("ray", "scale", "--engine ray")
    assert isinstance(lacking, ImportError)
    assert isinstance(lacking, sbs_edge.UsageError)
    assert (lacking.name, lacking.msg) == ("ray", str(lacking))
    assert str(pickle.loads(pickle.dumps(lacking))) == str(lacking)


def test_import_star_of_results_and_errors_needs_no_torch() -> None:
    code = (
        "import sys; from sbs_edge import Prediction, Explanation, Student, TrainConfig, IntegrityError;"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'triton', 'onnx'}))"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


_STUB = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
  *"import torch"*) exit 1;;
  *"-m uv"*) exit {uv};;
  *--report*) echo '[{{"metadata": {{"name": "torch"}}}}, {{"metadata": {{"name": "{brings}"}}}}]';;
esac
"""


@pytest.mark.parametrize(
    ("brings", "flags", "uv", "takes"),
    [
        ("nvidia-cublas", (), 0, "--torch-backend cpu"),
        ("nvidia-cublas", (), 1, None),
        ("nvidia-cublas", ("CUDA=1",), 0, "-m pip install --quiet -c constraints/main.txt torch"),
        ("nvidia-cublas", ("NVIDIA_DRIVER=.",), 0, "-m pip install --quiet -c constraints/main.txt torch"),
        ("sympy", (), 0, "-m pip install --quiet -c constraints/main.txt torch"),
    ],
)
def test_make_takes_no_cuda_libraries_where_there_is_no_gpu(
    repository: Path, tmp_path: Path, brings: str, flags: tuple[str, ...], uv: int, takes: str | None
) -> None:
    """Make runs with a stand-in for the environment's Python, which answers what pip would install."""
    log = tmp_path / "log"
    for name in ("python", "sbs-edge"):
        stub = tmp_path / "env" / "bin" / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(_STUB.format(log=log, uv=uv, brings=brings))
        stub.chmod(0o755)
    done = subprocess.run(
        ["make", "demo", f"VENV={tmp_path / 'env'}", f"NVIDIA_DRIVER={tmp_path / 'none'}", *flags],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    calls = log.read_text().splitlines()
    installed = [
        call for call in calls if " install " in call and call.endswith(" torch") and "--dry-run" not in call
    ]
    if takes is None:
        assert done.returncode == 2
        assert "make CUDA=1" in done.stderr
        assert "run --out runs/demo" not in calls
    else:
        assert done.returncode == 0, done.stderr
        assert len(installed) == 1
        assert takes in installed[0]
        assert calls[-1] == "run --out runs/demo"
