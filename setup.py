"""Builds the native kernels; all else is in pyproject.toml.

They are optional: without a C++ compiler the installation goes on, and kvrelay computes with what there is.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = "kvrelay/engine/native"
HEADERS = [f"{NATIVE}/{name}.h" for name in ("kernels", "vectors", "passes", "attention", "terms", "gemm")]
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-maybe-uninitialized", "-g0"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
BASELINE: dict[str, list[str]] = {"baseline": []}
VNNI = [*AVX512, "-mavx512vnni"]
X86 = {
    **BASELINE,
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": VNNI,
    "avx512_bf16": [*VNNI, "-mavx512bf16", "-mavx512vbmi"],
}


class BuildKernels(build_ext):
    """Compiles ``isa.cpp`` once for each instruction set; the library chooses among them when it is loaded."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext``, the only one there is."""
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        defines: list[tuple[str, str | None]] = [("KVR_X86", None)] if x86 else []
        objects = []
        for name, flags in (X86 if x86 else BASELINE).items():
            macros = [*defines, ("KVR_ISA_NAME", f'"{name}"'), ("KVR_TABLE", f"kvr_table_{name}")]
            objects += self._compile(f"{NATIVE}/isa.cpp", name, macros, flags)
        objects += self._compile(f"{NATIVE}/library.cpp", "library", defines, [])
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, libraries=self.get_libraries(ext), target_lang="c++")

    def _compile(self, source: str, name: str, macros: list[tuple[str, str | None]], flags: list[str]) -> list[str]:
        folder = str(Path(self.build_temp) / name)
        arguments = {"macros": macros, "extra_postargs": [*FLAGS, *flags], "depends": HEADERS}
        return self.compiler.compile([source], output_dir=folder, **arguments)


sources = [f"{NATIVE}/isa.cpp", f"{NATIVE}/library.cpp"]
kernels = Extension("kvrelay.engine.native._kernels", sources, depends=HEADERS, language="c++", optional=True)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
