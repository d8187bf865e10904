"""The report of a study: what was measured as tables, figures, verdicts and a page."""
