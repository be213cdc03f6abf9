"""Package layout: folder kernels/ is installed as mapet_kernels, mapet/ as mapet. The rest is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        "mapet_kernels",
        *(f"mapet_kernels.{name}" for name in find_packages("kernels")),
        *find_packages(include=["mapet", "mapet.*"]),
    ],
    package_dir={"mapet_kernels": "kernels"},
)
