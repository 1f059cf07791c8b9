"""Every reason to drop a row has a remedy, for the line that says that no row is left."""

import re

from smolpost.synthesis.results import REMEDIES
from tests.small import ROOT

# Literals of the code: the reason of a verdict, or of a prompt that cannot be asked about.
REASON = re.compile(r'Verdict\(False, "([a-z_]+)"|reason = "([a-z_]+)"|^ +return "([a-z_]+)"(?: if .*)?$', re.MULTILINE)


def test_every_reason_has_a_remedy():
    found = {}
    for folder in ("filters", "jobs"):
        for file in (ROOT / "smolpost" / "synthesis" / folder).glob("*.py"):
            found |= {next(filter(None, m)): file.name for m in REASON.findall(file.read_text())}
    assert {"unreadable_verdict", "unanswered", "no_user_turn", "one_turn", "tool_turns"} <= found.keys()
    assert {reason: file for reason, file in found.items() if reason not in REMEDIES} == {}
