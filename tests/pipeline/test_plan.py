"""Plans: order, seeds, weights, commands."""

import pytest

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.pipeline.plan import plan, select_one


def plans(*words):
    return {p.name: p for p in plan(recipe.load(list(words)))}


EVEN = ["stages.long_context.global_batch_size=2", "stages.mid.global_batch_size=2"]


def test_parents_come_before_children():
    for words in (["pipeline=tiny"], ["pipeline=gsm8k", "data=gsm8k_folder", "data_root=x"], ["pipeline=smollm3"]):
        seen = set()
        for name, stage in plans(*words).items():
            assert set(stage.parents) <= seen, name
            seen.add(name)


def test_several_seeds_are_several_plans():
    found = plans("pipeline=tiny", "stages.apo.seeds=[3,5,8]")
    assert [found[f"apo-{seed}"].seed for seed in (3, 5, 8)] == [3, 5, 8]
    assert "apo" in plans("pipeline=tiny", "stages.apo.seeds=[3]")


def test_a_merge_of_a_soup_is_one_pass_over_its_checkpoints():
    found = plans("pipeline=tiny", "stages.apo.seeds=[1,2,3]")
    assert found["soup"].weights == pytest.approx({"apo-1": 1 / 3, "apo-2": 1 / 3, "apo-3": 1 / 3})
    assert found["merge"].weights == pytest.approx({"apo-1": 0.3, "apo-2": 0.3, "apo-3": 0.3, "long_context": 0.1})
    assert found["merge"].base == "apo-1"


def test_training_command_is_what_a_user_would_paste():
    overrides = [
        "pipeline=tiny",
        "accelerate=ddp",
        "accelerate.num_processes=2",
        "stages.base.global_batch_size=2",
        *EVEN,
    ]
    found = plans(*overrides)
    words = [*overrides, "stage=base"]
    prepare, launch, evaluate = found["base"].commands
    assert prepare == ("smolpost", "prepare", *words)
    assert evaluate == ("smolpost", "eval", *words)
    assert launch[:2] == ("accelerate", "launch") and launch[-len(words) :] == tuple(words)
    text = " ".join(launch)
    assert "recipes/accelerate/ddp.yaml --num_processes 2 -m smolpost.train pipeline=tiny" in text


def test_circles_and_many_seeds_are_refused():
    with pytest.raises(UserError, match=r"in a circle: mid -> sft -> mid"):
        plans("pipeline=smollm3", "stages.mid.init_from=sft")
    with pytest.raises(UserError, match=r"has several seeds \(apo-42, apo-43\); soup them in a merge stage first"):
        plans("pipeline=smollm3", "stages.mid.init_from=apo", "stages.sft.init_from=checkpoint")


def test_one_stage_must_be_named():
    all_plans = plan(recipe.load(["pipeline=tiny"]))
    assert select_one(all_plans, "apo-2").seed == 2
    with pytest.raises(UserError, match="no stage given; add stage=NAME, one of: tasks, init"):
        select_one(all_plans, None)
    with pytest.raises(UserError, match="stage=apo has several seeds; choose one of: apo-1, apo-2"):
        select_one(all_plans, "apo")
    with pytest.raises(UserError, match="stage=stf is not a stage of this pipeline; choose one of: tasks, init"):
        select_one(all_plans, "stf")
