"""The shape of the package: light import, import rule, file sizes, what the wheel holds."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("triton", "cvxpy", "transformers", "rich", "scipy")
SOURCES = [
    path
    for folder in ("spac", "kernels", "bench", "tests", "csrc")
    for suffix in ("py", "h", "cpp")
    for path in (ROOT / folder).rglob(f"*.{suffix}")
]


def run(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    loaded = run(f"import spac, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded == "[]"


@pytest.mark.parametrize("module", ["utility", "cost", "trace", "balance", "draft_length"])
def test_decisions_need_no_torch(module):
    heavy = (*HEAVY, "torch")
    code = f"import spac.{module}, sys; print([m for m in {heavy} if m in sys.modules])"
    assert run(code) == "[]"


def test_public_names_are_callable():
    import spac

    assert all(callable(getattr(spac, name)) for name in spac.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spac.nothing


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_kernels_know_only_triton_and_torch():
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imported(path):
            top = name.split(".")[0]
            known = top in ("torch", "triton") or top in sys.stdlib_module_names
            assert known or name.startswith("spac.kernels."), f"{path.name} imports {name}"


def test_nobody_imports_bench():
    for folder in ("spac", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not any(n.startswith("spac.bench") for n in imported(path)), path


def test_a_checkout_on_the_path_does_not_hide_the_package_kernels():
    code = "import transformers.integrations.hub_kernels, spac.kernels; print('fine')"
    assert run(code, cwd=ROOT) == "fine"


def test_files_can_be_read_in_one_sitting():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_every_package_is_in_the_wheel():
    line = re.search(r"^packages = (\[.*?\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    listed = set(ast.literal_eval(line[1]))
    found = {"spac.kernels", "spac.bench"}
    for path in (ROOT / "spac").rglob("__init__.py"):
        found.add(".".join(path.parent.relative_to(ROOT).parts))
    assert found == listed


def test_every_data_file_is_in_the_wheel():
    line = re.search(r"^spac = (\[.*?\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    patterns = ast.literal_eval(line[1])
    packed = {path for pattern in patterns for path in (ROOT / "spac").glob(pattern)}
    for path in (ROOT / "spac").rglob("*"):
        code = path.suffix in (".py", ".pyc", ".so") or path.is_dir()
        assert code or path in packed, f"{path.relative_to(ROOT)} is in no package-data pattern"
