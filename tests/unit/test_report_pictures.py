"""The figures of the report, drawn from made-up rows."""

import pytest

from distill.objectives import Logits
from distill.report import pictures


def test_held_out_rows_and_parts_of_an_objective_are_drawn_beside_the_loss():
    rows = [{"step": i, "loss": 2.0 / i, "learning_rate": 1e-3, "sft": 3.0 / i, "logits": 1.0 / i} for i in (1, 2, 3)]
    plain = pictures.training(
        [{key: row[key] for key in ("step", "loss", "learning_rate")} for row in rows], Logits.parts
    )
    mixed = pictures.training(rows, Logits.parts)
    scored = pictures.training([row | ({"eval_loss": 1.5} if row["step"] == 2 else {}) for row in rows], Logits.parts)
    assert "held-out" not in plain.caption and scored.caption.endswith("; on held-out rows 1.5 to 1.5")
    drawn = [picture.svg["wide"] for picture in (plain, mixed, scored)]
    assert ["cross-entropy" in svg for svg in drawn] == [False, True, True]
    assert ["held out" in svg for svg in drawn] == [False, False, True]


def test_a_single_logged_step_is_visible():
    rows = [{"step": i, "loss": 2.0, "learning_rate": 1e-3} for i in (5, 10)]
    drawn = [pictures.training(logged, {}).svg["wide"] for logged in (rows[:1], rows)]
    marked = ["\nC " in svg for svg in drawn]  # the curves of a circle
    assert marked == [True, False]


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_drawn_without_a_warning():
    drawn = pictures.solved("prompts", {"教師 on the prompts": {"teacher": [(1, 2), (2, 2)]}})
    assert drawn.png() and "教師" in drawn.svg["wide"]
