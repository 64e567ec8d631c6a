"""The evaluation report: one HTML file, one JSON file, one table for the terminal."""

from recflow.evaluation.report.context import FamilyMember, ItemVectors, ReportContext
from recflow.evaluation.report.document import SCHEMA_VERSION, report_json, schema
from recflow.evaluation.report.page import report_html
from recflow.evaluation.report.table import result_table

__all__ = [
    "SCHEMA_VERSION",
    "FamilyMember",
    "ItemVectors",
    "ReportContext",
    "report_html",
    "report_json",
    "result_table",
    "schema",
]
