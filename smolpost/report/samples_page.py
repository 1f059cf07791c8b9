"""A stage of synthetic data as one HTML page: prompts, replies side by side, verdicts."""

from pathlib import Path

from smolpost.report.html import check_is_ours, write_html
from smolpost.report.samples import Samples
from smolpost.report.show_samples import count_lines, plain


def write_samples_page(
    samples: Samples, file: Path, *, limit: int = 200, source: str | None = None, identity: str | None = None
) -> int:
    """Write the page.

    Args:
        file: Replaced in one step if it is such a page; its folder exists.
        limit, source, identity: As `Samples.choose`.
    Returns:
        Bytes written.
    Raises:
        UserError: As `Samples.choose`, or the file cannot be written or is something else.
    """
    file = Path(file)
    check_is_ours(file)
    found, total = samples.choose(limit, source, identity)
    statuses = [(one.status, one.reason) for one in found]
    return write_html(
        file,
        "samples.html.jinja",
        samples=samples,
        report=samples.report,
        facts=samples.report["facts"],
        lines=count_lines(samples.report),
        shown=found,
        total=total,
        plain=plain,
        sources=list(dict.fromkeys(one.source for one in found)),
        statuses=list(dict.fromkeys(status for status, _ in statuses)),
        reasons=list(dict.fromkeys(reason for _, reason in statuses if reason)),
    )
