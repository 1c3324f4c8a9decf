"""What setup.cfg cannot say: the packages of an installation, and a README whose links work outside the repository.

An installation holds all of cozyrag/, and three folders of the repository inside it.
"""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

BESIDE = ("model_cards", "accelerate_configs", "metric_modules")
HERE = Path(__file__).parent


def source() -> str:
    """The address of the repository, from setup.cfg."""
    config = ConfigParser(interpolation=None)
    config.read(HERE / "setup.cfg", encoding="utf-8")
    return dict(line.split(" = ") for line in config["metadata"]["project_urls"].split("\n") if line)["Source"]


def long_description() -> str:
    """README.md with absolute links: to pages of the repository, and to its pictures themselves."""
    text, place = (HERE / "README.md").read_text(encoding="utf-8"), source()
    text = re.sub(r"(!\[[^]]*\]\()(?!\w+:|#)", rf"\1{place}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!\w+:|#)", rf"\1{place}/blob/main/", text)


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["cozyrag", "cozyrag.*"]) + [f"cozyrag.{name}" for name in BESIDE],
    package_dir={"cozyrag": "cozyrag"} | {f"cozyrag.{name}": name for name in BESIDE},
)
