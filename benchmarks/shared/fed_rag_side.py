"""FedRAG's trainers for the speed benchmark: a program for another Python environment (foreign_sides.py starts it).

    pip install "fed-rag[huggingface]"      # in that environment, which needs nothing of this package
    PYTHON fed_rag_side.py JOB.json

The program loads the models of the job, prints a line of JSON, waits for a line on its standard input, trains, prints
what it reached, and saves the trained model in the folder of the job. Left out: federated training, the clock.
"""

import contextlib
import json
import os
import resource
import sys
from pathlib import Path

os.environ["FEDRAG_SKIP_VALIDATION"] = "1"  # the check of the model's class imports unsloth, which needs a GPU

import datasets
import torch
from fed_rag import RAGConfig, RAGSystem
from fed_rag.data_collators.huggingface.ralt import DataCollatorForRALT
from fed_rag.data_structures import KnowledgeNode
from fed_rag.generators import HFPretrainedModelGenerator
from fed_rag.knowledge_stores import InMemoryKnowledgeStore
from fed_rag.retrievers import HFSentenceTransformerRetriever
from fed_rag.trainers import HuggingFaceTrainerForLSR, HuggingFaceTrainerForRALT
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import PrinterCallback, TrainingArguments


def rag_system(job: dict) -> RAGSystem:
    """A retriever, its passages in memory, and a generator, all in float32."""
    float32 = dict(dtype=torch.float32, trust_remote_code=False)
    generator = HFPretrainedModelGenerator(job["generator"], load_model_kwargs=float32)
    retriever = HFSentenceTransformerRetriever(job["retriever"], load_model_kwargs={"device": job["device"]})
    retriever.encoder.max_seq_length = job["passage_tokens"]
    generator.model.to(job["device"])
    vectors = retriever.encode_context(job["passages"]).tolist()
    nodes = [
        KnowledgeNode(embedding=vector, node_type="text", text_content=text)
        for vector, text in zip(vectors, job["passages"], strict=True)
    ]
    return RAGSystem(
        generator=generator,
        retriever=retriever,
        knowledge_store=InMemoryKnowledgeStore.from_nodes(nodes),
        rag_config=RAGConfig(top_k=job["top_k"]),
    )


def ralt(job: dict, system: RAGSystem, asked: datasets.Dataset) -> HuggingFaceTrainerForRALT:
    """The trainer of the generator, with its own prompt or that of the job."""
    found = HuggingFaceTrainerForRALT(system, asked, TrainingArguments(**job["arguments"]))
    if job["template"]:
        found.hf_trainer_obj.data_collator = DataCollatorForRALT(system, example_template=job["template"])
    return found


def lsr(job: dict, system: RAGSystem, asked: datasets.Dataset) -> HuggingFaceTrainerForLSR:
    """The trainer of the retriever, which learns from the generator's likelihoods."""
    arguments = SentenceTransformerTrainingArguments(**job["arguments"], remove_unused_columns=False)
    return HuggingFaceTrainerForLSR(system, asked, arguments)


def memory() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Prepare, wait, train, report."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answering, before = os.fdopen(os.dup(1), "w"), memory()
    with contextlib.redirect_stdout(sys.stderr):  # the libraries print to standard output
        torch.set_num_threads(job["threads"])
        torch.manual_seed(job["seed"])
        asked = datasets.Dataset.from_dict({"query": job["questions"], "response": job["answers"]})
        trainer = {"ralt": ralt, "lsr": lsr}[job["trainer"]](job, rag_system(job), asked)
        trainer.hf_trainer_obj.remove_callback(PrinterCallback)
        print(json.dumps({"ready": True}), file=answering, flush=True)
        if not sys.stdin.readline():
            return  # the benchmark has ended
        loss = trainer.train().loss
    print(json.dumps({"loss": loss, "memory": memory() - before}), file=answering, flush=True)
    trainer.model.save_pretrained(job["output"])


if __name__ == "__main__":
    main()
