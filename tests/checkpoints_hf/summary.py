"""What a run found, as lines of text: a table for each kind of load, by outcome and reason."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.support import hugging_face_folders as folders

_EXAMPLES = 6
_SAME_REASON = (
    (r".*: (?=requires_grad |values differ|missing|there is none|dtype |shape )", "…: "),
    (r"\S+\.(safetensors|json)", "FILE"),
    (r"'[^']*'", "'…'"),
    (r"\[.*?\]|\{.*", "[…]"),
    (r"\d+", "N"),
)


class Found(NamedTuple):
    """One load of one class."""

    architecture: str
    name: str
    conversions: str
    row: dict[str, Any]


def _found(answers: list[dict[str, Any]], load: str) -> list[Found]:
    return [
        Found(answer["architecture"], model["name"], ", ".join(model["conversions"]), model[load])
        for answer in answers
        for model in answer["models"]
        if load in model
    ]


def _kind(found: Found) -> tuple[str, str, str]:
    reason, outcome = found.row["reason"], found.row["outcome"]
    for pattern, replacement in _SAME_REASON:
        reason = re.sub(pattern, replacement, reason)
    return outcome, reason, found.conversions if outcome in folders.REFUSALS else ""


def lines(answers: list[dict[str, Any]]) -> Iterator[str]:
    for load, title in folders.LOADS.items():
        if found := _found(answers, load):
            yield from _table(title, found)
    given = [model["name"] for answer in answers for model in answer["models"] if model.get("config") == "given"]
    yield f"{len(given)} tiny configs break their class's own rules and were handed on, not read from the folder"
    reasons = Counter(why.split(":")[0] for answer in answers for why in answer["not_built"].values())
    yield f"not counted, as plain PyTorch cannot build them here: {reasons.total()} classes"
    yield from (f"  {count:5} {why}" for why, count in reasons.most_common())


def _table(title: str, found: list[Found]) -> Iterator[str]:
    outcomes = Counter(one.row["outcome"] for one in found)
    yield f"{title}:"
    yield f"  {outcomes[folders.EQUAL]} of {len(found)} classes equal from_pretrained"
    for outcome in (folders.DIFFERENT, *sorted(outcomes.keys() - {folders.EQUAL, folders.DIFFERENT})):
        yield f"  {outcomes[outcome]} {outcome}"
    ways = Counter(
        re.sub(r"\(.*\)", "(…)", one.row["way"]) for one in found if one.row["outcome"] not in folders.REFUSALS
    )
    if any(ways):
        yield "  loaded " + ", ".join(f"{count} with {way or 'nothing more'}" for way, count in ways.most_common())
    if frozen := sum(one.row["frozen"] for one in found):
        yield f"  {frozen} of the equal ones keep requires_grad=False, which from_pretrained does not"
    groups: dict[tuple[str, str, str], list[Found]] = defaultdict(list)
    for one in found:
        if one.row["outcome"] != folders.EQUAL:
            groups[_kind(one)].append(one)
    for (outcome, reason, conversions), members in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        yield f"  {len(members):5} {outcome} | {reason}" + (
            f" | transformers converts by {conversions}" * bool(conversions)
        )
        first = members[0]
        yield f"        {first.architecture} {first.name}: {'; '.join([first.row['reason'], *first.row['lines'][:8]])}"
        if others := [one.name for one in members[1:_EXAMPLES]]:
            yield f"        also {', '.join(others)}" + (" …" if len(members) > _EXAMPLES else "")
