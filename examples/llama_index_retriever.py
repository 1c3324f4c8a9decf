"""A pair as a retriever of LlamaIndex. Needs: pip install llama-index-core"""

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode


class CozyRetriever(BaseRetriever):
    def __init__(self, pair, top_k: int | None = None):
        self.pair, self.top_k = pair, top_k  # CozyRAG.from_pretrained("my-rag")
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self.pair.retrieve(query_bundle.query_str, self.top_k)
        nodes = [
            TextNode(id_=each.id, text=each.text, metadata={"title": each.title, **each.metadata}) for each in found
        ]
        return [NodeWithScore(node=node, score=each.score) for node, each in zip(nodes, found, strict=True)]
