"""Tiny models built from configs, and a tiny corpus: real architectures, nothing downloaded, milliseconds a step."""

import json
import re
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizerFast, GPT2Config, LlamaConfig, LlamaForCausalLM

from cozyrag.models.generator import Generator
from cozyrag.models.reranker import Reranker

PATIENCE = 600  # seconds that a test waits for what should come; no load of the machine may decide a test
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink", "grey", "orange")
THINGS = (
    "fox",
    "river",
    "tower",
    "violin",
    "planet",
    "cheese",
    "engine",
    "bridge",
    "falcon",
    "garden",
    "castle",
    "lamp",
)


def corpus(size: int = 40) -> tuple[list[dict], list[dict]]:
    """(passages, questions): passage i tells the colour, age and home of one thing; two questions for each passage."""
    passages, questions = [], []
    for i in range(size):
        thing, colour = THINGS[i % len(THINGS)], COLOURS[(i * 7) % len(COLOURS)]
        name, year = f"{thing} {i}", 1500 + 11 * i
        keepers = f"People of village {i * 3} keep the {name} in a house of stone."
        text = f"The {name} is {colour}. It was made in {year}. {keepers}"
        passages.append({"id": f"p{i}", "title": name.title(), "text": text})
        questions.append(
            {"id": f"q{i}a", "question": f"What colour is the {name}?", "answers": [colour], "passage_id": f"p{i}"}
        )
        questions.append(
            {
                "id": f"q{i}b",
                "question": f"In which year was the {name} made?",
                "answers": [str(year)],
                "passage_id": f"p{i}",
            }
        )
    return passages, questions


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_generator(folder: Path, *, seed: int = 0) -> Path:
    """A GPT-2 of some 30 thousand parameters, saved as a checkpoint."""
    torch.manual_seed(seed)
    texts = [passage["text"] for passage in corpus()[0]] + [question["question"] for question in corpus()[1]]
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=160)
    Generator.from_scratch(texts, config=config, vocab_size=400).save(folder)
    return folder


def make_llama(folder: Path, *, seed: int = 0) -> Path:
    """The same with the architecture of SmolLM2."""
    generator = Generator.load(str(make_generator(folder, seed=seed)))
    ends = {"bos_token_id": generator.end, "eos_token_id": generator.end, "pad_token_id": generator.end}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 160}
    torch.manual_seed(seed)
    generator.model = LlamaForCausalLM(LlamaConfig(vocab_size=len(generator.tokenizer), **size, **heads, **ends))
    generator.save(folder)
    return folder


def wordpieces() -> dict[str, int]:
    """The words of the corpus and single characters; a trained vocabulary would differ from run to run."""
    text = " ".join([each["text"] for each in corpus()[0]] + [each["question"] for each in corpus()[1]]).lower()
    special, words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], sorted(set(re.findall(r"[a-z]+|\d+|[.?]", text)))
    letters = sorted(set("".join(words)))
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    return {piece: number for number, piece in enumerate(pieces)}


def make_retriever(folder: Path, *, seed: int = 0) -> Path:
    """A BERT of one layer with mean pooling, as a SentenceTransformer; it has the pooler that gets no gradient."""
    torch.manual_seed(seed)
    bert = folder.with_name(folder.name + "-bert")
    tokenizer = Tokenizer(models.WordPiece(wordpieces(), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(bert)
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), **size)).save_pretrained(bert)
    transformer = Transformer(str(bert), max_seq_length=64)
    SentenceTransformer(modules=[transformer, Pooling(32), Normalize()], device="cpu").save_pretrained(
        str(folder), create_model_card=False
    )
    return folder


def make_reranker(folder: Path, retriever: Path) -> Path:
    """A CrossEncoder with the encoder of the tiny retriever and a head of zeros."""
    Reranker.load(str(retriever)).save(folder)
    return folder
