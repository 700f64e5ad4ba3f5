"""The package under its installed name: core/ is gpt_checkpoints, and the scripts are gpt_checkpoints.scripts.

Everything else about it stands in pyproject.toml.
"""

import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build starts without it

from core.console.commands import SCRIPTS  # noqa: E402
from core.scripts import renamed  # noqa: E402

SOURCES = {("gpt_checkpoints.scripts", Path(script).stem): ROOT / script for script in SCRIPTS.values()}


class BuildScripts(build_py):
    """Puts each script where a clone has the module that starts it."""

    def run(self) -> None:
        """Build all modules; what an earlier build left in build/lib would get into the wheel, and is removed."""
        if not self.editable_mode and Path(self.build_lib) == Path("build/lib"):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        """Copy a module into the build, a script with its imports renamed."""
        made = super().build_module(module, module_file, package)
        if source := SOURCES.get((package, module)):
            Path(made[0]).write_text(renamed(source.read_text("utf-8")), "utf-8")
        return made


setup(
    packages=["gpt_checkpoints", *(f"gpt_checkpoints.{name}" for name in find_packages("core"))],
    package_dir={"gpt_checkpoints": "core"},
    cmdclass={"build_py": BuildScripts},
)
