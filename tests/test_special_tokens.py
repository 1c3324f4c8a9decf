"""Special tokens of a generator's tokenizer: BOS at the start of every prompt, an end token, embeddings for all.

What a prompt must begin with is what the tokenizer itself begins a text with: `tokenizer(text).input_ids`.
"""

import json
import warnings

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
)

from cozyrag import CozyRAG
from cozyrag.errors import InputError
from cozyrag.models.batching import collate
from cozyrag.models.generator import Decoding, Generator
from cozyrag.models.prompts import PLAIN, encode_examples, encode_prompts
from cozyrag.models.token_losses import TokenLosses
from cozyrag.pair_file import describe_pair, starts_text

ASKED = {"questions": ["Who?", "Why is <s> there?"], "contexts": ["Ada wrote <s>it</s>.", ""], "context_tokens": 40}
BUDGET = {"context_tokens": 40, "max_new_tokens": 5}
ROLES = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATE = "{{%s}}{%% for m in messages %%}[{{ m.role }}]{{ m.content }}</s>{%% endfor %%}[assistant]"


def tokenizer_with(start="", end="", *, template=None, roles=ROLES, extra=()):
    """One token per byte, and <s>, <x>, </s>; it puts `start` before and `end` after a text by itself."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate(["<s>", "<x>", "</s>", *letters])}
    made = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    made.add_special_tokens(["<s>", "<x>", "</s>"])
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if start or end:
        used = [(token, tokens[token]) for token in ("<s>", "<x>", "</s>") if token in f"{start} {end}"]
        made.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}".strip(), special_tokens=used)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **roles)
    if extra:
        tokenizer.add_tokens(list(extra), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def gpt2(size=259, *, positions=256, end=2):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=positions, vocab_size=size, eos_token_id=end)
    )


def saved(folder, tokenizer, model=None):
    (model or gpt2()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---- the start of a prompt

STARTS = {
    "none, as GPT-2": tokenizer_with(),
    "BOS, as Llama": tokenizer_with("<s>"),
    "BOS and EOS": tokenizer_with("<s>", "</s>"),
    "EOS after the text only": tokenizer_with("", "</s>"),
    "EOS as BOS, as OPT": tokenizer_with("</s>", roles={"bos_token": "</s>", "eos_token": "</s>"}),
    "two tokens": tokenizer_with("<x> <s>"),
    "another token than BOS": tokenizer_with("<x>"),
    "BOS known but not added": tokenizer_with(roles=ROLES),
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(kind):
    tokenizer = STARTS[kind]
    generator = Generator(gpt2(), tokenizer)
    (whole, bare) = (tokenizer("some text", add_special_tokens=own)["input_ids"] for own in (True, False))
    start = whole[: whole.index(bare[0])]
    prompt = tokenizer("ab\nQuestion: Who?\nAnswer:")["input_ids"]
    given = {"questions": ["Who?"], "contexts": ["ab"], "context_tokens": 9, "max_length": 99}
    (example,) = encode_examples(tokenizer, answers=["Ada"], layout=generator.layout, **given)
    (asked,) = encode_prompts(tokenizer, reserve=4, layout=generator.layout, **given)
    assert asked == example.input_ids[: example.prompt_length] == prompt[: len(start) + 25]
    assert example.input_ids[example.prompt_length :] == [*bare_ids(tokenizer, " Ada"), tokenizer.eos_token_id]
    assert (generator.layout is PLAIN) == (not start)


def bare_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("written", ["bos_token", "''"])
@pytest.mark.parametrize("start", ["", "<s>", "<x> <s>"])
def test_a_chat_prompt_has_bos_once(start, written):
    """A template writes BOS or does not; the tokenizer adds it or does not."""
    written = "'<x><s>'" if start == "<x> <s>" and written == "bos_token" else written
    tokenizer = tokenizer_with(start, template=TEMPLATE % written)
    generator = Generator(gpt2(), tokenizer)
    (prompt,) = encode_prompts(tokenizer, max_length=200, reserve=0, layout=generator.layout, **first(ASKED))
    expected = max(start.split().count("<s>"), written != "''")
    assert prompt.count(0) == expected and prompt[: len(start.split())] == tokenizer("")["input_ids"]


def first(asked):
    return {name: value[:1] if isinstance(value, list) else value for name, value in asked.items()}


def test_answers_likelihoods_and_losses_read_bos(tmp_path):
    generator = Generator.load(saved(tmp_path, tokenizer_with("<s>")))
    seen, forward = [], generator.model.transformer.forward

    def spy(input_ids, **how):
        seen.append(input_ids)
        return forward(input_ids=input_ids, **how)

    generator.model.transformer.forward = spy
    generator.write(ASKED["questions"], ASKED["contexts"], **BUDGET)
    asked, seen[:] = [ids for ids in seen if ids.shape[1] > 20][-1:], []
    assert [(row == 0).sum().item() for row in asked[0]] == [1, 1]
    generator.log_likelihoods(ASKED["questions"], ASKED["contexts"], ["a", "b"], context_tokens=40)
    examples = encode_examples(generator.tokenizer, answers=["a", "b"], max_length=99, layout=generator.layout, **ASKED)
    TokenLosses(generator.model)(**collate(examples, pad_id=2))
    assert len(seen) == 2 and all((ids[:, 0] == 0).all() and (ids == 0).sum() == 2 for ids in seen)


def test_the_text_of_a_prompt_begins_with_bos_for_the_card():
    prompt = Generator(gpt2(), tokenizer_with("<s>")).prompt("Some <s> context.", "Who?")
    assert prompt == "<s>Some <s> context.\nQuestion: Who?\nAnswer:"


def test_extractive_answers_find_the_context_behind_bos(tmp_path):
    generator = Generator.load(saved(tmp_path, tokenizer_with("<s>")))
    answers = generator.answer(["Who?"], ["Ada wrote it."], extractive=True, min_new_tokens=1, **BUDGET)
    assert answers[0] and answers[0] in "Ada wrote it."


# ---- pairs and checkpoints of earlier versions


def make_pair(folder, retriever_path, tokenizer):
    from datasets import Dataset

    from cozyrag.models.retriever import Retriever
    from cozyrag.retrieval.passage_index import PassageIndex, Passages

    generator, retriever = Generator(gpt2(), tokenizer), Retriever.load(str(retriever_path))
    generator.save(folder / "generator")
    retriever.save(folder / "retriever")
    table = Dataset.from_list(tiny.corpus(6)[0])
    vectors = retriever.encode(Passages.of(table).to_read(), kind="document", batch_size=8)
    PassageIndex(table, vectors, fingerprint=retriever.fingerprint()).save(folder / "index")
    how = {"mode": "dense", "weights": {"vectors": 1.0}, "stemmer": "none"}
    facts = describe_pair(
        fingerprint=retriever.fingerprint(), retrieval=how, prompt=generator.prompt_facts, top_k=2,
        **vars(Decoding(40, 5)),
    )  # fmt: skip
    (folder / "cozyrag.json").write_text(json.dumps(facts))
    return facts


def test_a_pair_says_that_its_prompts_have_bos_and_one_of_an_earlier_version_has_none(tmp_path, retriever_path):
    facts = make_pair(tmp_path, retriever_path, tokenizer_with("<s>"))
    assert facts["format_version"] == 3 and facts["prompt"]["start_of_text"] == ["<s>"]
    assert CozyRAG.from_pretrained(tmp_path).generator.layout.head == (0,)
    facts["format_version"] = 2
    del facts["prompt"]["start_of_text"]
    (tmp_path / "cozyrag.json").write_text(json.dumps(facts))
    old = CozyRAG.from_pretrained(tmp_path)
    assert old.generator.layout is PLAIN and old.answer("What colour is the fox 0?").passages


def test_a_pair_without_bos_is_described_as_before():
    generator = Generator(gpt2(), tokenizer_with())
    assert generator.prompt_facts == {"question_cue": "\nQuestion: ", "answer_cue": "\nAnswer:"}
    assert describe_pair(fingerprint="0", retrieval={}, prompt=generator.prompt_facts)["format_version"] == 2


def test_a_run_resumes_with_the_prompts_that_it_began_with(tmp_path, retriever_path):
    """As a checkpoint says: one of an earlier version says nothing and has no BOS."""
    from accelerate import Accelerator

    from cozyrag.models.retriever import Retriever
    from cozyrag.training.checkpointing import Checkpoints, Progress, load_generator

    facts = {"data": "0", "processes": 1}
    checkpoints = Checkpoints(Accelerator(cpu=True), tmp_path, limit=2, facts=facts)
    generator = Generator(gpt2(), tokenizer_with("<s>"))
    checkpoints.save(Progress(), generator, Retriever.load(str(retriever_path)))
    newest, _ = checkpoints.newest()
    assert checkpoints.read(newest, allow_changes=False) == Progress()
    assert load_generator(newest, dropout=0.0).layout == generator.layout
    saved = json.loads((newest / "progress.json").read_text())
    del saved["prompt"]
    (newest / "progress.json").write_text(json.dumps(saved))
    assert checkpoints.read(newest, allow_changes=False) == Progress()
    assert load_generator(newest, dropout=0.0).layout is PLAIN


@pytest.mark.parametrize("facts", [{}, {"prompt": {}}, {"prompt": {"answer_cue": "\nAnswer:"}}])
def test_files_of_earlier_versions_mean_no_bos(facts):
    assert not starts_text(facts)


# ---- tokens that a model does not have


@pytest.mark.parametrize(
    ("tokenizer", "size", "words"),
    [
        (tokenizer_with(roles={}), 259, ["end-of-sequence", "'</s>'", "no answer would ever end", "--generator"]),
        (tokenizer_with("<s>", roles={"bos_token": "<s>"}), 259, ["end-of-sequence"]),
        (tokenizer_with(), 200, ["200 embeddings", "with id 200", "(and 58 more)", "resize_token_embeddings"]),
        (tokenizer_with(), 258, ["258 embeddings", "with id 258"]),
        (tokenizer_with(roles={"eos_token": "<end>"}), 259, ["259 embeddings", "'<end>' with id 259"]),
        (tokenizer_with(roles=ROLES | {"unk_token": "<unk>"}), 259, ["'<unk>' with id 259"]),
        (tokenizer_with(template="<y>" + TEMPLATE % "''", extra=["<y>"]), 259, ["'<y>' with id 259"]),
    ],
    ids=["no special tokens", "no eos", "smaller model", "one token", "eos", "unk", "template"],
)
def test_a_tokenizer_that_does_not_fit_is_refused_when_it_is_loaded(tmp_path, tokenizer, size, words):
    with pytest.raises(InputError) as error:
        Generator.load(saved(tmp_path, tokenizer, gpt2(size)))
    assert [word for word in [str(tmp_path), *words] if word not in str(error.value)] == []


def with_pad():
    return tokenizer_with(roles=ROLES | {"pad_token": "[PAD]"})


def test_eos_pads_where_the_pad_token_has_no_embedding(tmp_path):
    """Also after saving, and where a text spells out the token."""
    folder = saved(tmp_path / "made", with_pad())
    for place in (folder, str(tmp_path / "again")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            generator = Generator.load(place)
        assert generator.tokenizer.pad_token_id == generator.model.generation_config.pad_token_id == 2
        alone = [generator.write([q], ["a [PAD] c"], **BUDGET)[0].text for q in ("[PAD]?", "What is it?")]
        both = generator.write(["[PAD]?", "What is it?"], ["a [PAD] c"] * 2, **BUDGET)
        assert [each.text for each in both] == alone
        generator.save(tmp_path / "again")


def test_a_pad_token_with_an_embedding_is_kept(tmp_path):
    generator = Generator.load(saved(tmp_path, with_pad(), gpt2(260)))
    assert generator.tokenizer.pad_token_id == 259 and generator.layout is PLAIN


def test_a_special_token_that_no_prompt_needs_is_read_as_characters_with_a_warning(tmp_path):
    """Such as Gemma's placeholder for images, which has the first id after the embeddings."""
    folder = saved(tmp_path, tokenizer_with("<s>", extra=["<image>"]))
    with pytest.warns(UserWarning, match="no embedding for '<image>'.*ordinary characters"):
        generator = Generator.load(folder)
    (prompt,) = encode_prompts(
        generator.tokenizer, questions=["<image>?"], contexts=["<image>"], context_tokens=9, max_length=99, reserve=0,
        layout=generator.layout,
    )  # fmt: skip
    assert max(prompt) < 259 and prompt[0] == 0
    assert generator.write(["<image>?"], ["<image>"], **BUDGET)


@pytest.mark.parametrize("spare", [1, 5, 61])
def test_more_embeddings_than_tokens_are_usual(tmp_path, spare):
    """A model may then predict an id without a token, which is no text."""
    model = gpt2(259 + spare)
    with torch.no_grad():
        model.lm_head.weight[259:] *= 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator = Generator.load(saved(tmp_path, tokenizer_with(), model))
    assert len(generator.write(ASKED["questions"], ASKED["contexts"], **BUDGET)) == 2


def test_a_slow_tokenizer_works_but_for_extractive_answers(tmp_path):
    generator = Generator.load(saved(tmp_path, ByT5Tokenizer(), gpt2(384, end=1)))
    assert not generator.tokenizer.is_fast
    assert len(generator.write(ASKED["questions"], ASKED["contexts"], **BUDGET)) == 2
    with pytest.raises(InputError, match="fast tokenizer"):
        generator.write(["Who?"], ["Ada."], extractive=True, **BUDGET)


@pytest.mark.parametrize(
    ("positions", "context", "answer", "words"),
    [
        (100, 128, 24, ["--context_tokens 128", "generator's 100 tokens", "Give --context_tokens 36 or less"]),
        (151, 128, 24, ["Give --context_tokens 87 or less"]),
        (152, 128, 24, []),
        (60, 128, 24, ["Lower --answer_tokens"]),
        (256, 128, 24, []),
        (256, 300, 24, ["Give --context_tokens 192 or less"]),
    ],
)
def test_contexts_must_fit_into_the_positions_of_the_model(positions, context, answer, words):
    generator = Generator(gpt2(positions=positions), tokenizer_with())
    if not words:
        return generator.check_room(context, answer)
    with pytest.raises(InputError) as error:
        generator.check_room(context, answer)
    assert [word for word in words if word not in str(error.value)] == []


# ---- models that read the padding


def rwkv():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 256}
    model = RwkvForCausalLM(RwkvConfig(vocab_size=259, bos_token_id=0, eos_token_id=2, **size))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model


def llama():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, initializer_range=0.4, **size))


@pytest.mark.parametrize(("make", "masks"), [(gpt2, True), (llama, True), (rwkv, False)])
@pytest.mark.parametrize("size", [2, 6])
def test_answers_do_not_depend_on_their_batch(tmp_path, make, masks, size):
    generator = Generator.load(saved(tmp_path, tokenizer_with("<s>"), make()))
    questions = ["Who?", "Why?", "What is this?", "Where?", "Is it so?", "So it is?"]
    contexts = ["Ada.", "ab", "", "c", "Some longer context, which pads the others.", "d"]
    alone = [generator.write([q], [c], **BUDGET)[0] for q, c in zip(questions, contexts, strict=True)]
    written = generator.write(questions, contexts, batch_size=size, **BUDGET)
    assert [each.text for each in written] == [each.text for each in alone]
    assert [each.score for each in written] == pytest.approx([each.score for each in alone], rel=1e-4)
    assert generator.reads_past_padding is masks
    likelihoods = [
        generator.log_likelihoods(questions, contexts, ["a"] * 6, context_tokens=40, batch_size=n) for n in (1, size)
    ]
    assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)
