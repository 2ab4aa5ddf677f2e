"""Everything else is in pyproject.toml. The repository is used from its checkout, so no wheel of it is built."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class NoWheel(bdist_wheel):
    """Rejects wheels, which would install packages with general names such as `engine` and `scripts`."""

    def run(self) -> None:
        raise SystemExit("error: speaking-faces runs from its checkout: bash scripts/setup.sh, or pip install -e .")


setup(cmdclass={"bdist_wheel": NoWheel})
