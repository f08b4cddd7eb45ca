"""The C++ kernels and the thread pool without torch, built with the compiler's sanitizers."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(tmp_path: Path, main: str, sources: list[Path], sanitizer: str) -> Path:
    flags = ["-std=c++20", f"-I{ROOT / 'csrc'}", f"-fsanitize={sanitizer}", "-pthread"]
    flags.append("-DSPAC_EMULATE_AMX")  # the code around the matrix tiles, on any machine
    if CXX is None:
        pytest.skip("no C++ compiler")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    probe = subprocess.run([CXX, *flags, str(empty), "-o", str(tmp_path / "probe")])
    if probe.returncode != 0 or subprocess.run([tmp_path / "probe"]).returncode != 0:
        pytest.skip(f"{CXX} has no -fsanitize={sanitizer}")

    def compile_one(source: Path) -> Path:
        out = tmp_path / f"{source.stem}.o"
        subprocess.run(
            [CXX, *flags, "-fno-sanitize-recover=all", "-c", source, "-o", out], check=True
        )
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [ROOT / "tests" / "cpp" / main, *sources]))
    program = tmp_path / "program"
    subprocess.run([CXX, *flags, *objects, "-o", program], check=True)
    return program


def test_kernels_under_address_and_undefined_sanitizer(tmp_path):
    sources = sorted((ROOT / "csrc").glob("expert_ffn_*.cpp"))
    program = build(tmp_path, "sanitize_expert_ffn.cpp", sources, "address,undefined")
    # GCC 13 misaligns AVX-512 temporaries in the frames of this check (GCC bug 110027).
    env = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    out = subprocess.run([program], capture_output=True, text=True, timeout=120, env=env)
    assert out.returncode == 0 and " 0 failures" in out.stdout, out.stdout + out.stderr[-4000:]


def test_thread_pool_under_thread_sanitizer(tmp_path):
    program = build(tmp_path, "sanitize_thread_pool.cpp", [], "thread")
    out = subprocess.run([program, "500"], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and " 0 wrong" in out.stdout, out.stdout + out.stderr[-4000:]


def test_worker_under_thread_sanitizer(tmp_path):
    sources = sorted((ROOT / "csrc").glob("expert_ffn_*.cpp"))
    program = build(tmp_path, "sanitize_worker.cpp", sources, "thread")
    out = subprocess.run([program, "300"], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and " 0 wrong" in out.stdout, out.stdout + out.stderr[-4000:]


def test_many_short_jobs_of_the_thread_pool(tmp_path):
    """`make soak` runs a million."""
    if CXX is None:
        pytest.skip("no C++ compiler")
    main, program = ROOT / "tests" / "cpp" / "sanitize_thread_pool.cpp", tmp_path / "program"
    flags = ["-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", "-pthread"]
    subprocess.run([CXX, *flags, main, "-o", program], check=True)
    out = subprocess.run([program, "50000"], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and " 0 wrong" in out.stdout, out.stdout + out.stderr[-4000:]
