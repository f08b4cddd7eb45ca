"""Builds the C++ extension. Metadata and the package layout are in pyproject.toml."""

from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# The stable ABI gives one wheel for every Python >= 3.10 and every torch >= 2.10, so it does not
# matter which torch the build saw. No -mavx2 here: the ISA is chosen at run time.
STABLE_ABI = ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020A000000000000"]


class Build(BuildExtension):
    """Keeps its object files, also those of an editable installation, so that what follows
    (another one, a wheel) compiles only what has changed since."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/temp"


setup(
    ext_modules=[
        CppExtension(
            "spac._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            include_dirs=["csrc"],
            extra_compile_args=["-O3", "-std=c++20", "-Wall", "-Wextra", *STABLE_ABI],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
