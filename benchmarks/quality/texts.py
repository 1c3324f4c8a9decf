"""Do answers match and are passages found in eight languages, and however a text was typed?

    python -m benchmarks.quality.texts

The first table has 30 made passages and questions for each language. The second has the test questions of the
quickstart set, whose passages are rewritten with curly quotes, decomposed accents, or dashes. The columns: the share of
the answers that stand in their gold passage, and recall of sparse (BM25) and hybrid search with the untuned retriever.
Left out: reading answers.
"""

import argparse
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset

import cozyrag
from benchmarks.shared.corpus import retriever_of
from cozyrag.data.matching import STEMMERS, contains_answer, matching_form
from cozyrag.data.passages import features, read_passages
from cozyrag.data.questions import read_questions
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.passage_index import PassageIndex, Passages

DEPTH = 5


@dataclass(frozen=True)
class Language:
    """Names, and templates of a passage and of three questions, whose answers are the river, the founder, the goods.

    A town's name is a beginning and an ending; rivers, founders and goods are shared by several towns.
    """

    beginnings: str
    endings: str
    rivers: str
    founders: str
    goods: str
    passage: str
    questions: tuple[str, str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """Text, question and answer of 30 towns."""
        towns = [first + last for last in self.endings.split() for first in self.beginnings.split()]
        lists = [each.split(",") for each in (self.rivers, self.founders, self.goods)]
        made = []
        for number, town in enumerate(towns):
            facts = [
                each[(number * step + number // 5) % 5].strip() for each, step in zip(lists, (1, 2, 3), strict=True)
            ]
            year = 1500 + 13 * number
            text = self.passage.format(town=town, river=facts[0], founder=facts[1], goods=facts[2], year=year)
            made.append((text, self.questions[number % 3].format(town=town), facts[number % 3]))
        return made


LANGUAGES = {
    "en": Language(
        "Vel Mor Tas Lin Gar", "ton ford wick bury mouth stead", "Tessa,Orlan,Mive,Luda,Harn",
        "Ada Corin,Jan Felder,Mira Holt,Otto Brand,Eva Lind", "salt,glass bells,woollen coats,clay pipes,oak barrels",
        "{town} is a small town on the river {river}. "
        "{founder} founded it in {year}. It’s known for “{goods}”.",
        ("Which river does {town} lie on?", "Who founded {town}?", "What is {town} known for?"),
    ),
    "de": Language(
        "Vel Mor Tas Lin Gar", "heim dorf berg bach au stett", "Tessa,Orla,Mive,Luda,Harne",
        "Ada Korin,Jan Felder,Mira Holt,Otto Brand,Eva Lind", "Salz,Glocken aus Glas,Wollmäntel,Tonpfeifen,Fässer",
        "{town} ist eine kleine Stadt an der {river}. "
        "Gegründet wurde sie {year} von {founder}. Bekannt ist sie für „{goods}“.",
        ("An welchem Fluss liegt {town}?", "Wer gründete {town}?", "Wofür ist {town} bekannt?"),
    ),
    "fr": Language(
        "Vel Mor Tas Lin Gar", "ville mont fort court lieu bourg", "Tesse,Orlane,Mive,Lude,Harne",
        "Ada Corin,Jean Feldier,Mira Hôte,Othon Brand,Ève Lind", "sel,cloches,manteaux,pipes,tonneaux",
        "{town} est une petite ville sur l’Eau-de-{river}. "
        "Fondée en {year} par {founder}, elle est connue pour ses « {goods} ».",
        ("Sur quelle rivière se trouve {town} ?", "Qui a fondé {town} ?", "Pour quoi {town} est-elle connue ?"),
    ),
    "ru": Language(
        "Вел Мор Тас Лин Гар", "ск град ово ино ец бург", "Тесса,Орлань,Мива,Луда,Харна",
        "Ада Корин,Ян Фельдер,Мира Хольт,Отто Бранд,Ева Линд", "соль,колокола,пальто,трубки,бочки",
        "{town} — небольшой город; река — {river}. "
        "Основатель города — {founder}, год основания — {year}. Главный товар: «{goods}».",
        ("На какой реке стоит город {town}?", "Кто основатель города {town}?", "Какой главный товар города {town}?"),
    ),
    "zh": Language(
        "维尔 莫尔 塔斯 林恩 加尔", "镇 城 堡 港 桥 山", "特萨河,奥兰河,米夫河,卢达河,哈恩河",
        "艾达·科林,扬·费尔德,米拉·霍尔特,奥托·布兰德,伊娃·林德", "食盐,玻璃钟,羊毛大衣,陶土烟斗,橡木桶",
        "{town}是一座小城，位于{river}畔。{founder}于{year}年建立了这座城。它以“{goods}”闻名。",
        ("{town}位于哪条河畔？", "谁建立了{town}？", "{town}以什么闻名？"),
    ),
    "ja": Language(
        "ヴェル モル タス リン ガル", "町 城 市 港 橋 村", "テッサ川,オルラン川,ミヴェ川,ルダ川,ハルン川",
        "エイダ・コリン,ヤン・フェルダー,ミラ・ホルト,オットー・ブラント,エヴァ・リンド",
        "塩,ガラスの鐘,毛織の外套,土のパイプ,樽",
        "{town}は{river}のほとりにある小さな町である。{year}年に{founder}が建てた。「{goods}」で知られている。",
        ("{town}はどの川のほとりにありますか。", "{town}を建てたのは誰ですか。", "{town}は何で知られていますか。"),
    ),
    "th": Language(
        "เวล มอร์ ทาส ลิน การ์", "บุรี นคร ธานี เมือง ทอง วัง", "เทสซา,ออร์ลัน,มีเว,ลูดา,ฮาร์น",
        "เอดา โคริน,ยาน เฟลเดอร์,มิรา โฮลท์,ออตโต บรันด์,อีวา ลินด์", "เกลือ,ระฆังแก้ว,เสื้อขนสัตว์,กล้องดิน,ถังไม้",
        ""
        "{town}เป็นเมืองเล็กริมแม่น้ำ{river} {founder}ก่อตั้งเมืองในปี{year} เมืองนี้มีชื่อเสียงเรื่อง{goods}",
        ("{town}อยู่ริมแม่น้ำอะไร", "ใครก่อตั้ง{town}", "{town}มีชื่อเสียงเรื่องอะไร"),
    ),
    "hi": Language(
        "वेल मोर तास लिन गार", "पुर नगर गढ़ गाँव बाद कोट", "टेसा,ओरलान,मीवे,लूडा,हार्न",
        "अदा कोरिन,जान फेल्डर,मीरा होल्ट,ओटो ब्रांड,ईवा लिंड", "नमक,काँच की घंटियाँ,ऊनी कोट,मिट्टी के पाइप,लकड़ी के पीपे",
        ""
        "{town} {river} नदी पर बसा एक छोटा नगर है। {founder} ने इसे {year} में बसाया था। यह {goods} के लिए प्रसिद्ध है।",
        ("{town} किस नदी पर बसा है?", "{town} को किसने बसाया था?", "{town} किसके लिए प्रसिद्ध है?"),
    ),
}  # fmt: skip


def _curly(text: str, title: str) -> str:
    return re.sub(r"\b'|'\b", "’", re.sub(r'"([^"]*)"', r"“\1”", text)).replace(title, f"“{title}”")


def _dashes(text: str, _: str) -> str:
    return text.replace("-", "‑").replace(", ", "—")


REWRITES: dict[str, Callable[[str, str], str]] = {
    "as it is": lambda text, _: text,
    "curly quotes": _curly,
    "NFD": lambda text, _: unicodedata.normalize("NFD", text),
    "dashes": _dashes,
}


def measured(
    passages: Sequence[tuple[str, str]], asked: Sequence[tuple[str, list[str], int]], retriever: Retriever, stemmer: str
) -> dict[str, float]:
    """Percent of the answers in their gold passage, and of the gold passages among the first of each search.

    Args:
        passages: titles and texts.
        asked: questions, their answers, and the row of the gold passage.
    """
    titles, texts = map(list, zip(*passages, strict=True))
    table = Dataset.from_dict({"id": list(map(str, range(len(texts)))), "title": titles, "text": texts}, features())
    found = [contains_answer(matching_form(texts[gold]), answers) for _, answers, gold in asked]
    read = Passages.of(table)
    vectors, sentences = retriever.encode_passages(read.to_read(), read.spans(range(len(texts))), batch_size=32)
    index = PassageIndex(table, vectors, fingerprint="", sentences=sentences)
    words = SentenceWords(titles, read.sentences(), stemmer=stemmer)
    scores = {"answers": 100 * sum(found) / len(found)}
    for mode, name in (("bm25", "sparse"), ("hybrid", "hybrid")):
        lexical = LexicalIndex(read.to_read(), stemmer=stemmer)
        encode = partial(retriever.encode, kind="query", batch_size=32)
        rows = (
            Searcher(index, lexical, encode=encode, mode=mode, words=words).search([q for q, _, _ in asked], DEPTH).rows
        )
        for k in (1, DEPTH):
            hits = [gold in row[:k] for (_, _, gold), row in zip(asked, rows.tolist(), strict=True)]
            scores[f"{name} recall@{k}"] = 100 * sum(hits) / len(hits)
    return scores


def languages(retriever: Retriever, stemmer: str) -> dict[str, dict[str, float]]:
    """The scores of each language."""
    table = {}
    for name, language in LANGUAGES.items():
        rows = language.rows()
        asked = [(question, [answer], gold) for gold, (_, question, answer) in enumerate(rows)]
        table[name] = measured([("", text) for text, _, _ in rows], asked, retriever, stemmer)
    return table


def rewrites(retriever: Retriever, stemmer: str) -> dict[str, dict[str, float]]:
    """The scores of the quickstart set as it is, and rewritten."""
    folder = Path(cozyrag.__file__).parent / "assets" / "quickstart"
    pool, _ = read_passages(str(folder / "passages.jsonl"))
    questions = read_questions(str(folder / "test.jsonl")).table
    row_of = {key: row for row, key in enumerate(pool["id"][:])}
    asked = [(row["question"], row["answers"], row_of[row["passage_id"]]) for row in questions]
    table = {}
    for name, rewrite in REWRITES.items():
        texts = [(row["title"], rewrite(row["text"], row["title"])) for row in pool]
        print(
            f"{name}: {sum(new != old for (_, new), old in zip(texts, pool['text'][:], strict=True))} passages differ"
        )
        table[name] = measured(texts, asked, retriever, stemmer)
    return table


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retriever", help="SentenceTransformer folder or Hub id (default: all-MiniLM-L6-v2)")
    parser.add_argument("--stemmer", default="english", choices=STEMMERS, help="stemmer of sparse search")
    options = parser.parse_args()
    retriever = retriever_of(options)
    for rows in (languages(retriever, options.stemmer), rewrites(retriever, options.stemmer)):
        columns = list(next(iter(rows.values())))
        print(f"\n| percent | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
        for name, scores in rows.items():
            print(f"| {name} | {' | '.join(f'{scores[column]:.1f}' for column in columns)} |")


if __name__ == "__main__":
    main()
