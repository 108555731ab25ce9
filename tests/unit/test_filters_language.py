"""The language filter on prompts and reasoning of many languages, and on text that is in none."""
# ruff: noqa: RUF001  (letters that look like Latin ones are what is tested)

import unicodedata

import pytest
from filter_support import make_trace

from distill.errors import UserError
from distill.filters.base import Candidate, Resources
from distill.filters.language import Language
from distill.filters.languages import ENGLISH_NAMES, OTHER_NAMES, WRITTEN, named_in
from distill.prompts.prompt import Prompt

ASKED = {
    "en": "How many apples does Ann have left after she eats three of the ten apples that she bought?",
    "fr": "Combien de pommes reste-t-il à Anne après qu'elle en a mangé trois sur les dix qu'elle a achetées ?",
    "es": "¿Cuántas manzanas le quedan a Ana después de comer tres de las diez que compró?",
    "de": "Wie viele Äpfel hat Anna noch übrig, nachdem sie drei von zehn gegessen hat?",
    "ru": "Сколько яблок осталось у Анны, если она съела три из десяти?",
    "zh": "小明有十个苹果，吃了三个，还剩多少个苹果？",
    "ja": "太郎はりんごを十個買って、三個食べました。残りは何個ですか。",
    "ko": "민수는 사과를 열 개 샀고 세 개를 먹었습니다. 몇 개가 남았습니까?",
    "hi": "अन्ना के पास दस सेब थे और उसने तीन खा लिए। अब कितने सेब बचे हैं?",
    "bn": "আনার কাছে দশটি আপেল ছিল এবং সে তিনটি খেয়েছে। কতটি বাকি আছে?",
    "ta": "அன்னாவிடம் பத்து ஆப்பிள்கள் இருந்தன, அவள் மூன்றை சாப்பிட்டாள். எத்தனை மீதம்?",
    "th": "แอนนามีแอปเปิ้ลสิบลูกและกินไปสามลูก เหลือกี่ลูก",
    "ar": "كان لدى آنا عشر تفاحات وأكلت ثلاثا منها. كم تفاحة بقيت؟",
    "he": "לאנה היו עשרה תפוחים והיא אכלה שלושה. כמה תפוחים נשארו?",
    "el": "Η Άννα είχε δέκα μήλα και έφαγε τρία. Πόσα μήλα έμειναν;",
}
REASONED = {
    "en": "Anna had ten apples and ate three of them, which leaves seven apples in the end.",
    "fr": "Anne avait dix pommes et elle en a mangé trois, donc il en reste sept. Vérifions ça après.",
    "es": "Ana tenía diez manzanas y se comió tres, así que le quedan siete.",
    "pt": "A Ana tinha dez maçãs e comeu três, então ainda restam sete maçãs para ela.",
    "de": "Anna hatte zehn Äpfel und hat drei gegessen, also bleiben sieben übrig.",
    "nl": "Anna had tien appels, en als we kijken of we er drie van opeten, blijven er zeven over.",
    "ru": "У Анны было десять яблок, она съела три, значит осталось семь.",
    "uk": "Потім вона з'їла три яблука, тому нам потрібно відняти три від десяти.",
    "zh": "小明有十个苹果，吃掉三个之后剩下七个。因此答案是七。",
    "ja": "太郎はりんごを十個買い、三個食べたので、残りは七個です。",
    "ko": "민수는 사과 열 개 중 세 개를 먹었으므로 일곱 개가 남습니다.",
    "hi": "अन्ना के पास दस सेब थे, तीन खाए, तो सात बचे।",
    "vi": "Anna có mười quả táo và đã ăn ba quả, vậy còn lại bảy quả.",
}


def reason(question: str, reasoning: str, task: str = "math", answer: str = r"\boxed{7}", **settings: object) -> str:
    prompt = Prompt.from_question(question, None if task == "chat" else "7", task)
    trace = make_trace(f"<think>\n{reasoning}\n</think>\n{answer}", prompt=prompt)
    return Language.model_validate(settings).judge(Candidate(trace)).reason


@pytest.mark.parametrize("code", [code for code in ASKED if code in REASONED])
def test_the_language_of_the_prompt_is_kept(code: str) -> None:
    assert reason(ASKED[code], REASONED[code]) == "ok"
    assert reason(ASKED[code], f"$x = 10 - 3$. {REASONED[code]} ```print('so the answer is seven now')```") == "ok"


@pytest.mark.parametrize("fence", ["```", "  ```", "~~~", "   ~~~", "````\n```"])
def test_code_is_no_language(fence: str) -> None:
    code = f"{fence}\nНапечатай ответ, а потом закончи работу\n{fence.partition(chr(10))[0]}\n"
    assert reason(ASKED["en"], f"{REASONED['en']}\n{code}{REASONED['en']}") == "ok"
    assert reason(ASKED["en"], f"{REASONED['en']}\n{code}{REASONED['ru']}") != "ok"


@pytest.mark.parametrize("code", [code for code in ASKED if code != "en"])
def test_english_reasoning_to_another_language_is_dropped(code: str) -> None:
    """Also where the prompt's vowels are marks and not letters, as in Hindi, and where accents are decomposed."""
    assert reason(ASKED[code], REASONED["en"]) == "other_language: en"
    assert reason(unicodedata.normalize("NFD", ASKED[code]), REASONED["en"]) == "other_language: en"
    assert reason(ASKED[code], REASONED["en"], also=["en"]) == "ok"


@pytest.mark.parametrize("code", [code for code in REASONED if code != "en"])
def test_other_languages_in_english_reasoning_are_dropped(code: str) -> None:
    expected = {f"other_language: {code}", *(f"other_script: {script}" for script in WRITTEN.get(code, ()))}
    assert reason(ASKED["en"], REASONED[code]) in expected
    assert reason(ASKED["en"], unicodedata.normalize("NFD", REASONED[code])) in expected
    assert reason(ASKED["en"], f"{REASONED['en']}\n{REASONED[code]}\n{REASONED['en']}") in expected
    assert reason(ASKED["en"], REASONED[code], also=[code]) == "ok", "its script is accepted, too"


@pytest.mark.parametrize(
    ("asked", "reasoned"), [("zh", "ja"), ("ja", "zh"), ("es", "pt"), ("de", "nl"), ("ru", "uk"), ("fr", "es")]
)
def test_related_languages_are_told_apart(asked: str, reasoned: str) -> None:
    assert reason(ASKED[asked], REASONED[reasoned]) != "ok"


@pytest.mark.parametrize(
    "text",
    [
        "The people are: Giovanni Bellini, Tommaso Masaccio, Piero Francesca, Sandro Botticelli, Filippo Lippi.",
        "Names: Krzysztof Wiśniewski, Agnieszka Kowalczyk, Małgorzata Lewandowska, Zbigniew Wójcik.",
        "MCMXC XIV VII III IX XL CD MM. XIV VII III IX",
        "ABC ACB BAC BCA CAB CBA\nAABB ABAB ABBA BAAB BABA BBAA",
        "Uh oh ah eh um er.\nHmm hmm hmm hmm.",
        "Let θ = αβγ, and αβγδε is the product of angles.",
        "Let ш be a variable, and Ш(E) the group; ℵ_0, א, ∀x∈ℝ ∃y: 𝒜𝒷𝔠, ∇·E=ρ/ε₀, ℏω.",
        "Step ① add; step ② subtract; ㈱ ㎏ ㎡; 3 µm, 10 Ω, 4 Å, 20 °C; the answer is ７，（7）。",
        "Ｔｈｅ　ａｎｓｗｅｒ　ｉｓ　ｓｅｖｅｎ",
        "😀 🍎🍎🍎 minus 🍎 equals 🍎🍎. 👍🏽👨‍👩‍👧‍👦 Done.",
        "~~~\n# voici le calcul de la somme des nombres\n~~~\nSo the answer is seven apples.",
        "See https://fr.wikipedia.org/wiki/Théorème_de_Pythagore_et_la_géométrie for details of this.",
        "THE ANSWER IS SEVEN APPLES BECAUSE TEN MINUS THREE IS SEVEN.",
        "A priori, vis-à-vis the naïve façade, an ansatz, an eigenvalue, quod erat demonstrandum.",
        "\\text{So the total number of apples is } 7. LHS = RHS mod p; gcd lcm sin cos tan log; iff QED WLOG.",
        "",
    ],
)
def test_names_symbols_and_code_are_in_no_language(text: str) -> None:
    assert reason(ASKED["en"], text) == "ok"


@pytest.mark.parametrize(
    ("text", "script"),
    [("The word λόγος means reason.", "Greek"), ("the ﾘﾝｺﾞ is", "Kana"), ("the 𠀀𠀁 is", "Han"), ("the ⼀⼁ is", "Han")],
)
def test_rare_characters_have_their_script(text: str, script: str) -> None:
    assert reason(ASKED["en"], text) == f"other_script: {script}"


def test_a_short_prompt_has_a_language_too() -> None:
    assert reason("How many are 3 and 39?", f"{REASONED['en']} {REASONED['de']}") == "other_language: de"
    assert reason("3 + 39?", REASONED["de"]) == "ok", "in none: the reasoning's own language is accepted"


def test_the_evidence_has_whole_words() -> None:
    prompt = Prompt.from_question(ASKED["en"], "7")
    verdict = Language().judge(Candidate(make_trace("<think>the अन्ना is</think>7", prompt=prompt)))
    assert verdict.evidence["text"] == "अन्ना"


def test_a_language_that_the_prompt_names_is_accepted() -> None:
    french, chinese = "Il y avait dix pommes et on en a mangé trois, donc il en reste sept.", "我有三个苹果"
    assert reason("Answer in French: how many apples are left when three of ten are eaten?", french) == "ok"
    assert reason("Translate 'I have three apples' into Chinese.", f"In Chinese, this is {chinese}.") == "ok"
    assert reason("Translate 'I have three apples' into Chinese.", f"It is {chinese}.", "chat", chinese) == "ok"
    assert reason(f"请用英文回答：{ASKED['zh']}", REASONED["en"]) == "ok"
    assert reason("Translate 'I have three apples' into Chinese.", REASONED["ko"]) != "ok"
    assert reason("A Chinese restaurant sells three of ten apples. How many are left?", chinese) == "other_script: Han"


def test_names_of_languages() -> None:
    assert named_in("Write a poem about the sea in french.") == {"fr"}
    assert named_in("Which German word has the most letters?") == {"de"}
    assert named_in("Polish the table in the Spanish room; in Chinese restaurants there are none.") == frozenset()
    assert named_in("Wie heißt das auf Englisch?") == {"en"} and named_in("翻译成法语") == {"fr"}
    assert named_in("Brussels and Rousseau") == frozenset()
    assert {*ENGLISH_NAMES, *OTHER_NAMES} >= {"zh", "ja", "ko", "ru", "ar"}


def test_an_unknown_code_is_refused_before_any_work() -> None:
    Language.model_validate({"also": ["zh", "en"]}).check(Resources())
    with pytest.raises(UserError, match=r"filter.language.also: 'eng' is not a language that can be recognized"):
        Language.model_validate({"also": ["zh", "eng"]}).check(Resources())
    from distill.filters.language import _detector

    assert set(WRITTEN) <= set(_detector().labels) and set(ENGLISH_NAMES) <= set(_detector().labels)
