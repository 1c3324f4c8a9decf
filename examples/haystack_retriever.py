"""A pair as a retriever of Haystack. Needs: pip install haystack-ai"""

from haystack import Document, component


@component
class CozyRetriever:
    def __init__(self, pair, top_k: int | None = None):
        self.pair, self.top_k = pair, top_k  # CozyRAG.from_pretrained("my-rag")

    @component.output_types(documents=list[Document])
    def run(self, query: str) -> dict[str, list[Document]]:
        found = self.pair.retrieve(query, self.top_k)
        meta = [{"title": each.title, **each.metadata} for each in found]
        return {
            "documents": [
                Document(id=each.id, content=each.text, score=each.score, meta=own)
                for each, own in zip(found, meta, strict=True)
            ]
        }
