"""A hook of MkDocs: links of docs/ to files beside it lead to the repository, since the site holds docs/ alone.

Left out: links within docs/, which MkDocs follows and checks.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown, page, config, files):
    """The text of a page with absolute links to the repository. Raises FileNotFoundError for a file that is missing."""

    def absolute(found):
        if not (ROOT / found[1]).exists():
            raise FileNotFoundError(f"docs/{page.file.src_uri}: ../{found[1]} does not exist")
        return f"]({config['repo_url']}/blob/main/{found[1]}{found[2] or ''})"

    return LINK.sub(absolute, markdown)
