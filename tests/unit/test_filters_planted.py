"""Language mixing and repetition in real solutions: planted cases are found, and the untouched solutions are kept.

What is planted is drawn with a fixed seed: the solution, the place, the sentence, what is repeated and how often.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill.chat import split_reasoning
from distill.filters.base import Candidate, TraceFilter
from distill.filters.language import Language, prose
from distill.filters.repetition import Repetition
from distill.prompts.prompt import Prompt
from distill.traces.trace import Trace

SEED = 19
PLANTED = 600
FOREIGN = {
    "Han": [
        "所以答案是四十二。",
        "等一下,我需要重新检查这一步。",
        "让我们先计算总数",
        "因此,",
        "我们可以看到结果是正确的。",
    ],
    "Kana": ["したがって、この式を計算すると答えが得られます。", "もう一度確認してみましょう。"],
    "Hangul": ["그래서 정답은 다음과 같습니다.", "다시 한 번 확인해 보겠습니다."],
    "Cyrillic": ["Теперь нужно сложить оба числа и проверить ответ.", "Итак, получаем сумму."],
    "Arabic": ["لذلك يجب أن نجمع العددين للحصول على الجواب."],
    "Devanagari": ["इसलिए हमें दोनों संख्याओं को जोड़ना होगा।"],
    "fr": [
        "Vérifions maintenant que chaque personne reçoit la bonne quantité.",
        "Donc la réponse est correcte, je crois.",
    ],
    "de": ["Jetzt rechnen wir aus, wie viele Eier noch übrig bleiben.", "Das bedeutet, dass die Antwort richtig ist."],
    "es": ["Ahora vamos a comprobar cuántos huevos quedan al final.", "Esto significa que la respuesta es correcta."],
    "it": ["Adesso calcoliamo quante uova rimangono alla fine della giornata."],
    "pt": ["Agora vamos verificar quantos ovos ainda restam no final do dia."],
    "nl": ["Nu gaan we kijken hoeveel eieren er aan het eind overblijven."],
    "pl": ["Teraz sprawdzimy, ile jajek zostało na koniec dnia."],
    "vi": ["Bây giờ chúng ta kiểm tra xem còn lại bao nhiêu quả trứng."],
    "tr": ["Şimdi günün sonunda kaç yumurta kaldığını kontrol edelim."],
    "id": ["Sekarang kita akan memeriksa berapa banyak telur yang masih tersisa."],
}


def solution(question: str, text: str) -> Trace:
    reasoning, response = split_reasoning(text)
    return Trace(Prompt.from_question(question, "42"), 0, 0, text, reasoning, response, "stop", "t")


@pytest.fixture(scope="module")
def solutions(real_data: Callable[[str], Path]) -> list[Trace]:
    """Correct ones: 640 with `<think>`, 1,089 without, and the written solutions of MATH-500."""

    def rows(name: str) -> Iterator[dict[str, object]]:
        return map(json.loads, real_data(name).read_text(encoding="utf-8").splitlines())

    found = [
        solution(str(row["question"]), str(row["response"]))
        for name in ("think_traces_rg3b_dev/gsm8k", "think_traces_rg3b_dev/mixed", "boxed_outputs_qwen25_3b/gsm8k")
        for row in rows(f"{name}.jsonl")
        if row["score"] is True
    ]
    found += [solution(str(row["problem"]), str(row["solution"])) for row in rows("math500/test.jsonl")]
    for row in rows("qwen25math_cot100x8/math_cot_100.slim.jsonl"):
        codes, scores = row["code"], row["score"]
        assert isinstance(codes, list) and isinstance(scores, list)
        found += [
            solution(str(row["question"]), text) for text, score in zip(codes, scores, strict=True) if score is True
        ]
    return found


def keeps(filter_: TraceFilter, trace: Trace) -> bool:
    return filter_.judge(Candidate(trace)).keep


def planted(solutions: list[Trace], plant: Callable[[random.Random, list[str]], str]) -> Iterator[Trace]:
    """Solutions with something put between two of their lines."""
    draw = random.Random(SEED)
    for _ in range(PLANTED):
        trace = draw.choice(solutions[:640])
        lines = trace.text.split("\n")
        place = draw.randrange(1, len(lines) + 1)
        text = "\n".join([*lines[:place], plant(draw, lines), *lines[place:]])
        yield solution(trace.prompt.messages[0]["content"], text)


def foreign(draw: random.Random, lines: list[str]) -> str:
    return draw.choice(FOREIGN[draw.choice(list(FOREIGN))])


def loop(draw: random.Random, lines: list[str]) -> str:
    """A loop of characters, of a phrase, of a line or of a paragraph, taken from the solution itself."""
    words = [word for line in lines for word in line.split()]
    long = [line for line in lines if len(line.split()) >= 10] or [
        "So the answer is what we found in the first step above."
    ]
    match draw.choice(("characters", "phrase", "line", "paragraph")):
        case "characters":
            return draw.choice(("a", "ha", "!?", "0", "好", "lol", "13")) * draw.randint(100, 400)
        case "phrase":
            length = draw.randint(2, 8)
            start = draw.randrange(len(words) - length)
            return " ".join(words[start : start + length] * draw.randint(20, 60))
        case "line":
            return "\n".join([draw.choice(long)] * draw.randint(4, 12))
        case _:
            start = draw.randrange(len(lines))
            paragraph = [*lines[start : start + 5], draw.choice(long)]
            return "\n".join(paragraph * draw.randint(4, 12))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("filter_", "plant"), [(Language(), foreign), (Repetition(), loop)], ids=["language", "loops"])
def test_planted_cases_are_found_and_real_solutions_kept(
    solutions: list[Trace], filter_: TraceFilter, plant: Callable[[random.Random, list[str]], str]
) -> None:
    assert len(solutions) > 2000
    found = sum(not keeps(filter_, trace) for trace in planted(solutions, plant))
    wrongly = [trace for trace in solutions if not keeps(filter_, trace)]
    assert found / PLANTED >= 0.95
    assert found / (found + len(wrongly)) >= 0.95
    assert len([trace for trace in wrongly if trace in solutions[:640]]) <= 0.005 * 640
    assert len(wrongly) <= 0.005 * len(solutions), [filter_.judge(Candidate(trace)) for trace in wrongly]


def test_text_that_a_broken_sampler_wrote_is_foreign(real_data: Callable[[str], Path]) -> None:
    """Three of the 800 answers dissolve into words of many languages, although each has the right box in it."""
    lines = real_data("qwen25math_cot100x8/math_cot_100.slim.jsonl").read_text(encoding="utf-8").splitlines()
    broken = [
        text
        for row in map(json.loads, lines)
        for text in row["code"]
        if not keeps(Language(), solution(row["question"], text))
    ]
    assert len(broken) == 3


def test_prose_is_what_is_left_without_code_and_formulas() -> None:
    assert prose("a `b c` d ```e\nf``` g").split() == ["a", "d", "g"]
    assert prose(r"so \(x+y\) and $z$ and \[ w \] hold").split() == ["so", "and", "and", "hold"]
    assert prose("he has $5, then he spends it, and $3 are left").split()[:6] == [
        "he",
        "has",
        "$5,",
        "then",
        "he",
        "spends",
    ]
    assert prose("<think>a</think>b \\frac{1}{2}").split()[:2] == ["a", "b"]


def test_the_language_of_the_prompt_decides() -> None:
    german = "Wie viele Eier bleiben am Ende des Tages noch übrig, wenn drei davon gegessen werden?"
    for question, text, reason in (
        (german, "Zuerst ziehen wir die drei Eier ab, die gegessen werden.", "ok"),
        (german, "First we subtract the three eggs that are eaten every day.", "other_language: en"),
        (
            "布伦达今天总共需要对 21 只动物进行绝育。需要对多少只猫进行绝育？",
            "设猫的数量为 x,那么狗的数量是 2x。",
            "ok",
        ),
        ("What does 你好 mean in English, and how is it used?", "The greeting 你好 means hello.", "ok"),
        ("20 + 22?", "Zuerst ziehen wir die drei Eier ab, die gegessen werden.", "ok"),
    ):
        assert Language().judge(Candidate(solution(question, f"<think>{text}</think>42"))).reason == reason
    chat = Prompt.from_question("Translate this sentence to French, please: it is late.", None, "chat")
    french = Trace(
        chat, 0, 0, "<think>Easy.</think>Il est tard, mon ami, et la nuit tombe.", "Easy.", "Il est tard", "stop", "t"
    )
    assert keeps(Language(), french), "it was asked for"
