"""A pair as two tools of the Model Context Protocol, ask and search, over standard input and output.

Needs `pip install "cozyrag[serve]"`, so only `cozyrag serve --mcp` imports this module. Left out: MCP over HTTP.
"""

from typing import Annotated

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from cozyrag import __version__
from cozyrag.errors import InputError
from cozyrag.pipeline import CozyRAG
from cozyrag.serving.http_api import LONGEST, MOST_PASSAGES, answer_data, source_data
from cozyrag.serving.question_queue import QuestionQueue, QueueFull

Question = Annotated[str, Field(min_length=1, max_length=LONGEST)]
Passages = Annotated[int | None, Field(ge=1, le=MOST_PASSAGES, description="passages to find; default: as in training")]


def build_tools(pair: CozyRAG, *, name: str) -> MCPServer:
    """The server, ready to `run("stdio")`."""
    about = f"{name}: answers from {len(pair.index):,} passages, with the sentences that they come from."
    server, questions = MCPServer("cozyrag", instructions=about, version=__version__), QuestionQueue(pair)

    @server.tool()
    async def ask(question: Question, top_k: Passages = None) -> dict:
        """A short answer to a question from the passages, its certainty (score, 0 to 1), and its sources."""
        try:
            return answer_data(await questions.answer(question, top_k))
        except (InputError, QueueFull) as error:
            raise ToolError(str(error) or "Too many questions wait. Ask again in a moment.") from error

    @server.tool()
    async def search(question: Question, top_k: Passages = None) -> dict:
        """The passages that fit a question best, best first, without an answer."""
        try:
            return {"passages": [source_data(each) for each in await questions.search(question, top_k)]}
        except (InputError, QueueFull) as error:
            raise ToolError(str(error) or "Too many questions wait. Ask again in a moment.") from error

    return server
