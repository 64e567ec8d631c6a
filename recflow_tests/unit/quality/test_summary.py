import re
from html.parser import HTMLParser

from recflow.quality.contracts import Expectation, Validation
from recflow.quality.summary import summary_html

HOSTILE = "<script>alert('x')</script>"


class Tags(HTMLParser):
    """Collects the tags and attributes of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    return tags


def failing() -> Validation:
    met = Expectation("expect_column_values_to_be_unique", "id", {"column": "id"}, success=True)
    failed = Expectation(
        "expect_column_values_to_be_between",
        "n",
        {"column": "n", "min_value": 0},
        success=False,
        unexpected_count=1234,
        unexpected_percent=12.345,
        examples=[{"source_file": HOSTILE, "source_row": 17, "value": HOSTILE}],
    )
    raised = Expectation(
        "expect_column_values_to_not_be_null", HOSTILE, {"column": HOSTILE}, False, message=HOSTILE
    )
    return Validation("features", 9999, success=False, expectations=(met, failed, raised))


def test_failures_come_first_with_counts_file_and_row() -> None:
    page = parse(summary_html(failing(), title="features/items", partition="2023-05-20"))
    text = re.sub(r"\s+", " ", page.text)
    assert "2 of 3 expectations failed" in text
    assert "9,999 rows" in text
    assert "1,234 rows (12.3 %)" in text
    assert "2023-05-20" in text
    assert text.index("values to be between") < text.index("values to be unique")
    assert re.search(r"17\s*\"<script>", text)


def test_untrusted_text_stays_text() -> None:
    html = summary_html(failing(), title=HOSTILE, partition=HOSTILE)
    assert "<script" not in html
    page = parse(html)
    assert "script" not in page.tags
    assert page.text.count("<script>alert('x')</script>") >= 5


def test_page_needs_nothing_else() -> None:
    html = summary_html(failing(), title="t", partition="")
    page = parse(html)
    assert not {"src", "href", "onload", "onclick"} & set(page.attributes)
    assert not {"link", "img", "iframe", "script"} & set(page.tags)
    assert "http" not in html
    assert "url(" not in html
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_success_says_so_and_is_reproducible() -> None:
    met = Expectation("expect_column_values_to_be_unique", "id", {"column": "id"}, success=True)
    validation = Validation("features", 1, success=True, expectations=(met,))
    html = summary_html(validation, title="t", partition="2023-05-20")
    assert "All expectations were met" in html
    assert html == summary_html(validation, title="t", partition="2023-05-20")
