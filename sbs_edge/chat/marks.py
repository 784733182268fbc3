"""Remove a chat template's marks from an answer: thinking, channels, turns.

The server should remove them. If it does not, the student would learn them as part of a rationale or a label.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Unmarked", "unmark"]

_WORDS = (
    r"(?:seed:|ant)?(?:think|thinking|thoughts?|thought_process|reasoning|reason|reflection|scratchpad|"
    r"analysis|chain_of_thought|cot|inner_monologue|internal_monologue|deliberation)"
)
_OPEN = re.compile(
    rf"<{_WORDS}\b[^<>]*>|\[(?:THINK|THINKING|REASONING)\]|◁think▷|<\|begin_of_thought\|>|<\|(?:START_)?THINKING\|>|"
    r"<unused94>(?:thought)?|<\|channel>\s*thought\b",
    re.IGNORECASE,
)
_CLOSE = re.compile(
    rf"</{_WORDS}\s*>|\[/(?:THINK|THINKING|REASONING)\]|◁/think▷|<\|end_of_thought\|>|<\|(?:END_|/)THINKING\|>|"
    r"<unused95>|<channel\|>",
    re.IGNORECASE,
)
# gpt-oss: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...
_CHANNEL = re.compile(
    r"<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
    r"(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)
# The same if the special tokens were dropped and their words left: analysisWe need ...assistantfinalThe ...
_BARE_CHANNEL = re.compile(r"\A(?:analysis|commentary)(?=[A-Z\"“'’])(.*?)(?:assistant\s*final|\Z)", re.DOTALL)
_PROSE = re.compile(
    r"\A\s*Here is my thought process:.*?Here is my response:", re.DOTALL | re.IGNORECASE
)  # Granite
_START = re.compile(
    r"\A(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<\|START_OF_TURN_TOKEN\|>|<\|CHATBOT_TOKEN\|>|"
    r"<\|(?:im_start|start|start_of_role)\|>\s*(?:assistant|model)?(?:<\|end_of_role\|>)?|"
    r"<start_of_turn>\s*(?:model|assistant)?|<\|turn>\s*(?:model|assistant)?|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>|"
    r"<\|(?:assistant|message)\|>|<｜Assistant｜>|\[/?INST\]|<\|START_RESPONSE\|>|\s)+",
    re.IGNORECASE,
)
_END = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|eos|end|endoftext|end_of_text|end_of_turn|endofturn|return|start|call|"
    r"user|END_OF_TURN_TOKEN|END_RESPONSE|start_header_id|separator)\|>|</s>|<eos>|<pad>|<end_of_turn>|"
    r"<start_of_turn>|<turn\|>|<｜(?:end▁of▁sentence|User)｜>|<EOT>|\[EOS\]|\[/?INST\]|\[/s\]",
    re.IGNORECASE,
)
_WRAPPER = re.compile(
    r"</?(?:answer|final_answer|response|output|solution)>|<\|(?:begin|end)_of_solution\|>|◁/?answer▷",
    re.IGNORECASE,
)
# An unknown mark: a special token anywhere, or a tag that opens the text or closes nothing.
_SPECIAL = re.compile(
    r"<\|[^\s<>|]{1,40}\|?>|<[^\s<>|]{1,40}\|>|<｜[^\s<>]{1,40}｜>|◁[^\s◁▷]{1,40}▷|<unused\d+>"
)
_TAG = re.compile(r"\A\s*(?:<([A-Za-z][\w:-]*)>|\[([A-Z][A-Z_]+)\])")
_CLOSING = re.compile(r"</([A-Za-z][\w:-]*)\s*>|\[/([A-Z][A-Z_]+)\]")
_HTML = re.compile(
    r"a|b|blockquote|body|br|center|code|d[dlt]|del|div|em|font|form|h[1-6r]|head|html|i|img|input|ins|kbd|label|li|"
    r"mark|ol|p|pre|q|s|section|small|span|strike|strong|su[bp]|table|tbody|t[dhrt]|title|u|ul",
    re.IGNORECASE,
)


class Unmarked(NamedTuple):
    """The answer without marks; ``reason`` if it cannot be used; ``ended`` if a mark ended the turn."""

    text: str
    reason: str | None = None
    ended: bool = False


def unmark(text: str, keep: Sequence[str] = ()) -> Unmarked:
    """Return the part of the answer that is meant for the user.

    Thinking is removed with its marks. An answer cannot be used if thinking is opened and never closed
    (``thought-unfinished``), if there is only thinking (``thought-only``), or if a mark is unknown
    (``unknown-mark: <name>``), because it would be read as a part of the rationale.

    Args:
        text: what came.
        keep: the task's own words (answer marker, labels); a mark in one of them is left alone.

    """
    own = "\n".join(keep)
    text = _without_invisible(text)
    ended = False
    if "<|channel|>" in text:
        channels = _CHANNEL.findall(text)
        final = [body for name, body in channels if name == "final"]
        if not final:
            return Unmarked("", "thought-unfinished")
        text = final[-1]
    bare = _BARE_CHANNEL.match(text)
    if bare is not None:
        if not bare[0].endswith("final"):
            return Unmarked("", "thought-unfinished")
        text = text[bare.end() :]
    text = _PROSE.sub("", _START.sub("", text))
    had_thought = False
    if _OPEN.search(text) or _CLOSE.search(text):
        text, had_thought, unfinished = _without_thought(text, own)
        if unfinished:
            return Unmarked("", "thought-unfinished")
        text = _START.sub("", text)
    for found in _END.finditer(text):
        if found[0] not in own:
            text, ended = text[: found.start()], True
            break
    text = _WRAPPER.sub(lambda found: found[0] if found[0] in own else "\n", text).strip()
    if had_thought and not text:
        return Unmarked("", "thought-only")
    if (name := _unknown(text, own)) is not None:
        return Unmarked(text, f"unknown-mark: {name}")
    return Unmarked(text, None, ended)


def _without_invisible(text: str) -> str:
    """Drop control and format characters, except the two joiners, which scripts and emoji need."""
    return "".join(
        c
        if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf")
        else "\n"
        if c in "\r\x0b\x0c\x85"
        else ""
        for c in text.replace("\r\n", "\n")
    )


def _without_thought(text: str, own: str) -> tuple[str, bool, bool]:
    """Return the text without thinking, whether there was any, and whether it was left open."""
    kept: list[str] = []
    start, depth, had = 0, 0, False
    marks = sorted(
        [(m.start(), m.end(), 1) for m in _OPEN.finditer(text) if m[0] not in own]
        + [(m.start(), m.end(), -1) for m in _CLOSE.finditer(text) if m[0] not in own]
    )
    for begin, end, step in marks:
        had = True
        if step > 0:
            if depth == 0:
                kept.append(text[start:begin])
            depth = 1  # a model that quotes the opening mark in its thought closes it once
        elif depth == 0:
            kept.clear()  # opened in the prompt's template: everything before it is thinking
        else:
            depth = 0
        start = end
    if depth:
        return "", had, True
    return "\n".join([*kept, text[start:]]).strip(), had, False


def _unknown(text: str, own: str) -> str | None:
    for found in _SPECIAL.finditer(text):
        if found[0] not in own:
            return found[0]
    opened = _TAG.match(text)
    if opened is not None:
        name = opened[1] or opened[2]
        closing = f"</{name}" if opened[1] else f"[/{name}"
        if (
            opened[0].strip() not in own
            and not _HTML.fullmatch(name)
            and (closing in text or text[opened.end() :].lstrip(" ").startswith("\n"))
        ):
            return opened[0].strip()
    for found in _CLOSING.finditer(text):
        name = found[1] or found[2]
        opening = f"<{name}" if found[1] else f"[{name}]"
        if found[0] not in own and opening not in text and not _HTML.fullmatch(name):
            return found[0]
    return None
