"""Words of eight scripts, and answers found in texts whatever quote marks, dashes or accents were typed."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.data.matching import comparable, contains_answer, fold, matching_form, search_words, words
from cozyrag.evaluation.metrics import normalize_answer

ANSWERS = [  # text, answer, whether the text contains it
    ("She was born in the 1815s.", "1815", False),
    ("She was born in 1815.", "1815", True),
    ("Ada, Countess of Lovelace", "the countess of Lovelace", True),
    ("Ada", "ada", True),
    ("Ada Lovelace", "Lovelace Ada", False),
    ("anything", "", False),
    ("anything", "the", False),
    ("anything", "?", False),
    # quote marks
    ("The ferry is called “Vienna” and sails.", "Vienna", True),
    ("Anna’s café in Graz", "Anna's", True),
    ("Anna's café in Graz", "Anna’s café", True),
    ("Anna's café in Graz", "Anna", True),
    ("Die Fähre heißt „Wien“.", "Wien", True),
    ("Le bac s’appelle « Vienne ».", '"Vienne"', True),
    ("the Hawaiʻi ferry", "Hawai'i", True),
    ("the Hawaiʻi ferry", "Hawaii", True),
    ("rock ‘n’ roll", "rock 'n' roll", True),
    # dashes
    ("The harbour—the oldest one—was dug in 1812…", "1812", True),
    ("The harbour—the oldest one—was dug in 1812…", "the oldest one", True),
    ("from 1914–1918", "1914-1918", True),
    ("from 1914–1918", "1914", True),
    ("a twenty‑five year loan", "twenty-five", True),
    ("minus −5 degrees", "-5", True),
    ("co-operation of two", "cooperation", True),
    ("cooperation of two", "co-operation", True),
    ("co-operation of two", "co operation", True),
    # numbers
    ("It costs 1,250.50 crowns.", "1250.50", True),
    ("It costs 3,500 crowns.", "500", False),
    ("It is 3.5 metres high.", "5", False),
    ("It is 3.5 metres high.", "3.5 metres", True),
    ("full width １９７４", "1974", True),
    # marks without width, compositions, ligatures
    ("the co\u00adop\u00aderation", "cooperation", True),
    ("zero\u200bwidth", "zerowidth", True),
    ("\u200eleft to right", "left", True),
    (unicodedata.normalize("NFD", "Zürich is a town"), "Zürich", True),
    ("Zürich is a town", unicodedata.normalize("NFD", "Zürich"), True),
    ("the ﬁrst oﬃce", "first office", True),
    ("Windows™ is old", "Windows", True),
    ("Straße", "STRASSE", True),
    ("résumé", "resume", False),
    ("U.S. troops", "US", True),
    ("the US troops", "U.S.", True),
    # scripts
    ("维也纳是奥地利的首都，多瑙河流经这座城市。", "多瑙河", True),
    ("维也纳是奥地利的首都，多瑙河流经这座城市。", "多瑙城", False),
    ("建于1974年。", "1974", True),
    ("建于1974年。", "1974年", True),
    ("ウィーンはオーストリアの首都である。", "ウィーン", True),
    ("ｳｨｰﾝは首都である。", "ウィーン", True),
    ("เวียนนาเป็นเมืองหลวงของประเทศออสเตรีย", "เวียนนา", True),
    ("เวียนนาเป็นเมืองหลวงของประเทศออสเตรีย", "เวียน", True),
    ("น้ำใส", "น้ำ", True),
    ("दिल्ली भारत की राजधानी है।", "दिल्ली", True),
    ("दिल्ली भारत की राजधानी है।", "दिल", False),
    ("فيينا عاصمة النمسا، وتقع على نهر الدانوب.", "النمسا", True),
    ("فيـــينا عاصمة", "فيينا", True),
    ("Вена — столица Австрии.", "вена", True),
    ("서울은 대한민국의 수도이다.", "서울", True),
    ("Η Βιέννη είναι πρωτεύουσα", "βιέννη", True),
]


@pytest.mark.parametrize(("text", "answer", "found"), ANSWERS, ids=range(len(ANSWERS)))
def test_answers_in_texts(text, answer, found):
    assert contains_answer(matching_form(text), [answer]) is found
    assert contains_answer(matching_form(text), ["nowhere at all", answer]) is found


def test_without_answers_nothing_is_found():
    assert not contains_answer(matching_form("anything"), [])


@settings(deadline=None, derandomize=True)
@given(st.text(alphabet="ab A.,'-1 25the", max_size=30), st.text(alphabet="ab A.,'-1 25the", max_size=8))
def test_what_squad_finds_is_found(text, answer):
    wanted = normalize_answer(answer)
    if wanted and f" {wanted} " in f" {normalize_answer(text)} ":
        assert contains_answer(matching_form(text), [answer])


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_folding_twice_changes_nothing_and_compositions_are_equal(text):
    assert fold(fold(text)) == fold(text)
    assert fold(unicodedata.normalize("NFD", text)) == fold(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Vitamin C, World War I", ["vitamin", "c", "world", "war", "i"]),
        ("foo_bar's 1,250.5", ["foo", "bar", "s", "1250.5"]),
        ("दिल्ली में", ["दिल्ली", "में"]),
        ("Wien 维也纳!", ["wien", "维", "也", "纳"]),
        ("ป็น", ["ป็", "น"]),
        ("🙂 ❤️", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_search_words_add_pairs_where_words_are_single_characters():
    assert search_words("Wien 维也纳") == ["wien", "维", "也", "纳", "维也", "也纳"]
    assert search_words("दिल्ली में") == ["दिल्ली", "में"]
    assert search_words("plain naïve") == ["plain", "naïve"]


def test_comparable_texts_differ_in_typing_alone():
    assert comparable("The “old” U.S.—harbour") == comparable('the "old" US--harbour')
    assert comparable("two") != comparable("too")
