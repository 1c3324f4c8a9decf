"""The package as the index shows it, and the files around it: metadata, extras, versions, workflow, links."""

import importlib.metadata
import json
import re
import runpy
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import cozyrag

ROOT = Path(__file__).parents[1]
CONFIG = ConfigParser(interpolation=None)
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def extras():
    """Names of packages and extras by extra."""
    return {
        name: [re.split(r"[^\w.\[\],-]", line.strip(), maxsplit=1)[0] for line in value.split("\n") if line.strip()]
        for name, value in CONFIG["options.extras_require"].items()
    }


@pytest.fixture(scope="module")
def setup_arguments():
    """What setup.py gives to setuptools."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_the_long_description_has_absolute_links_alone(setup_arguments):
    """On the page of the package index there is no docs/ beside the README."""
    links = LINK.findall(setup_arguments["long_description"])
    assert len(links) == len(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))) > 10
    assert [link for link in links if not re.match(r"https?://|#", link)] == []
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", setup_arguments["long_description"])
    assert pictures and all("/raw/main/docs/" in link for link in pictures)
    assert setup_arguments["long_description_content_type"] == "text/markdown"


def test_the_metadata_name_the_project_and_what_it_runs_on():
    metadata, urls = CONFIG["metadata"], dict(
        line.split(" = ") for line in CONFIG["metadata"]["project_urls"].strip().split("\n")
    )  # fmt: skip
    assert {"Source", "Documentation", "Changelog", "Issues"} <= set(urls)
    versions = [f"3.{minor}" for minor in (11, 12, 13)]
    assert all(f"Programming Language :: Python :: {each}" in metadata["classifiers"] for each in versions)
    assert WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["python"] == versions
    assert (ROOT / "cozyrag" / "py.typed").exists() and "py.typed" in CONFIG["options.package_data"]["cozyrag"]
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["repo_url"] == urls["Source"] and urls["Changelog"].startswith(urls["Source"])


def test_the_address_of_the_repository_is_that_of_setup_cfg_and_no_command_needs_it():
    urls = dict(line.split(" = ") for line in CONFIG["metadata"]["project_urls"].strip().split("\n"))
    source = urls["Source"]
    owner, name = source.removeprefix("https://github.com/").split("/")
    pages = f"https://{owner}.github.io/{name}/"
    assert all(url == source or url.startswith((f"{source}/", pages)) for url in urls.values())
    rooms = ("cozyrag", "docs", "scripts", "benchmarks", "examples", "model_cards", "accelerate_configs", ".github")
    files = [each for room in rooms for each in (ROOT / room).rglob("*") if each.suffix not in (".pyc", ".png")]
    texts = [each for each in (*ROOT.glob("*.*"), *files) if each.is_file() and each.suffix != ".safetensors"]
    assert len(texts) > 100
    naming = {each.name for each in texts if f"{owner}/{name}".encode() in each.read_bytes()}
    assert naming == {"setup.cfg", "mkdocs.yml"}


def test_all_has_every_extra_for_use():
    made = extras()
    groups = {"all", "trackers"}
    work = {"test", "docs", "benchmarks"}  # on the project itself
    inside = set(re.findall(r"[\w-]+", " ".join(made["all"] + made["trackers"]))) - {"cozyrag"}
    assert inside - groups == set(made) - groups - work


def test_the_version_is_the_same_everywhere_and_has_its_part_of_the_changelog():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    changes = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited[1] == cozyrag.__version__ == changes[1] and changes[0] == "Unreleased"


def test_the_workflow_runs_the_script_of_ci_and_one_version_of_ruff():
    runs = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in runs and "mkdocs build --strict" in runs
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    [version] = {
        *re.findall(r"ruff==([\d.]+)", " ".join(runs)), hooks["repos"][0]["rev"].removeprefix("v"),
        *re.findall(r"ruff==([\d.]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")),
    }  # fmt: skip
    assert version


# ---- links


def anchors(path):
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(path):
    broken = []
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        if "://" in link:
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_contents_of_the_site():
    listed = json.dumps(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f'"{path.name}"' not in listed] == []


def test_links_out_of_docs_lead_to_the_repository():
    hook = runpy.run_path(str(ROOT / "scripts" / "site_links.py"))["on_page_markdown"]
    page, config = SimpleNamespace(file=SimpleNamespace(src_uri="a.md")), {"repo_url": "https://x"}
    text = hook("[a](../CONTRIBUTING.md#tests) [b](tuning.md)", page, config, None)
    assert text == "[a](https://x/blob/main/CONTRIBUTING.md#tests) [b](tuning.md)"
    with pytest.raises(FileNotFoundError, match="gone.md"):
        hook("[a](../gone.md)", page, config, None)


def test_the_installed_package_names_its_extras():
    """Fails after a change of setup.cfg until the package is installed again, as CI does."""
    if importlib.metadata.version("cozyrag") != cozyrag.__version__:
        pytest.skip("another version is installed")
    assert set(importlib.metadata.metadata("cozyrag").get_all("Provides-Extra")) == set(extras())
