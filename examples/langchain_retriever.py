"""A pair as a retriever of LangChain. Needs: pip install langchain-core"""

from typing import Any

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever


class CozyRetriever(BaseRetriever):
    pair: Any  # CozyRAG.from_pretrained("my-rag")
    top_k: int | None = None

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [
            Document(each.text, id=each.id, metadata={"title": each.title, "score": each.score, **each.metadata})
            for each in self.pair.retrieve(query, self.top_k)
        ]
