"""Markdown of the user's own that goes into a page: refused where it would swallow the rest of it, or run in it."""

import re

FENCE = re.compile(r" {0,3}(?P<fence>`{3,}|~{3,})(?P<rest>.*)")
INLINE_CODE = re.compile(r"(`+)[^`].*?\1")
ACTIVE = re.compile(
    r"<\s*/?(?:script|style|iframe|object|embed|form|textarea|title|xmp|plaintext|noscript)\b[^>]*>?"
    r"|<[a-z][^>]*\son[a-z]+\s*=|javascript\s*:",
    re.IGNORECASE,
)
PAIRED = ("details", "pre", "div", "table", "center", "a")


def find_unfit(text: str) -> str | None:
    """Why a text cannot stand within a page; None where it can."""
    outside, fence = [], ""
    for line in text.splitlines():
        match = FENCE.fullmatch(line)
        if not fence and match and not ("`" in match["fence"] and "`" in match["rest"]):
            fence = match["fence"]
        elif not fence:
            outside.append(line)
        elif match and match["fence"].startswith(fence) and not match["rest"].strip():
            fence = ""
    if fence:
        return f"opens a code block ({fence}) and does not close it"
    shown = INLINE_CODE.sub("", "\n".join(outside))
    if "<!--" in re.sub(r"<!--.*?-->", "", shown, flags=re.DOTALL):
        return "opens a comment (<!--) and does not close it"
    if match := ACTIVE.search(shown):
        return f"holds {match[0][:40]!r}, which pages neither run nor show"
    for name in PAIRED:
        opened, closed = (len(re.findall(rf"<{slash}{name}\b[^>]*>", shown, re.IGNORECASE)) for slash in ("", "/"))
        if opened != closed:
            return f"has {opened} <{name}> and {closed} </{name}>"
    return None
