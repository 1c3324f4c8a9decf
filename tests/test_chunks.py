"""Cutting articles into passages: sizes, boundaries, overlap, other scripts, and no lost text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.data.chunking import count_words, cut, join_sections, latin_length

CHINESE = "维也纳是奥地利的首都，也是该国最大的城市。多瑙河流经该市！它的历史有两千年。"
ARABIC = "فيينا هي عاصمة النمسا وأكبر مدنها. هل يمر نهر الدانوب بها؟ نعم يمر بها. "
HINDI = "वियना ऑस्ट्रिया की राजधानी है। डेन्यूब नदी यहाँ से बहती है। इसका इतिहास पुराना है। "
THAI = "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย แม่น้ำเจ้าพระยาไหลผ่านเมืองนี้ "


def sentence(words, name="word"):
    return " ".join(f"{name.title() if i == 0 else name}{i}" for i in range(words)) + "."


def squeezed(text):
    return "".join(text.split())


def test_passages_have_about_the_target_length_and_end_with_sentences():
    text = " ".join(sentence(n % 23 + 5) for n in range(200))
    passages = cut(text, words=100)
    sizes = [len(passage.split()) for passage in passages]
    assert all(80 <= size <= 120 for size in sizes[:-1]) and 35 <= sizes[-1] <= 135
    assert all(passage.endswith(".") for passage in passages)


def test_the_end_of_a_paragraph_is_preferred():
    text = f"{sentence(40, 'a')} {sentence(40, 'b')}\n{sentence(30, 'c')} {sentence(70, 'd')}"
    first, second = cut(text, words=100)
    assert first.endswith("b39.") and second.startswith("C0")


def test_a_short_end_joins_the_passage_before():
    assert len(cut(f"{sentence(95)} {sentence(20)}", words=100)) == 1
    assert len(cut(f"{sentence(95)} {sentence(60)}", words=100)) == 2


def test_a_heading_goes_with_what_follows():
    text = f"{sentence(60, 'a')}\nThe Heading\n{sentence(80, 'b')}"
    assert [passage.split("\n")[0][:11] for passage in cut(text, words=80)] == ["A0 a1 a2 a3", "The Heading"]


def test_overlap_repeats_sentences_but_at_most_half_a_passage():
    text = " ".join(sentence(25, name) for name in "abcdefgh")
    plain, overlapping = cut(text, words=100), cut(text, words=100, overlap=1)
    assert [each.split()[0] for each in plain] == ["A0", "E0"]
    assert [each.split()[0] for each in overlapping] == ["A0", "D0"]
    long = " ".join(sentence(90, name) for name in "abc")
    assert cut(long, words=100, overlap=1) == cut(long, words=100)


def test_a_change_moves_only_the_cuts_of_its_own_paragraph():
    paragraphs = [" ".join(sentence(20, f"{name}{i}") for i in range(5)) for name in "abcdef"]
    before = cut("\n".join(paragraphs), words=100)
    paragraphs[2] = paragraphs[2].replace("C10", "Changed")
    after = cut("\n".join(paragraphs), words=100)
    assert len(set(before) - set(after)) == 1 and len(before) == 6


@pytest.mark.parametrize(("text", "stops"), [(CHINESE, "。！"), (ARABIC, ".؟"), (HINDI, "।")])
def test_sentences_of_other_scripts_end_passages(text, stops):
    passages = cut(text * 30, words=100)
    assert len(passages) > 3
    assert all(passage[-1] in stops for passage in passages)
    assert all(70 <= count_words(passage) <= 150 for passage in passages[:-1])
    assert squeezed("".join(passages)) == squeezed(text * 30)


def test_thai_is_cut_at_spaces_and_never_before_a_vowel_sign():
    passages = cut(THAI * 40, words=100)
    assert len(passages) > 3 and all(passage.split()[-1] in THAI.split() for passage in passages)
    unbroken = cut("ที่" * 2000, words=100)
    assert len(unbroken) > 5 and all(passage.startswith("ท") for passage in unbroken)


def test_a_number_is_not_a_clause():
    text = "Long " + " ".join(f"1,000,{i:03}" for i in range(400))
    assert all(word in text.split() for passage in cut(text, words=100) for word in passage.split())


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("one two", 2), ("维也纳是奥地利的首都", 6.25), ("我住在 Wien 市", 3.5), ("Größe naïve", 2)],
)
def test_words_are_counted_by_script(text, words):
    assert count_words(text) == pytest.approx(words)


def test_characters_of_scripts_without_spaces_weigh_more():
    assert latin_length("short note") == 10 and latin_length("café") == 4
    assert latin_length("村里的水泵") == pytest.approx(5 * 6 / 1.6) and latin_length("ปลา") == pytest.approx(3 * 1.5)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("aB .!?\n。，維ที่ا؟\u0301-'\")1"), max_size=400), st.integers(3, 40))
def test_no_text_is_lost_or_repeated(text, words):
    assert squeezed("".join(cut(text, words=words))) == squeezed(text)


# ---- sections


def test_short_sections_join_and_their_headings_stay_with_them():
    sections = [(("A",), "one two"), (("B",), "three"), (("C",), "word " * 30)]
    joined = join_sections(sections, least=10, most=20)
    assert joined == [((), "A\none two\nB\nthree"), (("C",), "word " * 30)]


def test_common_headings_stay_the_path():
    sections = [(("Care", "Water"), "Weekly."), (("Care", "Light"), "Much of it.")]
    assert join_sections(sections, least=10, most=20) == [(("Care",), "Water\nWeekly.\nLight\nMuch of it.")]


def test_a_heading_above_other_headings_needs_no_text():
    sections = [(("Care",), ""), (("Care", "Water"), "word " * 30), (("Empty",), "")]
    assert join_sections(sections, least=10, most=50) == [((), f"Care\nWater\n{'word ' * 30}\nEmpty")]
    assert join_sections(sections[:2], least=10, most=50) == [(("Care", "Water"), "word " * 30)]
    assert join_sections([((), "  ")], least=10, most=50) == []
