"""The table of published values: it reads the recipe, follows its overrides, and is what docs/recipe.md shows."""

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from smolpost import cli, recipe
from smolpost.errors import UserError
from smolpost.fidelity.published import NOTHING, ROWS
from smolpost.fidelity.show import rewrite, terminal
from smolpost.fidelity.table import roles, sections

ROOT = Path(__file__).parent.parent.parent


def table(*words):
    """Stage -> key -> its line; and what changed from smollm3."""
    found = sections(recipe.load(list(words)).recipe)
    return {s.stage: {line.key: line for line in s.lines} for s in found}, {s.stage: s.changed for s in found}


def said(line):
    return [(cell.text, cell.differs) for cell in line.said]


def test_the_page_has_the_table_of_the_recipe(tmp_path):
    page, copy = ROOT / "docs" / "recipe.md", tmp_path / "recipe.md"
    copy.write_text(page.read_text())
    rewrite(copy, sections(recipe.load(["pipeline=smollm3"]).recipe))
    assert copy.read_text() == page.read_text(), "run: python -m smolpost.fidelity docs/recipe.md"
    copy.write_text("no table here")
    with pytest.raises(UserError, match="has no line `<!-- the table of smollm3 -->`"):
        rewrite(copy, [])


def test_smollm3_has_what_the_handbook_states_and_else_what_the_blog_says():
    lines, changed = table("pipeline=smollm3")
    assert [*lines] == ["mid", "sft", "apo", "soup", "merge"] and not any(changed.values())
    stages, apart = {"preference": "apo"}, set()
    for row in ROWS:
        for role in row.roles:
            stage = stages.get(role, role)
            blog, handbook, _ = lines[stage][row.key].said
            explicit = row.handbook.value is not NOTHING and not row.handbook.unset
            if handbook.differs if explicit else blog.differs:
                apart.add((stage, row.key))
            if handbook.differs or blog.differs:
                assert row.why, (stage, row.key)
    assert apart == {("sft", "template"), ("apo", "seeds")}  # ours has less faults; a soup needs several


def test_values_of_the_three_sources_by_hand():
    lines, _ = table("pipeline=smollm3")
    assert said(lines["mid"]["num_epochs"]) == [("4, about 140B tokens", True), ("5", False), ("5", False)]
    assert said(lines["mid"]["weight_decay"])[:2] == [("not said (pretraining: 0.1)", False), ("not set: 0", False)]
    assert said(lines["sft"]["learning_rate"])[1:] == [
        ("2e-5", False),
        ("1e-5 to compare; packed: 3e-6 best of 5", True),
    ]
    assert lines["sft"]["data.weights"].ours == "25 sets: 20 x 1, 2 x 0.5, 1 x 0.4, 1 x 0.3, 1 x 0.02"
    assert lines["apo"]["seeds"].ours == "42, 43" and lines["mid"]["rope_theta"].ours == "null"
    assert lines["soup"]["weights"].ours == "equal" and lines["merge"]["weights"].ours == "0.9, 0.1"
    assert lines["merge"]["added"].ours == "HuggingFaceTB/SmolLM3-3B-Base"


def test_ours_follows_the_pipeline():
    weight = "data.preference.sources.llama_3_1_tulu_3_8b_preference_mixture_no_think.weight"
    lines, changed = table("pipeline=smollm3", "stages.apo.beta=0.1", f"{weight}=0.25", "stages.soup.dtype=float32")
    beta = lines["apo"]["beta"]
    assert beta.ours == "0.1" and [cell.differs for cell in beta.said] == [False, True, True] and not beta.why
    assert changed["apo"] == ("data.weights 2 sets: 1 x 0.5, 1 x 0.25 -> 2 sets: 2 x 0.25", "beta 0.05 -> 0.1")
    assert changed["soup"] == ("dtype bfloat16 -> float32",) and changed["mid"] == ()
    assert lines["apo"]["data.weights"].said[1].differs


def test_ablated_changes_what_the_ablations_found_and_nothing_else(capsys):
    _, changed = table("pipeline=smollm3_ablated")
    assert {stage: found for stage, found in changed.items() if found} == {
        "sft": ("learning_rate 2e-5 -> 3e-6", "global_batch_size 128 -> 16"),
        "apo": (
            "data.weights 2 sets: 1 x 0.5, 1 x 0.25 -> 2 sets: 1 x 0.25, 1 x 0.125",
            "beta 0.05 -> 0.1",
            "learning_rate 1e-6 -> 1e-7",
        ),
    }
    published = recipe.load(["pipeline=smollm3"]).recipe
    ablated = recipe.load(["pipeline=smollm3_ablated"]).recipe
    ablated.note, ablated.pipeline = published.note, published.pipeline
    ablated.stages["sft"].learning_rate, ablated.stages["sft"].global_batch_size = 2e-5, 128
    ablated.stages["apo"].learning_rate, ablated.stages["apo"].beta = 1e-6, 0.05
    for source in ablated.data["preference"].sources.values():
        source.weight *= 2
    assert ablated == published
    with pytest.raises(SystemExit):
        cli.main(["plan", "pipeline=smollm3_ablated"])
    assert "they were never run together" in capsys.readouterr().out.splitlines()[1]


def test_stages_are_matched_by_what_they_are(tmp_path):
    assert roles(recipe.load(["pipeline=tiny"]).recipe) == {
        "mid": "mid", "sft": "sft", "preference": "apo", "soup": "soup", "merge": "merge",
    }  # fmt: skip
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "# @package _global_\ndefaults:\n  - /model: smollm3_3b\n  - /data: smoltalk2\n  - /accelerate: single\n"
        "  - /stage@stages.talk: sft\n  - /stage@stages.like: apo\n  - _self_\n"
        "stages: {talk: {init_from: checkpoint}, like: {init_from: talk}}\n"
    )
    assert roles(recipe.load([f"pipeline={mine}"]).recipe) == {"sft": "talk", "preference": "like"}
    assert roles(recipe.load([f"pipeline={mine}", "~stages.like"]).recipe) == {"sft": "talk"}


def test_a_pipeline_with_nothing_to_compare_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "pipeline=tiny", "stage=init", "--fidelity"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "smolpost: --fidelity has nothing to compare: init of pipeline tiny is not in the published recipe; it "
        "compares mid-training and SFT (kind sft), preference training (apo) and merges (merge)\n"
    )


@pytest.mark.parametrize("width", [120, 80, 60])
def test_the_table_fits_the_terminal(width):
    found = sections(recipe.load(["pipeline=smollm3"]).recipe)
    out = StringIO()
    console = Console(file=out, width=width, markup=False, highlight=False)
    for part in terminal(found):
        console.print(part)
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    letters = "".join(text.split())  # cells are folded, never cut
    for line in (line for section in found for line in section.lines):
        assert not line.why or "".join(line.why.split()) in letters
    if width == 120:
        assert "!= 4, about 8B tokens" in text and "0.1, not 45.4" not in text


def test_planning_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from smolpost import cli\n"
        "try: cli.main(['plan', 'pipeline=smollm3', '--fidelity'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
