"""`python -m jobs.report EVALUATION... --output report.html`: evaluations as one page. Evaluations
of the same images stand side by side; those that share a title are seeds of one method, shown by
their mean, lowest and highest. Reads their files, and the shards for pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import cli
from jobs.report import tables
from jobs.report.compare import Entry, compare, entries_of
from pipeline import storage
from pipeline.errors import UserError
from pipeline.evaluation.results import read_evaluation

if TYPE_CHECKING:
    from jobs.report.pictures import Picture


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The evaluations and what they are called."""

    evaluation: tuple[str, ...] = cli.option(
        help="folders or URIs that jobs.evaluate wrote, of the same images", positional=True
    )
    titles: tuple[str, ...] = cli.option(
        (),
        help="what each evaluation is called, as many as there are (default: its folder); those of "
        "one title are seeds of one method, shown by their mean, lowest and highest",
    )
    output: str = cli.option(help="the HTML file to write, or its URI")

    def __post_init__(self) -> None:
        if len({storage.absolute(folder) for folder in self.evaluation}) < len(self.evaluation):
            raise ValueError("one evaluation is given twice; give each once")
        if self.titles and len(self.titles) != len(self.evaluation):
            raise ValueError(f"--titles: {len(self.titles)}; give {len(self.evaluation)}, one each")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page of the command line's evaluations."""
    config = cli.parse(ReportConfig, argv, __doc__ or "")
    if not storage.is_remote(config.output) and storage.local_path(config.output).is_dir():
        raise UserError(f"--output {config.output} is a folder; name the HTML file to write.")
    evaluations = [read_evaluation(folder) for folder in config.evaluation]
    entries = entries_of(evaluations, config.titles or config.evaluation)
    pictures, reason = find_pictures(entries)
    page = render(entries, pictures, reason)
    storage.make_folder(storage.parent(config.output))
    storage.write_atomically(config.output, page.encode())
    print(f"report: {config.output}")


def find_pictures(entries: Sequence[Entry]) -> "tuple[dict[str, list[Picture]], str]":
    """Return the pictures by group, or none and why."""
    evaluations = [evaluation for entry in entries for evaluation in entry.evaluations]
    if all(evaluation.metrics["data"] is None for evaluation in evaluations):
        return {}, "boxes or score maps were evaluated without shards"
    # Not at the top: reading shards needs packages that the page of a file of boxes does without.
    from jobs.report.pictures import report_pictures

    try:
        return report_pictures(entries, evaluations[0].metrics["seed"]), ""
    except UserError as error:
        return {}, str(error)


def render(entries: Sequence[Entry], pictures: "dict[str, list[Picture]]", reason: str) -> str:
    """Return the page: HTML that needs no other file and no script. pictures: by group, see
    `report_pictures`; reason: why there are none."""
    import jinja2  # here, as what follows: the flags are read in half the time

    from jobs.report.charts import iou_charts

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": tables.percent,
        "number": tables.number,
        "points": tables.points,
        "thousands": "{:,.0f}".format,
    }
    metrics = entries[0].evaluations[0].metrics
    lines = tables.page_lines(entries)
    return environment.get_template("report.html.j2").render(
        m=metrics,
        entries=entries,
        several=len(entries) > 1,
        seeds=any(len(entry.evaluations) > 1 for entry in entries),
        evaluations=[evaluation for entry in entries for evaluation in entry.evaluations],
        lines=lines,
        groups=tables.groups(lines, entries),
        mains=[line for line in lines if line.own],
        columns=tables.shown_figures(lines),
        pairs=[(x, compare(entries[0], x, metrics["seed"])) for x in entries[1:]],
        iou_charts=iou_charts(lines),
        tables=tables,
        pictures=pictures,
        reason=reason,
    )


if __name__ == "__main__":
    cli.run(main)
