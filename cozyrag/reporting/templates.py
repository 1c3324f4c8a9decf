"""HTML from the templates of `assets/pages`, with everything that comes from outside escaped by Jinja2.

It exists so that no other module writes a tag: questions, passages and answers are strangers' text. Left out: what is
shown (demo_app.py, html_report.py, compare.py).
"""

from functools import cache

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cozyrag.runtime.assets import PAGES_FOLDER


def render(template: str, **values: object) -> str:
    """The template of that file name, filled in. Values are escaped unless they are `Markup`."""
    return _environment().get_template(template).render(**values)


def stylesheet(name: str) -> Markup:
    """A style sheet of the package, to be put into a page: pages ask for no other file."""
    return Markup((PAGES_FOLDER / name).read_text(encoding="utf-8"))


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(PAGES_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
