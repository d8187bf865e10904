"""`python -m fine_dist.study.report`: put tables and figures of finished studies into documents.

A table goes between the comments `<!-- NAME table: begin -->` and `<!-- NAME table: end -->` of a document; a figure is
written as a PNG.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fine_dist.core.errors import ArtifactError, guard
from fine_dist.core.files import write_atomic
from fine_dist.study.report.posters import POSTERS, save_poster
from fine_dist.study.report.render import brief, markdown, markdown_table
from fine_dist.study.report.results import Results, read_results
from fine_dist.study.report.tables import TABLES


def fill(document: str, name: str, content: str) -> str:
    """A document with what stands between the comments of a table replaced.

    Raises:
        ArtifactError: The document has no such comments.
    """
    begin, end = f"<!-- {name} table: begin -->\n", f"<!-- {name} table: end -->\n"
    head, marker, rest = document.partition(begin)
    if not marker or end not in rest:
        raise ArtifactError(f"there is no place for the {name} table: add the lines {begin.strip()} and {end.strip()}")
    return head + begin + content + end + rest.partition(end)[2]


def content_of(kind: str, results: Results) -> str:
    """One report as Markdown: `all` of it, a `brief` table, or one of `TABLES` with its caption."""
    if kind in ("all", "brief"):
        return (markdown if kind == "all" else brief)(results)
    table = TABLES[kind](results)
    return f"{table.caption}\n\n{markdown_table(table)}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return guard(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fine_dist.study.report", description=__doc__)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="folder of a report (it holds results.json)")
    parser.add_argument("--into", metavar="FILE", type=Path, help="Markdown document that gets the table")
    parser.add_argument("--name", metavar="NAME", help="name in the document's comments")
    parser.add_argument("--table", choices=["all", "brief", *TABLES], default="all", help="which table (default: all)")
    parser.add_argument("--figure", choices=list(POSTERS), help="draw this figure of the first report")
    parser.add_argument("--out", metavar="FILE", type=Path, help="PNG that the figure is written to")
    parser.add_argument("--series", metavar="NAME", nargs="+", help="series of the figure (default: all)")
    options = parser.parse_args(argv)
    if (options.into is None) != (options.name is None) or (options.figure is None) != (options.out is None):
        parser.error("--into goes with --name, and --figure with --out")
    reports = [read_results(folder) for folder in options.folders]
    if options.into:
        content = "\n".join(content_of(options.table, results) for results in reports)
        write_atomic(options.into, fill(options.into.read_text(encoding="utf-8"), options.name, content))
        print(options.into)
    if options.figure:
        print(save_poster(options.figure, reports[0], options.out, options.series))
    return 0


if __name__ == "__main__":
    sys.exit(main())
