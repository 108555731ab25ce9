"""Why a published answer ended: as a column or its turn says it, else whether it is complete, else it is whole.

A text without a reason was published as an answer, so it counts as finished; a reason that is null stays unknown.
"""

from collections.abc import Mapping

from distill.errors import UserError
from distill.prompts.columns import parsed
from distill.traces.trace import FinishReason, usual_reason


def finish_reason(row: Mapping[str, object], number: int, own: object, where: str) -> FinishReason:
    """The finish reason of answer `number` of a row. own: that of its turn, None without one.

    Errors: UserError for one that is not text.
    """
    response = row.get("response")
    if isinstance(response, dict):  # of the Responses API
        details = response.get("incomplete_details")
        cut = details.get("reason") if isinstance(details, dict) else None
        return "stop" if cut is None else usual_reason(str(cut))
    listed, complete = parsed(row.get("finish_reasons")), parsed(row.get("is_reasoning_complete"))
    reason = listed[number] if isinstance(listed, list) and number < len(listed) else row.get("finish_reason")
    reason = own if reason is None else reason
    if isinstance(reason, str) and reason.strip():
        return usual_reason(reason)
    if reason is not None and not isinstance(reason, str):
        raise UserError(f"{where}: the finish reason is {reason!r}, not text; correct the row")
    if isinstance(complete, list) and number < len(complete):
        return "stop" if complete[number] else "length"
    stopped = row.get("stop_reason")  # beside `finish_reason`, vLLM names the stop string there
    if isinstance(stopped, str) and "finish_reason" not in row:
        return "length" if usual_reason(stopped) == "length" else "stop"
    return None if "finish_reason" in row or isinstance(listed, list) else "stop"
