"""A report on a finished run: one HTML file that opens offline, and the same as Markdown."""

from fd_jax.report.writing import summary, track, write_report

__all__ = ["summary", "track", "write_report"]
