"""Which detector finds the encoding of short texts? Compares charset-normalizer and chardet.

    python -m benchmarks.quality.encodings

Sentences of 16 languages are written in the encodings that their readers use, as texts of 1 to 50 lines in drawn order.
A text counts as read if decoding it in the found encoding gives the original, whatever the name of the encoding. Left
out: UTF-8 and UTF-16, which need no detector.
"""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

LINES = (1, 5, 10, 20, 50)


@dataclass(frozen=True)
class Language:
    """Encodings in use for a language, and sentences in it."""

    name: str
    encodings: tuple[str, ...]
    sentences: str


LANGUAGES = (
    Language(
        "English",
        ("cp1252",),
        """The pump isn’t old – it was built in 1974 by the smith’s son.
She said “the well is deep enough” and went home.
A ticket costs 5 € for adults and 2 € for children.
The café opens at nine…
The ferry leaves every two hours in summer.
Nobody knows why the barrel’s lid is blue.
The “new” bridge was closed — again — in March.
The museum’s oldest clock was made in 1812.""",
    ),
    Language(
        "German",
        ("cp1252",),
        """Die Pumpe hinter dem Haus fördert Wasser aus dem Brunnen.
Im Frühjahr müssen die Fässer gereinigt und geprüft werden.
Der Schlüssel hängt an der Tür zum Gästezimmer.
Größere Mengen kosten weniger, sagte der Händler.
Das Museum öffnet täglich um neun Uhr.
Die Straße zum Bahnhof ist für Lastwagen gesperrt.
„Übermorgen kommt der Tierarzt“, schrieb die Köchin.
Der Käse reift drei Wochen im kühlen Keller.""",
    ),
    Language(
        "French",
        ("cp1252",),
        """La pompe derrière la maison tire l’eau du puits.
Le musée a été fondé en 1974 par le maître d’école.
Les élèves préfèrent la forêt à la bibliothèque.
Où est passée la clé de la chambre d’hôte ?
Le garçon a reçu un gâteau à la crème.
L’hiver dernier, la rivière était gelée.
Voilà une œuvre très connue de l’époque.
Ça ne coûte que trois € par mois.""",
    ),
    Language(
        "Spanish",
        ("cp1252",),
        """La bomba está detrás de la casa del señor Muñoz.
¿Cuántos años tiene el molino más antiguo?
El niño compró pan y jamón en el almacén.
Mañana abrirá la exposición sobre la sal.
El camión no pasó por el puente pequeño.
La montaña está cubierta de nieve todo el año.
¡Qué fácil es llegar a la estación!
El médico vendrá el miércoles a las diez.""",
    ),
    Language(
        "Polish",
        ("cp1250", "iso8859-2"),
        """Pompa za domem czerpie wodę ze studni.
Zażółć gęślą jaźń, powiedział nauczyciel.
Muzeum otwarto w tysiąc dziewięćset siódmym roku.
Gdzie leży klucz do pokoju gościnnego?
Chłopiec dostał ciasto ze śmietaną i miód.
W zeszłą zimę rzeka była całkiem zamarznięta.
Święto zaczyna się w sobotę o dziesiątej.
Most został zamknięty z powodu remontu.""",
    ),
    Language(
        "Czech",
        ("cp1250", "iso8859-2"),
        """Čerpadlo za domem čerpá vodu ze studny.
Příliš žluťoučký kůň úpěl ďábelské ódy.
Muzeum bylo otevřeno v květnu po dlouhé opravě.
Kde leží klíč od pokoje pro hosty?
Chlapec dostal koláč se šlehačkou a medem.
Loni v zimě byla řeka úplně zamrzlá.
Nejstarší hodiny pocházejí ze sedmnáctého století.
Vlak do města odjíždí každé dvě hodiny.""",
    ),
    Language(
        "Hungarian",
        ("cp1250", "iso8859-2"),
        """A ház mögötti szivattyú vizet húz a kútból.
A múzeumot hosszú felújítás után nyitották meg újra.
Hol van a vendégszoba kulcsa?
A fiú tejszínes süteményt kapott a nagyanyjától.
Tavaly télen a folyó teljesen befagyott.
A legrégebbi óra a tizenhetedik századból származik.
Az őszi ünnep szombaton kezdődik tíz órakor.
A hídon tűzoltók és rendőrök álltak.""",
    ),
    Language(
        "Russian",
        ("cp1251", "koi8-r", "cp866"),
        """Насос за домом качает воду из колодца.
Музей открыли в мае после долгого ремонта.
Где лежит ключ от комнаты для гостей?
Мальчик получил пирог со сметаной и мёдом.
Прошлой зимой река полностью замёрзла.
Самые старые часы сделаны в семнадцатом веке.
Поезд в город отправляется каждые два часа.
Мост закрыли из-за ремонта до осени.""",
    ),
    Language(
        "Ukrainian",
        ("cp1251",),
        """Насос за будинком качає воду з криниці.
Музей відкрили у травні після довгого ремонту.
Де лежить ключ від кімнати для гостей?
Хлопчик отримав пиріг зі сметаною і медом.
Минулої зими річка повністю замерзла.
Найстаріший годинник зроблено у сімнадцятому столітті.
Потяг до міста вирушає кожні дві години.
Міст закрили на ремонт до осені.""",
    ),
    Language(
        "Greek",
        ("cp1253", "iso8859-7"),
        """Η αντλία πίσω από το σπίτι τραβάει νερό από το πηγάδι.
Το μουσείο άνοιξε τον Μάιο μετά από μεγάλη επισκευή.
Πού είναι το κλειδί του δωματίου των ξένων;
Το αγόρι πήρε μια πίτα με μέλι και κρέμα.
Τον περασμένο χειμώνα το ποτάμι είχε παγώσει.
Το παλαιότερο ρολόι φτιάχτηκε τον δέκατο έβδομο αιώνα.
Το τρένο για την πόλη φεύγει κάθε δύο ώρες.
Η γέφυρα έκλεισε για επισκευές ως το φθινόπωρο.""",
    ),
    Language(
        "Turkish",
        ("cp1254",),
        """Evin arkasındaki pompa kuyudan su çeker.
Müze uzun bir onarımdan sonra mayısta açıldı.
Misafir odasının anahtarı nerede?
Çocuk büyükannesinden kaymaklı bir börek aldı.
Geçen kış nehir tamamen donmuştu.
En eski saat on yedinci yüzyılda yapılmış.
Şehre giden tren iki saatte bir kalkıyor.
Köprü sonbahara kadar onarım için kapatıldı.""",
    ),
    Language(
        "Hebrew",
        ("cp1255",),
        """המשאבה מאחורי הבית שואבת מים מהבאר.
המוזיאון נפתח במאי אחרי שיפוץ ארוך.
איפה המפתח של חדר האורחים?
הילד קיבל עוגה עם שמנת ודבש.
בחורף שעבר הנהר קפא לגמרי.
השעון הישן ביותר נבנה במאה השבע עשרה.
הרכבת לעיר יוצאת כל שעתיים.
הגשר נסגר לשיפוצים עד הסתיו.""",
    ),
    Language(
        "Japanese",
        ("cp932", "euc_jp"),
        """家の裏のポンプは井戸から水をくみ上げます。
博物館は長い修理の後、五月に開きました。
客間の鍵はどこにありますか。
男の子は祖母からクリームのケーキをもらいました。
去年の冬、川はすっかり凍りました。
一番古い時計は十七世紀に作られたものです。
町へ行く電車は二時間ごとに出ます。
橋は秋まで工事のため閉鎖されています。""",
    ),
    Language(
        "Chinese",
        ("gbk",),
        """屋后的水泵从井里抽水。
博物馆经过长时间的修缮后于五月开放。
客房的钥匙在哪里？
男孩从祖母那里得到了一块奶油蛋糕。
去年冬天河水完全结冰了。
最古老的钟是十七世纪制造的。
开往城里的火车每两小时一班。
这座桥因维修关闭到秋天。""",
    ),
    Language(
        "Chinese, traditional",
        ("big5",),
        """屋後的水泵從井裡抽水。
博物館經過長時間的修繕後於五月開放。
客房的鑰匙在哪裡？
男孩從祖母那裡得到了一塊奶油蛋糕。
去年冬天河水完全結冰了。
最古老的鐘是十七世紀製造的。
開往城裡的火車每兩小時一班。
這座橋因維修關閉到秋天。""",
    ),
    Language(
        "Korean",
        ("cp949",),
        """집 뒤의 펌프는 우물에서 물을 끌어올립니다.
박물관은 오랜 수리 끝에 오월에 문을 열었습니다.
손님방 열쇠는 어디에 있습니까?
소년은 할머니에게서 크림 케이크를 받았습니다.
지난겨울 강이 완전히 얼었습니다.
가장 오래된 시계는 십칠 세기에 만들어졌습니다.
도시로 가는 기차는 두 시간마다 출발합니다.
다리는 가을까지 수리 때문에 닫혔습니다.""",
    ),
)


def normalizer(raw: bytes) -> str | None:
    """The encoding that charset-normalizer finds."""
    from charset_normalizer import from_bytes

    best = from_bytes(raw).best()
    return best.encoding if best else None


def chardet_of(*eras: str) -> Callable[[bytes], str | None]:
    """The encoding that chardet finds among those of these eras; none: among all that it knows."""

    def detect(raw: bytes) -> str | None:
        import chardet

        known = sum(chardet.EncodingEra[era].value for era in eras)
        era = chardet.EncodingEra(known) if eras else chardet.EncodingEra.ALL
        return SUPERSET.get(found := chardet.detect(raw, encoding_era=era)["encoding"], found)

    return detect


SUPERSET = {"ISO-8859-1": "cp1252"}
DETECTORS: dict[str, Callable[[bytes], str | None]] = {
    "charset-normalizer": normalizer,
    "chardet": chardet_of(),
    "chardet: web, ISO, DOS": chardet_of("MODERN_WEB", "LEGACY_ISO", "DOS"),
}


def drawn_text(language: Language, encoding: str, lines: int, draw: random.Random) -> str:
    """That many sentences, some with a number in front; at least one cannot be ASCII."""
    sentences = language.sentences.split("\n")
    foreign = [each for each in sentences if not each.isascii()]
    picked = [draw.choice(foreign)] + [draw.choice(sentences) for _ in range(lines - 1)]
    draw.shuffle(picked)
    text = "".join(f"{draw.randrange(999)} {each}\n" if draw.random() < 0.2 else f"{each}\n" for each in picked)
    return text.encode(encoding, "ignore").decode(encoding)  # cp1253 lacks a few marks


def right(found: str | None, raw: bytes, text: str) -> bool:
    """Whether the found encoding gives the text."""
    try:
        return found is not None and raw.decode(found) == text
    except (LookupError, UnicodeError):
        return False


def main() -> None:
    """Print a row for each language and encoding, and a row for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="texts per encoding and length (default: %(default)s)")
    arguments = parser.parse_args()
    print("| encoding | language | " + " | ".join(DETECTORS) + " |\n" + "|---" * (2 + len(DETECTORS)) + "|")
    by_lines: dict[tuple[int, str], list[bool]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    for language in LANGUAGES:
        for encoding in language.encodings:
            scores = defaultdict(list)
            for lines in LINES:
                for repeat in range(arguments.repeats):
                    draw = random.Random(f"{language.name} {encoding} {lines} {repeat}")
                    text = drawn_text(language, encoding, lines, draw)
                    raw = text.encode(encoding)
                    for name, detect in DETECTORS.items():
                        started = time.perf_counter()
                        found = right(detect(raw), raw, text)
                        seconds[name] += time.perf_counter() - started
                        by_lines[lines, name].append(found)
                        scores[name].append(found)
            cells = [f"{sum(scores[name])} of {len(scores[name])}" for name in DETECTORS]
            print(f"| {encoding} | {language.name} | {' | '.join(cells)} |")
    for lines in LINES:
        cells = [f"{sum(by_lines[lines, name])} of {len(by_lines[lines, name])}" for name in DETECTORS]
        print(f"| all | {lines} lines | {' | '.join(cells)} |")
    print({name: f"{spent:.1f} s" for name, spent in seconds.items()})


if __name__ == "__main__":
    main()
