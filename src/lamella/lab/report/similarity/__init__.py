"""The page of a study of expert similarity."""

from lamella.lab.report.similarity.of_study import write_report
from lamella.lab.report.similarity.page import SimilarityReport, render_similarity, write_similarity

__all__ = ["SimilarityReport", "render_similarity", "write_report", "write_similarity"]
