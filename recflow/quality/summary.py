"""One validation as a self-contained HTML page.

Great Expectations' own Data Docs load styles and fonts from public networks; a summary that is kept
with its partition has to open years later without one.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING

from recflow.core.columns import Columns
from recflow.quality.contracts import MAX_EXAMPLES, Validation

if TYPE_CHECKING:
    from jinja2 import Template


def summary_html(validation: Validation, *, title: str, partition: str) -> str:
    """Render a validation.

    Args:
        validation: What was found.
        title: Heading, e.g. the asset key.
        partition: Partition key; empty where there is none.

    Returns:
        An HTML page with inline CSS, no script and no reference to another file. Failed
        expectations come first. Every value is escaped: examples are untrusted text.
    """
    return _template().render(
        title=title,
        partition=partition,
        table=validation.table,
        rows=validation.rows,
        success=validation.success,
        failed=len(validation.failed()),
        expectations=sorted(validation.expectations, key=lambda outcome: outcome.success),
        max_examples=MAX_EXAMPLES,
        source_file=Columns.SOURCE_FILE,
        source_row=Columns.SOURCE_ROW,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("recflow.quality"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = _compact_json
    return environment.get_template("summary.html.j2")


def _compact_json(value: object) -> str:
    """JSON for people; escaped by the template like any other text."""
    return json.dumps(value, ensure_ascii=False)
