"""How templates become pages."""

import functools

from jinja2 import Environment, PackageLoader, StrictUndefined


@functools.cache
def page_environment() -> Environment:
    """Autoescaping holds for every template, and no value is ever marked as safe; `tojson` escapes for a script."""
    pages = Environment(
        loader=PackageLoader("lamella.lab.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return pages
