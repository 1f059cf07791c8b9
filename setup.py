"""Only what pyproject.toml cannot say: recipes, jobs and tested versions go into the wheel as data under smolpost/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOMS = ("recipes", "data_gen", "merge")


class BuildWithRooms(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # a clone has the folders beside the library
            for room in ROOMS:
                target = Path(self.build_lib) / "smolpost" / room
                shutil.copytree(room, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy("constraints.txt", Path(self.build_lib) / "smolpost")  # what `doctor --environment` compares


setup(cmdclass={"build_py": BuildWithRooms})
