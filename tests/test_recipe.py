"""Every pipeline composes; every wrong word is one line that names the full key and what would do."""

import copy
import dataclasses
import itertools
import re
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from smolpost import recipe, schema
from smolpost.data.tasks import TaskFile
from smolpost.errors import UserError
from smolpost.evaluation.tasks.perplexity import PerplexityTask
from smolpost.evaluation.tasks.reasoning import ReasoningTask
from smolpost.evaluation.tasks.recall import RecallTask
from smolpost.recipe import checks, request
from smolpost.recipe.written import Written
from smolpost.registry import STAGE_KINDS
from smolpost.stages.init import InitStage
from smolpost.stages.merge import MergeStage
from smolpost.stages.pairs import PairsStage
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.stages.sweep import SweepStage
from smolpost.stages.tasks import TasksStage
from smolpost.training.settings import LoRA

ROOT = Path(__file__).parent.parent
TINY = "pipeline=tiny"


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as error:
        recipe.load(list(words))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_published_values_of_the_recipe():
    """FACTS section 1: the handbook's and the blog's numbers, stage by stage."""
    stages = recipe.load(["pipeline=smollm3"]).recipe.stages
    mid, sft, apo = stages["mid"], stages["sft"], stages["apo"]
    assert (mid.template, mid.packing, mid.num_epochs, mid.max_seq_len) == ("chatml", "wrapped", 5, 32768)
    assert (sft.template, sft.packing, sft.num_epochs, sft.max_seq_len) == ("smollm3", "bfd", 5, 65536)
    for stage in (mid, sft):
        assert (stage.learning_rate, stage.warmup_ratio, stage.global_batch_size) == (2e-5, 0.03, 128)
    assert (apo.loss, apo.beta, apo.learning_rate, apo.warmup_ratio) == ("apo_zero", 0.05, 1e-6, 0.1)
    assert (apo.num_epochs, apo.max_seq_len, apo.global_batch_size) == (1, 24576, 32)
    for stage in (mid, sft, apo):
        assert (stage.min_lr_ratio, stage.max_grad_norm, stage.adam_beta1, stage.adam_beta2) == (0.1, 0.2, 0.9, 0.999)
        assert stage.weight_decay == 0
    assert stages["merge"].inputs == {"soup": 0.9, "checkpoint": 0.1}


def test_published_mixture_weights():
    data = recipe.load(["pipeline=smollm3"]).recipe.data
    assert len(data["sft"].sources) == 25
    weights = {s.split.partition("[")[0]: s.weight for s in data["sft"].sources.values() if s.weight != 1}
    assert weights == {
        "smoltalk_smollm3_smol_magpie_ultra_no_think": 0.5,
        "OpenHermes_2.5_no_think": 0.5,
        "OpenThoughts3_1.2M_no_think_no_think": 0.4,
        "smoltalk_multilingual8_Qwen3_32B_think": 0.3,
        "OpenThoughts3_1.2M_think": 0.02,
    }
    assert [s.weight for s in data["preference"].sources.values()] == [0.5, 0.25]


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "pipeline").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_pipeline_composes(file):
    request = recipe.load([f"pipeline={file.stem}"])
    # tiny_distill adds stages to the miniature and finds the others where `pipeline=tiny` left them.
    assert request.recipe.pipeline == {"tiny_distill": "tiny"}.get(file.stem, file.stem)
    assert all(type(s) is STAGE_KINDS[s.kind] for s in request.recipe.stages.values())


def test_stage_is_a_choice_not_a_setting():
    request = recipe.load([TINY, "stage=sft", "stages.sft.learning_rate=1e-3"])
    assert request.stage == "sft"
    assert request.overrides == (TINY, "stages.sft.learning_rate=1e-3")
    assert request.recipe.stages["sft"].learning_rate == 1e-3


def test_a_loss_takes_its_own_settings():
    words = [TINY, "stages.apo.loss=robust", "+stages.apo.loss_settings={label_smoothing: 0.1}"]
    assert recipe.load(words).recipe.stages["apo"].loss_settings == {"label_smoothing": 0.1}


def test_accelerate_values_become_launcher_flags():
    request = recipe.load([TINY, "accelerate=ddp", "accelerate.num_processes=2"])
    assert (request.accelerate.stem, request.launch_flags) == ("ddp", {"num_processes": 2})


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["pipeline=smollm4"],
            "pipeline=smollm4 does not exist; did you mean smollm3? choose one of: gsm8k, smollm3, smollm3_ablated, "
            "smollm3_data, smollm3_from_release, teachers, tiny, tiny_distill",
        ),
        (["model=huge"], "model=huge does not exist; choose one of: small, smollm3_3b, tiny"),
        (["accelerate=x"], "accelerate=x does not exist; choose one of: ddp, fsdp2, single, zero2, zero3"),
        (
            ["stages.sft.lerning_rate=1"],
            "stages.sft.lerning_rate is not a key of the recipe; did you mean stages.sft.learning_rate?",
        ),
        (["+stages.sft.foo=1"], "stages.sft.foo is not a key of the recipe"),
        (
            ["stages.stf.beta=1"],
            "stages.stf is not a key of the recipe; did you mean stages.sft? keys of stages: apo, base",
        ),
        (["nonsense=1"], "nonsense is not a key of the recipe; keys: accelerate, data,"),
        (
            ["stages.sft.learning_rate=fast"],
            "stages.sft.learning_rate=fast is not a number",
        ),
        (
            ["model.architecture.hidden_size=1.5"],
            "model.architecture.hidden_size=1.5 is not a whole number",
        ),
        (["stages.sft.packing=ffd"], "stages.sft.packing=ffd is not a choice; choose one of: bfd, wrapped, none"),
        (["stages.apo.loss=dpo"], "stages.apo.loss=dpo is not a choice; choose one of: apo_zero, apo_down, sigmoid"),
        (
            ["stages.apo.overlong=split"],
            "stages.apo.overlong=split cannot be done to a pair; choose one of: refuse, truncate, drop",
        ),
        (
            ["stages.apo.loss=robust", "+stages.apo.loss_settings.label_smoothing=0.5"],
            "stages.apo.loss_settings.label_smoothing=0.5 is outside [0, 0.5)",
        ),
        (
            ["stages.apo.loss=robust", "+stages.apo.loss_settings.label_smoothing=half"],
            "stages.apo.loss_settings.label_smoothing=half is not a number",
        ),
        (
            ["stages.apo.loss=robust", "+stages.apo.loss_settings.smoothing=0.1"],
            "stages.apo.loss_settings.smoothing is not a setting of loss=robust; did you mean label_smoothing? "
            "settings: label_smoothing; leave it out with ~stages.apo.loss_settings.smoothing",
        ),
        (
            ["+stages.apo.loss_settings.label_smoothing=0.1"],
            "stages.apo.loss_settings.label_smoothing is not a setting of loss=apo_zero; settings: (none); leave",
        ),
        (["stages.apo.beta=0"], "stages.apo.beta=0 must be above 0"),
        (["stages.sft.warmup_ratio=3"], "stages.sft.warmup_ratio=3 is outside [0, 1)"),
        (["stages.sft.save_total_limit=1"], "stages.sft.save_total_limit=1 is below 2, its least value"),
        (["stages.apo.seeds=[1,1]"], "stages.apo.seeds=[1, 1] has a value twice; name each once"),
        (
            ["stages.sft.data=stf"],
            "stages.sft.data=stf is not a mixture under data; did you mean sft?",
        ),
        (["stages.sft.init_from=mad"], "stages.sft.init_from=mad is not a stage of this pipeline; did you mean mid?"),
        (["stages.sft.init_from=checkpoint"], "stages.sft.init_from=checkpoint, but model.checkpoint has no value"),
        (
            ["stages.merge.inputs.long_context=0.3"],
            "stages.merge.inputs sum to 1.2, and weights of a linear merge sum to 1: soup 0.9 "
            "(recipes/stage/merge.yaml), long_context 0.3 (the command line); change one as "
            "stages.merge.inputs.long_context=WEIGHT, or leave it out with ~stages.merge.inputs.long_context",
        ),
        (
            ["stages.sft.kind=ppo"],
            "stages.sft.kind=ppo is not a stage kind; choose one of: tasks, practice, gsm8k, init, released, sft",
        ),
        (["stages.sft.max_seq_len"], "cannot read the argument 'stages.sft.max_seq_len'; write key=value"),
        (
            ["data_root=a=b"],
            "cannot read the argument 'data_root=a=b'; write key=value, and quote values that hold = or ,",
        ),
    ],
)
def test_wrong_words_are_refused_in_one_line(words, text):
    assert refusal(TINY, *words).startswith(text)


def test_a_data_file_needs_its_root():
    assert refusal("pipeline=gsm8k", "data=gsm8k_folder").startswith(
        "data_root has no value and data.mid.sources.gsm8k.path is named under it"
    )


def test_a_root_that_no_data_file_is_named_under_is_refused():
    """The pipeline once read the files under it; its rows now come from the public file."""
    assert refusal("pipeline=gsm8k", "data_root=rows") == (
        "data_root=rows, but no file of this recipe is named under it; leave it out, or choose the data that is: "
        "data=gsm8k_folder"
    )
    assert recipe.load(["pipeline=gsm8k", "data=gsm8k_folder", "data_root=rows"]).recipe.data_root == "rows"


# ---------------------------------------------------------------- names of the user's own


MINE = [
    ["+data.mine={sources:{a:{path:x.jsonl,weight:2},b:{path:'y z.jsonl'}},seed:3}"],
    ["+data.mine.sources.a.path=x.jsonl", "+data.mine.sources.a.weight=2", "+data.mine.sources.b.path='y z.jsonl'",
     "+data.mine.seed=3"],
    ["+data.mine.sources.a.path=x.jsonl", "data.mine.sources.a.weight=2", "++data.mine.sources.b={path:'y z.jsonl'}",
     "data.mine.seed=3"],
]  # fmt: skip


@pytest.mark.parametrize("words", MINE, ids=["one word", "a word for each value", "with and without plus"])
def test_a_mixture_from_the_command_line_is_one_from_a_file(words):
    found = recipe.load([TINY, *words, "stages.sft.data=mine"]).recipe
    a, b = schema.Source(path="x.jsonl", weight=2.0), schema.Source(path="y z.jsonl")
    assert found.data["mine"] == schema.Mixture(sources={"a": a, "b": b}, seed=3)
    others = recipe.load([TINY]).recipe.data
    assert {name: rows for name, rows in found.data.items() if name != "mine"} == others


def test_a_source_is_added_to_a_mixture():
    before = recipe.load([TINY]).recipe.data["sft"]
    found = recipe.load([TINY, "+data.sft.sources.more.path=${run_dir}/x.jsonl"]).recipe.data["sft"]
    assert list(found.sources) == [*before.sources, "more"]
    assert found.sources["more"] == schema.Source(path="runs/x.jsonl")


def test_a_stage_and_a_task_from_the_command_line():
    more = ["+stages.more={kind:sft,init_from:sft,data:sft}", "stages.more.lora.r=4", "+stages.more.max_seq_len=64"]
    more += ["stages.more.learning_rate=1e-3", "stages.more.global_batch_size=8"]
    found = recipe.load([TINY, *more, "+evaluation.tasks.loss={kind:perplexity,data:sft}"]).recipe
    assert found.stages["more"] == SFTStage(
        init_from="sft", data="sft", max_seq_len=64, learning_rate=1e-3, global_batch_size=8, lora=LoRA(r=4)
    )
    assert found.evaluation.tasks["loss"] == PerplexityTask(data="sft")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["+data.mine={sources:{a:{pth:x}}}"],
            "data.mine.sources.a.pth is not a key of the recipe; did you mean data.mine.sources.a.path? keys of",
        ),
        (["+data.mine.sources.a.pth=x"], "data.mine.sources.a.pth is not a key of the recipe; did you mean"),
        (["+data.mine={sorces:{}}"], "data.mine.sorces is not a key of the recipe; did you mean data.mine.sources?"),
        (
            ["+data.mine.sources.a={path:x,weight:lots}"],
            "data.mine.sources.a.weight=lots is not a number",
        ),
        (["+data.mine.sources.a={path:x,weight:0}"], "data.mine.sources.a.weight=0 must be above 0"),
        (["+data.mine.sources.a={path:x,columns:csv}"], "data.mine.sources.a.columns=csv is not a choice; choose"),
        (["+data.mine.sources.a.seed=1"], "data.mine.sources.a.seed is not a key of the recipe"),
        (
            ["+data.mine.sources.a={path: a.jsonl, mode_from_reply: true, enable_thinking: false}"],
            "data.mine.sources.a.mode_from_reply=true stands in place of enable_thinking=false; leave one of them out",
        ),
        (["+data.mine.seed=1"], "data.mine has no sources; add one: +data.mine.sources.NAME.path=FILE"),
        (["+data.mine.sources.a.weight=1"], "data.mine.sources.a.path has no value; give it as"),
        (["+data.mine=x.jsonl"], "data.mine=x.jsonl has no fields; give them, as 'data.mine={FIELD: VALUE}'"),
        (["data.mine.sources.a.path=x"], "data.mine is not a key of the recipe; "),
        (["+stages.more={kind:sft,lora:{rank:4}}"], "stages.more.lora.rank is not a key of the recipe; keys of"),
        (["+stages.more={data:sft}"], "stages.more has no kind; a new stage states it, `kind: KIND` in its file"),
        (["+stages.more={kind:sft}"], "stages.more.data has no value; give it as stages.more.data=VALUE"),
        (["+evaluation.tasks.loss={kind:perplexity,date:sft}"], "evaluation.tasks.loss.date is not a key of the"),
        (["+nonsense=1"], "nonsense is not a key of the recipe; keys: accelerate, data,"),
        (["+model.nonsense=1"], "model.nonsense is not a key of the recipe; keys of model: architecture,"),
        (["+stages.sft.lora.nonsense=1"], "stages.sft.lora.nonsense is not a key of the recipe; keys of"),
    ],
)  # fmt: skip
def test_what_is_added_is_checked_like_a_file(words, text):
    assert refusal(TINY, *words).startswith(text)


def test_the_remedy_for_an_unknown_mixture_works():
    line = refusal(TINY, "data.mine.sources.a.path=x")
    assert line.endswith("; +data.mine=VALUE adds one")
    assert "mine" in recipe.load([TINY, "+data.mine={sources:{a:{path:x}}}"]).recipe.data


@pytest.mark.parametrize(
    "value", ["a=b", "/my [odd] folder", "a,b", "/tmp/Läufe", "it's", "a,$HOME", "tick`s`,", 'a"b', "b,\\"]
)
def test_the_remedy_for_a_word_that_cannot_be_read_works(value):
    remedy = refusal(TINY, f"run_dir={value}").partition("for the shell: ")[2]
    word = subprocess.run(["bash", "-c", f"printf %s {remedy}"], capture_output=True, text=True, check=True).stdout
    assert recipe.load([TINY, word]).recipe.run_dir == value


@pytest.mark.parametrize(
    ("word", "fixed"),
    [
        ("stages.sft.seeds=42", ["stages.sft.seeds=[42]"]),
        ("+data.mine=x.jsonl", ["data.mine={FIELD: VALUE}"]),
        ("stages.merge.inputs=soup", ["stages.merge.inputs={NAME: VALUE}"]),
    ],
)
def test_an_example_with_brackets_is_quoted_for_the_shell(word, fixed):
    assert shlex.split(refusal(TINY, word))[-1:] == fixed


def test_spaces_need_no_quotes_beyond_the_shell_s():
    assert recipe.load([TINY, "run_dir=/tmp/my runs"]).recipe.run_dir == "/tmp/my runs"


# ---------------------------------------------------------------- values that nobody can mean


def floats(kind: type, prefix: str) -> list[tuple[str, str]]:
    """(key, field) of every number of a dataclass and of those in it."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found += floats(hint, f"{prefix}{name}.")
        elif hint in (float, float | None):
            found.append(f"{prefix}{name}")
    return found


NUMBERS = [
    *floats(SFTStage, "stages.sft."), *floats(APOStage, "stages.apo."),
    *floats(PairsStage, "stages.pairs."), *floats(SweepStage, "stages.sweep."),
    *floats(MergeStage, "stages.merge."), *floats(schema.Source, "data.sft.sources.tasks."),
    *floats(schema.Hygiene, "data.sft.hygiene."), *floats(schema.Architecture, "model.architecture."),
    *floats(ReasoningTask, "evaluation.tasks.answer."), *floats(schema.Harness, "harness."),
    "stages.merge.inputs.soup", "stages.tasks.files.base.replay",
]  # fmt: skip


def test_no_number_is_nan_or_infinite(monkeypatch):
    """Every float of the schema, in one recipe each; the files are composed once."""
    composed = request.compose_recipe([TINY], request.Places((), None))
    for key, value in zip(NUMBERS, itertools.cycle(("nan", "inf", "-inf")), strict=False):
        node = copy.deepcopy(composed.config)
        OmegaConf.update(node, key, float(value))
        with pytest.raises(UserError, match=f"{re.escape(key)}={value} is not a finite number$"):
            request._checked(composed._replace(config=node))
    assert len(NUMBERS) > 50


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("stages.sft.learning_rate=0", "must be above 0"),
        ("stages.sft.learning_rate=-1", "must be above 0"),
        ("stages.sft.lora.r=-1", "is below 0, its least value"),
        ("stages.sft.seeds=[-1]", "=-1 is outside [0, 4294967295]"),
        ("stages.sft.seeds=[]", "=[] is empty; name one at least"),
        ("stages.sft.seeds=[1,1]", "=[1, 1] has a value twice; name each once"),
        ("stages.sft.train_roles=[]", "=[] is empty; name one at least"),
        ("stages.sft.max_dropped=1.5", "is outside [0, 1]"),
        ("stages.sft.weight_decay=-0.1", "is below 0, its least value"),
        ("stages.sft.num_workers=0", "is below 1, its least value"),
        ("stages.pairs.chosen.batch_size=0", "is below 1, its least value"),
        ("stages.pairs.chosen.temperature=-1", "is below 0, its least value"),
        ("stages.pairs.chosen.top_p=1.5", "is outside (0, 1]"),
        ("stages.pairs.chosen.top_p=0", "is outside (0, 1]"),
        ("stages.sweep.weights=[0.1,1.1]", "=1.1 is outside [0, 1]"),
        ("stages.tasks.files.base.blocks.copy.rows=0", "is below 1, its least value"),
        ("stages.tasks.files.base.replay=1", "is outside [0, 1)"),
        ("data.sft.sources.tasks.max_rows=-5", "is below 1, its least value"),
        ("data.sft.sources.tasks.max_rows=0", "is below 1, its least value"),
        ("data.sft.sources.tasks.first_row=-1", "is below 0, its least value"),
        ("data.sft.sources.tasks.weight=-1", "must be above 0"),
        ("data.sft.sources.tasks.share=2", "is outside (0, 1]"),
        ("data.sft.seed=-1", "is outside [0, 4294967295]"),
        ("model.architecture.num_hidden_layers=0", "is below 1, its least value"),
        ("evaluation.tasks.answer.pass_at=[0]", "=0 is below 1, its least value"),
        ("evaluation.tasks.answer.pass_at=[]", "=[] is empty; name one at least"),
        ("evaluation.tasks.answer.modes=[]", "=[] is empty; name one at least"),
        ("evaluation.tasks.recall.lengths=[]", "=[] is empty; name one at least"),
        ("evaluation.tasks.recall.lengths=[0]", "=0 is below 1, its least value"),
        ("evaluation.tasks.loss.max_rows=0", "is below 1, its least value"),
        (
            "evaluation.tasks.pairs.stages=[init]",
            "=init is not a stage of this pipeline with a model; choose one of: base,",
        ),
        ("evaluation.batch_tokens=0", "is below 1, its least value"),
        ("harness.limit=0", "is below 1, its least value"),
        ("accelerate.num_processes=0", "=0 is not a whole number above 0; write 1 or more"),
        ("accelerate.num_processes=two", "='two' is not a whole number above 0; write 1 or more"),
        ("seed=-1", "is outside [0, 4294967295]"),
        ("+foo=1", "foo is not a key of the recipe; keys: accelerate, data, data_root"),
        ("++foo=1", "foo is not a key of the recipe; keys: accelerate, data, data_root"),
        ("~foo", "foo is not a key of the recipe; keys: accelerate, data"),
        ("~stages.swep", "stages.swep is not a key of the recipe; did you mean stages.sweep? keys of stages: apo,"),
        ("+evaluation.foo=1", "evaluation.foo is not a key of the recipe; keys of evaluation: batch_tokens,"),
        ("+evaluation.tasks.answer.foo=1", "evaluation.tasks.answer.foo is not a key of the recipe; keys of"),
        ("+harness.foo=1", "harness.foo is not a key of the recipe; keys of harness: apply_chat_template,"),
        ("++model.architecture.foo=1", "model.architecture.foo is not a key of the recipe; keys of"),
        ("+stages.tasks.files.base.blocks.copy.foo=1", "foo is not a key of the recipe; keys of stages.tasks.files"),
        (
            "+data.sft.hygiene.foo=1",
            "data.sft.hygiene.foo is not a key of the recipe; keys of data.sft.hygiene: against,",
        ),
        ("hydra.run.dir=x", "hydra.run.dir=x: Hydra's own settings have no part in a recipe; leave it out"),
        ("hydra.searchpath=[x]", "Hydra's own settings have no part in a recipe; --recipes FOLDER names a folder of"),
        (
            "pipeline=../../x",
            "pipeline=../../x does not exist; choose one of: gsm8k, smollm3, smollm3_ablated, smollm3_data, "
            "smollm3_from_release, teachers, tiny, tiny_distill",
        ),
        ("'stages.sft.today=${nothing}'", "stages.sft.today=${nothing}: nothing is not a key of the recipe; name a"),
    ],
)
def test_a_value_that_nobody_can_mean(word, text):
    assert text in refusal(TINY, shlex.split(word)[0])


@pytest.mark.parametrize("name", ["..", "../x", "a/b", ".hidden", "a b", "-x", ""])
def test_no_name_leads_out_of_run_dir(name):
    source = schema.Source(path="x.jsonl")
    plain = schema.Recipe(pipeline="p", data={"d": schema.Mixture(sources={"s": source})}, stages={}, data_root=None)
    checks.check(plain, Written())
    for change in (
        {"pipeline": name},
        {"data": {name: plain.data["d"]}},
        {"data": {"d": schema.Mixture(sources={name: source})}},
        {"stages": {name: InitStage()}},
        {"stages": {"tasks": TasksStage(files={name: TaskFile()})}},
        {"evaluation": schema.Evaluation(tasks={name: RecallTask()})},
    ):
        with pytest.raises(UserError, match=f"{re.escape(name)}, which becomes a folder or file; use letters"):
            checks.check(dataclasses.replace(plain, **change), Written())


def test_evaluation_none_measures_nothing_where_the_pipeline_sets_tasks():
    assert "leave the stage out with ~stages.sweep" in refusal(TINY, "evaluation=none")
    words = [TINY, "evaluation=none", "~stages.sweep"]
    assert recipe.load(words).recipe.evaluation.tasks == {}
    more = recipe.load([*words, "+evaluation.tasks.loss={kind:perplexity,data:sft}"]).recipe.evaluation.tasks
    assert more == {"loss": PerplexityTask(data="sft")}
