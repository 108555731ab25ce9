"""Facts about languages and scripts for the language filter: who writes what, and which languages a prompt names."""

import re
import unicodedata
from functools import lru_cache

NAMED = "Armenian Bengali Devanagari Ethiopic Georgian Gujarati Gurmukhi Kannada Khmer Lao Malayalam Mongolian Myanmar"
SCRIPTS = {  # first word of a character's name → script; other letters, such as those of formulas, have none
    **{name.upper(): name for name in (*NAMED.split(), "Arabic", "Cyrillic", "Greek", "Hangul", "Hebrew", "Oriya")},
    **{name.upper(): name for name in ("Sinhala", "Tamil", "Telugu", "Thai", "Tibetan")},
    **dict.fromkeys(("CJK", "KANGXI", "BOPOMOFO"), "Han"),
    **dict.fromkeys(("HIRAGANA", "KATAKANA"), "Kana"),
}
WIDTHS = ("HALFWIDTH ", "FULLWIDTH ")
WRITTEN = {  # language → scripts besides Latin
    "zh": ("Han",),
    "ja": ("Han", "Kana"),
    "ko": ("Hangul",),
    "mn": ("Cyrillic", "Mongolian"),
    "ku": ("Arabic",),
    **dict.fromkeys(("ru", "uk", "be", "bg", "mk", "sr", "kk", "ky", "tg", "tt", "ba"), ("Cyrillic",)),
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ug", "arz", "ary", "sdh"), ("Arabic",)),
    **dict.fromkeys(("hi", "mr", "ne", "gom"), ("Devanagari",)),
    **dict.fromkeys(("bn", "as"), ("Bengali",)),
    **{"pa": ("Gurmukhi",), "gu": ("Gujarati",), "ta": ("Tamil",), "te": ("Telugu",), "kn": ("Kannada",)},
    **{"ml": ("Malayalam",), "or": ("Oriya",), "si": ("Sinhala",), "th": ("Thai",), "lo": ("Lao",)},
    **{"my": ("Myanmar",), "km": ("Khmer",), "ka": ("Georgian",), "hy": ("Armenian",), "am": ("Ethiopic",)},
    **{"dz": ("Tibetan",), "he": ("Hebrew",), "el": ("Greek",)},
}
ENGLISH_NAMES = {
    **{"ar": "Arabic", "bn": "Bengali", "bg": "Bulgarian", "ca": "Catalan", "cs": "Czech", "da": "Danish"},
    **{"de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian"},
    **{"fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian"},
    **{"hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian"},
    **{"kk": "Kazakh", "km": "Khmer", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "ms": "Malay"},
    **{"nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian"},
    **{"sk": "Slovak", "sl": "Slovenian", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili"},
    **{"ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu"},
    **{"vi": "Vietnamese", "zh": "Chinese|Mandarin|Cantonese"},
}
OTHER_NAMES = {  # in other languages, among them their own
    "en": "英语|英語|英文|영어|anglais|Englisch|inglés|inglese|inglês|английск|tiếng Anh|الإنجليزية",
    "zh": "中文|汉语|漢語|中国語|중국어|chinois|Chinesisch|chino|cinese|chinês|китайск",
    "ja": "日语|日語|日文|日本語|일본어|japonais|Japanisch|japonés|giapponese|японск",
    "fr": "法语|法語|法文|フランス語|프랑스어|français|Französisch|francés|francese|francês|французск",
    "de": "德语|德語|德文|ドイツ語|독일어|allemand|Deutsch|alemán|tedesco|alemão|немецк",
    "es": "西班牙语|西班牙語|スペイン語|스페인어|espagnol|Spanisch|español|spagnolo|espanhol|испанск",
    "ru": "俄语|俄語|ロシア語|러시아어|russe|Russisch|ruso|russo|русск",
    "ko": "韩语|韓語|韓国語|한국어|coréen|Koreanisch|coreano|корейск",
}
ABOUT_LANGUAGE = re.compile(
    r"\b(?:translat|languages?\b|words?\b|phrases?\b|sentences?\b|alphabet|spell|pronounc)", re.I
)


def script_of(letter: str) -> str | None:
    """The script of a letter or mark, by the first word of its name; None of Latin, digits and symbols."""
    return _script(letter)


@lru_cache(maxsize=8192)
def _script(letter: str) -> str | None:
    if unicodedata.category(letter)[0] not in "LM" and not "\u2e80" <= letter <= "\u2fdf":  # radicals are symbols
        return None
    name = unicodedata.name(letter, "")
    for width in WIDTHS:
        name = name.removeprefix(width)
    return SCRIPTS.get(name.partition(" ")[0])


@lru_cache(maxsize=1024)
def named_in(prompt: str) -> frozenset[str]:
    """The languages that a prompt asks for or asks about by name: `into French`, `the German word`, `用英文`.

    A nationality alone (a Chinese restaurant) names no language.
    """
    named = {CODES[match.lower()] for match in OTHER.findall(prompt)}
    mentioned = ENGLISH.findall(prompt)
    if mentioned:
        named.update(CODES[(match[1] or match[2]).lower()] for match in ASKED.finditer(prompt))
    if mentioned and ABOUT_LANGUAGE.search(prompt):
        named.update(CODES[match.lower()] for match in mentioned if match[0].isupper())
    return frozenset(named)


CODES = {
    name.lower(): code
    for names in (ENGLISH_NAMES, OTHER_NAMES)
    for code, alternatives in names.items()
    for name in alternatives.split("|")
}
NAME = "|".join(ENGLISH_NAMES.values())
ENGLISH = re.compile(rf"\b(?:{NAME})\b", re.I)
ASKED = re.compile(
    rf"\b(?:in|into|from)\s+({NAME})\b(?!\s+[a-z])"
    rf"|\b(?:answer|respond|reply|reason|think|write|explain)\b[^.?!\n]{{0,60}}\bin\s+({NAME})\b",
    re.I,
)
OTHER = re.compile(  # between spaces, unless the script has none
    "|".join(rf"\b{name}" if name < "\u1000" else name for names in OTHER_NAMES.values() for name in names.split("|")),
    re.I,
)
