"""How the API page shows docstrings, which are prose here.

What they say of each argument or field ("`name`: what it is. `other`: …") becomes an
entry of a list; and a NamedTuple shows its fields with their types and defaults.
"""

import re
from typing import Any

import griffe

# `name`: or `name`, `other`: at the start of a line or behind a sentence.
_NAMES = re.compile(r"(?:^|(?<=[.;]\s))((?:`[^`\n]+`,\s+)*`[^`\n]+`:)(?=\s)", re.M)


class Docstrings(griffe.Extension):
    """A griffe extension; mkdocs.yml names it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object that has one."""
        if not obj.docstring:
            return
        text = re.sub(r"\n(?=Raises: )", "\n\n", obj.docstring.value)
        text = re.sub(r"^(Returns|Raises):", r"**\1:**", text, flags=re.MULTILINE)
        head, *rest = map(with_list, text.split("\n\n"))
        obj.docstring.value = "\n\n".join([head, *fields_of(obj), *rest])


def with_list(paragraph: str) -> str:
    """A paragraph whose named parts are a Markdown list; others stay as they are."""
    before, *rest = _NAMES.split(paragraph)
    entries = [
        f"- {' '.join((names + text).split())}"
        for names, text in zip(rest[::2], rest[1::2], strict=True)
    ]
    return "\n\n".join(filter(None, [before.strip(), "\n".join(entries)]))


def fields_of(obj: griffe.Object) -> list[str]:
    """The fields of a NamedTuple as a block of code; nothing for other objects."""
    if not isinstance(obj, griffe.Class) or "NamedTuple" not in map(str, obj.bases):
        return []
    fields = [
        f"{name}: {field.annotation}" + (f" = {field.value}" if field.value else "")
        for name, field in obj.attributes.items()
        if "property" not in field.labels
    ]
    return ["\n".join(["```python", *fields, "```"])]
