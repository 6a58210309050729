"""Builds the CUDA library where nvcc is found; all else is declared in pyproject.toml.

The library goes beside the sources for an editable installation and into the wheel otherwise. It needs neither torch
nor a GPU to build, and serves every version of Python and torch, which the wheel's name says.
"""

import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import build_cuda  # noqa: E402  (a build begins in an environment of its own, without this folder)


class BuildCuda(Command):
    """A step of ``build``, as setuptools describes it (setuptools.command.build.SubCommand)."""

    description = "compile the CUDA library"
    user_options = [("build-lib=", "d", "directory to build to")]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        out = build_cuda.LIBRARY
        if not self.editable_mode:
            out = Path(str(self.build_lib), out.parent.name, out.name)
        why = build_cuda.reason_to_skip()
        if why:
            if not self.editable_mode:
                out.unlink(missing_ok=True)  # of a build before this one
            print(
                f"The CUDA kernels are not built: {why}. Everything works on the CPU; for GPUs, install again with "
                "the CUDA toolkit's nvcc on the PATH or CUDA_HOME set.",
                flush=True,
            )
            return
        try:
            build_cuda.build(build_cuda.chosen_archs(), out, say=lambda text: print(text, flush=True))
        except build_cuda.BuildError as fault:
            sys.exit(f"{fault}\nThe CUDA kernels could not be built; EMBER_SKIP_CUDA=1 installs without them.")

    def get_source_files(self) -> list[str]:
        root = build_cuda.ROOT
        return [str(path.relative_to(root)) for path in [root / "tools/build_cuda.py", *build_cuda.SOURCES.iterdir()]]

    def get_outputs(self) -> list[str]:
        if build_cuda.reason_to_skip() or self.editable_mode:
            return []
        return [str(Path(str(self.build_lib), build_cuda.LIBRARY.parent.name, build_cuda.LIBRARY.name))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """With the library a wheel fits one platform, but any Python 3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = build_cuda.reason_to_skip() is not None

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class WithCuda(Distribution):
    def has_ext_modules(self) -> bool:
        return build_cuda.reason_to_skip() is None


build.sub_commands = [*build.sub_commands, ("build_cuda", None)]
setup(distclass=WithCuda, cmdclass={"build_cuda": BuildCuda, "bdist_wheel": PlatformWheel})
