"""Which packages an installation holds: all of cozyrag/, and three folders of the repository inside it.

Everything else stands in setup.cfg, which can either list packages or find them, but not do both.
"""

from setuptools import find_packages, setup

BESIDE = ("model_cards", "accelerate_configs", "metric_modules")

setup(
    packages=find_packages(include=["cozyrag", "cozyrag.*"]) + [f"cozyrag.{name}" for name in BESIDE],
    package_dir={"cozyrag": "cozyrag"} | {f"cozyrag.{name}": name for name in BESIDE},
)
