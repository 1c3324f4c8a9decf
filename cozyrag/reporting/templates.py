"""Pages and texts from the templates of `assets/pages`. In HTML, Jinja2 escapes every value.

No other module writes a tag, because questions, passages and answers are untrusted text. Left out: the content of the
pages (demo_app.py, html_report.py, compare.py).
"""

from functools import cache

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from cozyrag.runtime.assets import PAGES_FOLDER
from cozyrag.runtime.terminal import one_line


def render(template: str, **values: object) -> str:
    """Fill in the template of that file name. In .html files, values are escaped unless they are `Markup`."""
    return _environment().get_template(template).render(**values)


def render_for_screen(template: str, **values: object) -> str:
    """`render` for the terminal: every value stays on its line, and its control characters are escaped."""
    return _environment().overlay(finalize=one_line).get_template(template).render(**values)


def stylesheet(name: str) -> Markup:
    """A style sheet of the package, for embedding into a page."""
    return Markup((PAGES_FOLDER / name).read_text(encoding="utf-8"))


@cache
def _environment() -> Environment:
    loader, escape = FileSystemLoader(PAGES_FOLDER), select_autoescape(["html"])
    return Environment(
        loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
