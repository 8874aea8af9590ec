"""Whether JSON values have the form that a schema asks for, without a package of its own.

Only what the manifest's schema is made of is understood; a test compares the two with `jsonschema`.
"""

from __future__ import annotations

import re
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


def fault(value: object, schema: Any, root: dict[str, Any], where: str = "") -> str:
    """Return the first thing wrong with a value; empty if it has the form.

    Args:
        value: JSON values.
        schema: What the value must be like, or false where there must be none.
        root: The whole schema, which holds the definitions.
        where: Path of the value, such as `artifacts[0].bytes`.
    """
    if schema is False:
        return f"`{where}` is not known"
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    name = f"`{where}`" if where else "it"
    if "oneOf" in schema:
        faults = [fault(value, option, root, where) for option in schema["oneOf"]]
        return "" if "" in faults else faults[-1]
    if "type" in schema:
        kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(_is(value, kind) for kind in kinds):
            return f"{name} is not of type {' or '.join(kinds)}"
    accepted = [schema["const"]] if "const" in schema else schema.get("enum")
    if accepted is not None and value not in accepted:
        return f"{name} is none of {accepted}"
    if isinstance(value, str) and not _matches(schema.get("pattern", ""), value):
        return f"{name} does not look like {schema['pattern']}"
    if _is(value, "number"):
        below = value < schema.get("minimum", value) or value > schema.get("maximum", value)
        if below or ("exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]):
            return f"{name} lies outside its limits"
    if isinstance(value, list):
        return _list_fault(value, schema, root, where, name)
    return _dict_fault(value, schema, root, where, name) if isinstance(value, dict) else ""


def _is(value: object, kind: str) -> bool:
    # Python's `True` is an integer, JSON's is not; and 1.0 is one there.
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _matches(pattern: str, text: str) -> bool:
    # Python's `$` stands before a line break at the end, too, that of JSON's schemas does not.
    return re.search(re.sub(r"\$$", r"\\Z", pattern), text) is not None


def _list_fault(value: list[Any], schema: Any, root: dict[str, Any], where: str, name: str) -> str:
    if len(value) < schema.get("minItems", 0):
        return f"{name} has too few entries"
    if len(value) > schema.get("maxItems", len(value)):
        return f"{name} has too many entries"
    items = schema.get("items", {})
    found = (fault(item, items, root, f"{where}[{i}]") for i, item in enumerate(value))
    return next(filter(None, found), "")


def _dict_fault(
    value: dict[str, Any], schema: Any, root: dict[str, Any], where: str, name: str
) -> str:
    for key in schema.get("required", ()):
        if key not in value:
            return f"{name} lacks `{key}`"
    for key, needed in schema.get("dependentRequired", {}).items():
        if key in value and not set(needed) <= set(value):
            return f"{name} has `{key}` and lacks one of {needed}"
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    for key, item in value.items():
        found = fault(item, known.get(key, others), root, f"{where}.{key}" if where else key)
        if found:
            return found
    if "if" in schema and not fault(value, schema["if"], root):
        return fault(value, schema["then"], root, where)
    return ""
