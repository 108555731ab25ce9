"""The repetition filter on loops, and on what is repeated with a reason."""

import pytest
from filter_support import make_trace

from distill.filters.base import Candidate
from distill.filters.repetition import Repetition

CHECKED = "So we have to compute the total number of apples again."
LEGITIMATE = {
    "rows of a table": "| x | y |\n|---|---|\n" + "| 1 | 0 |\n" * 40,
    "rows with words": "| day | eaten |\n|---|---|\n" + "| yes | no |\n" * 20,
    "truth table": "| p | q | p and q |\n|---|---|---|\n" + "| T | F | F |\n| T | T | T |\n" * 8,
    "identity matrix": "\n".join(" ".join("1" if i == j else "0" for j in range(10)) for i in range(10)),
    "matrix of zeros": r"\begin{pmatrix}" + r" \\ ".join(["0 & 0 & 0 & 0 & 0"] * 8) + r"\end{pmatrix}",
    "grid": "# # # # # # # #\n. . . . . . . .\n" * 10,
    "list of numbers": ", ".join(map(str, range(1, 200))),
    "ones": "1 " * 60,
    "sum": "1 + " * 80 + "1 = 81",
    "sum without spaces": "+".join(["25"] * 60),
    "sum of things": "3 apples + " * 12 + "3 apples = 39 apples",
    "sum of money": "$5 + " * 30 + "$5 = $155",
    "power": "2 × " * 64 + "2",
    "powers modulo": "Powers of 2 mod 7: " + "2, 4, 1, " * 14,
    "decimals": "1/7 = 0." + "142857" * 10,
    "zeros": "10^90 = 1" + "0" * 90,
    "digits of a hash": "0x" + "f" * 64,
    "address": "https://a.b/" + "a" * 30,
    "continued fraction": r"\frac{1}{1+" * 12 + "1" + "}" * 12,
    "code": "```python\n" + "    } else if (x == 1) {\n        return 0;\n" * 5 + "```\n",
    "records in code": "```json\n[" + ", ".join(['{"x": 0, "y": 0}'] * 12) + "]\n```\n",
    "code in a list": "1. Step:\n   ```python\n" + "   total += add(x)\n" * 20 + "   ```\n",
    "code between tildes": "~~~python\n" + "print(x) # add one\n" * 30 + "~~~\n",
    "code between more marks": "````\n```\n" + "total += add(x)\n" * 20 + "````\n",
    "values": "[" + "False, " * 40 + "True]",
    "values without spaces": "[" + "null," * 40 + "null]",
    "asserts": "```python\n" + "".join(f"assert solve({n}) == {2 * n}\n" for n in range(20)) + "```\n",
    "paragraphs": "a" + "\n\n" * 300 + "b" + " " * 500 + "c",
    "rules": "-" * 200 + "\n" + "." * 300 + "\n" + "_" * 300 + "\n|" + "=" * 70 + "|",
    "triangle": "\n".join("*" * n for n in range(1, 40)),
    "cases": "\n".join(f"Case {n}: x = {n}. This fails, because the sum of the digits is odd." for n in range(40)),
    "cases with one sentence": "\n".join(f"n = {n}:\nThis does not satisfy the condition.\n" for n in range(12)),
    "cases with one reason": "\n".join(
        f"p = {n}:\nThe sum of its digits is not divisible by three.\n" for n in range(8)
    ),
    "days": "\n".join(f"Day {n}: she eats 3 apples and has {99 - 3 * n} apples left." for n in range(30)),
    "steps": "\n".join(f"{100 - 3 * n} - 3 = {97 - 3 * n}" for n in range(30)),
    "song": "\n".join(f"{n} bottles of beer on the wall, {n} bottles of beer." for n in range(20, 0, -1)),
    "refrain": "\n\n".join(f"Verse {n}\nRow, row, row your boat,\ngently down the stream." for n in range(4)),
    "hesitation": "Wait. Wait. Wait. Wait. Wait. Hmm" + "." * 60,
    "said twice": f"{CHECKED} {CHECKED}\nThe answer is 7.\nThe answer is 7.\nThe answer is 7.",
    "laughter": "ha" * 15,
}
LOOPS = {
    "phrase": "I think the answer is 7. " * 4,
    "long phrase": f"{CHECKED} " * 3,
    "short words": "Wait, no. " * 15,
    "final answers": "**Final Answer**\n\\boxed{7}\n\n" * 12,
    "Chinese": "所以答案是七。" * 8,
    "Korean": "다시 확인해 보겠습니다. " * 10,
    "syllables": "はい" * 30,
    "emoji": "😀" * 120,
    "letters": "no" + "o" * 120,
    "figures": "4" * 200,
    "rows without end": "| 1 | 0 |\n" * 200,
    "sum without end": "1 + " * 400,
    "code without end": "```python\n" + "total += 1\n" * 100 + "```\n",
    "open code in a list": "1. Step:\n   ```python\n" + "   total += add(x)\n" * 20,
    "values without end": "False, " * 400,
    "open code": "```python\n" + "print('the total is', total)\n" * 10,
    "line at intervals": "\n".join(f"{n}.\n{CHECKED} I am not sure about the result.\n" for n in range(12)),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_repeated_with_a_reason(name: str) -> None:
    assert Repetition().judge(Candidate(make_trace(f"<think>\n{LEGITIMATE[name]}\n</think>\n7"))).keep


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str) -> None:
    verdict = Repetition().judge(Candidate(make_trace(f"<think>\nSo it is.\n{LOOPS[name]}\n</think>\n7")))
    assert not verdict.keep and int(str(verdict.evidence["times"])) >= 3
