"""What the stages share that ask teachers: a resumable run for each teacher, then rows from what they replied."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from smolpost.errors import UserError, Wrong
from smolpost.schema import Recipe
from smolpost.screen import command_line, console
from smolpost.stages.base import Keys, Planned, Replies, Stage, Work, keyed
from smolpost.synthesis.settings import Generation, Teacher

if TYPE_CHECKING:
    from smolpost.synthesis.records import Job, Outcome, Prompt, TeacherEngine
    from smolpost.synthesis.run import RunCounts
    from smolpost.synthesis.status import Prices

# In a folder of replies: what decides them and what the teacher says of itself; how many there are.
RUN, STATUS = "run.json", "status.json"
# What a teacher's config says of its sampling.
SAMPLING = (
    "thinking", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty", "max_new_tokens",
)  # fmt: skip


class GenerationStage(Stage, Generation):
    """A kind that asks teachers. A subclass has a field of type Teacher for each role, and says what its job is.

    Attributes:
        ROLES: Names of those fields. Each role is a run of its own over the same prompts.
        ASKING: Version of the requests: raised when the same settings and prompts lead to other requests than before,
            so that no reply to another request is reused.
        ASKED: Names of the fields, beside teachers, prompts and seed, that decide the requests.
    """

    ROLES: ClassVar[tuple[str, ...]] = ("teacher",)
    ASKING: ClassVar[int] = 1
    ASKED: ClassVar[tuple[str, ...]] = ()

    def job(self, work: Work) -> "Job":
        """What is asked, and what becomes of the replies."""
        raise NotImplementedError

    def teachers(self) -> dict[str, Teacher]:
        return {role: getattr(self, role) for role in self.ROLES}

    def modes(self, role: str) -> set[bool | None]:
        """Values of `Request.thinking` that the role's server is tried with before the run; None: as each row says."""
        return {self.teachers()[role].thinking}

    # ------------------------------------------------------------ inputs and key

    def parents(self):
        return [(f"{role}.stage", teacher.stage) for role, teacher in self.teachers().items() if teacher.stage]

    def mixtures(self):
        return [("prompts", self.prompts)]

    def key_parts(self, keys, stage):
        return {"asked": self.reply_parts(keys, stage)}

    def reply_parts(self, keys: Keys, stage: Planned) -> dict[str, dict[str, Any]]:
        """Their names are those of the recipe, as a run that refuses to go on names what has changed."""
        shared = {
            "kind": self.kind,
            "version of the requests": self.ASKING,
            "prompts": [keys.mixture(keys.recipe.data[name]) for _, name in self.mixtures()],
            **{name: getattr(self, name) for name in (*self.ASKED, "seed")},
        }
        return {role: shared | self._teacher_parts(role, keys) for role in self.ROLES}

    def _teacher_parts(self, role: str, keys: Keys) -> dict[str, Any]:
        from smolpost.chat.render import load_template

        teacher = getattr(self, role)
        parts = {f"{role}.{name}": value for name, value in keyed(teacher).items()}
        if not teacher.stage:
            del parts[f"{role}.template"]  # a server has its own
            return parts
        here = {"template": load_template(teacher.template), "checkpoint": keys.model(teacher.stage)}
        return parts | {f"{role}.{name}": value for name, value in here.items()} | {"today": self.today}

    # ------------------------------------------------------------ checks

    def check(self, key: str, recipe: Recipe, place):
        for role, teacher in self.teachers().items():
            self._check_teacher(f"{key}.{role}", teacher)

    def _check_teacher(self, key: str, teacher: Teacher) -> None:
        if not (teacher.stage or teacher.model):
            raise Wrong(
                key,
                " names no model; choose a file of recipes/teacher, or set its stage (a checkpoint of this pipeline) "
                "or its model and url (a server)",
            )
        if teacher.stage:
            for name in ("model", "revision", "url", "api_key_env"):
                if getattr(teacher, name) is not None:
                    raise Wrong(
                        f"{key}.{name}",
                        f"={getattr(teacher, name)} belongs to a server, and stage={teacher.stage} answers in this "
                        "process; set one of them to null",
                    )
            return
        from smolpost.synthesis.profiles import unsupported

        if faults := unsupported(teacher, key):
            raise faults[0]

    # ------------------------------------------------------------ plan

    def reply_notes(self, replies: Mapping[str, Replies]) -> list[str]:
        teachers = self.teachers()
        return [
            f"{role}: {named(teachers[role])}, {_sampling(teachers[role])}; {_found(found.folder)}"
            for role, found in replies.items()
        ]

    # ------------------------------------------------------------ work

    def make(self, work: Work) -> dict[str, Any]:
        from smolpost.report.show_samples import counts_table, length_lines
        from smolpost.synthesis import results
        from smolpost.synthesis.tally import warnings

        job = self.job(work)
        counts = self._ask_all(job, work, None)
        report = results.write(
            work.folder,
            self._outcomes(job, {role: found.folder for role, found in work.replies.items()}, work.stage.entry),
            facts=self._facts(work),
            max_failed=self.max_failed,
            num_prompts=counts[self.ROLES[0]].prompts * job.rows_per_prompt,
        )
        look = command_line(["smolpost", "inspect", work.place])
        console().print(counts_table(report))
        for line in (
            *length_lines(report["lengths"]),
            *warnings(report["lengths"]),
            *job.lines(),
            f"{work.place}: {report['accepted']:,} rows; `{look}` shows samples, and --html FILE writes a page",
        ):
            print(line, flush=True)
        runs = {role: found._asdict() for role, found in counts.items()}
        return {**report, **job.report(), "runs": runs}

    def _facts(self, work: Work) -> dict[str, Any]:
        """The `smolpost.synthesis.provenance.Facts` of the stage."""
        from smolpost.synthesis.run import teacher_of

        fields = self.keyed_fields()
        teachers = {}
        for role in self.ROLES:
            sampling = fields.pop(role)
            said = teacher_of(work.replies[role].folder)
            teachers[role] = {
                "model": said["model"],
                "revision": said["revision"],
                "server": said["server"],
                "server_version": said["version"],
                "template_hash": said["template"],
                "sampling": {name: sampling[name] for name in SAMPLING},
            }
        return {
            "name": work.stage.name,
            "kind": fields.pop("kind"),
            "key": f"stages.{work.stage.entry}",
            "filters": fields.pop("filters"),
            "job": fields,
            "teachers": teachers,
        }

    def generate(self, work: Work, task: int | None) -> None:
        for role, found in self._ask_all(self.job(work), work, task).items():
            print(f"{role}: {found.done + found.failed:,} of {found.prompts:,} prompts are finished", flush=True)
        print(f"`smolpost make` with the same words makes {work.stage.name} when all are", flush=True)

    def preview(self, work: Work, rows: int) -> None:
        from smolpost.report.preview import RoleRun, show_preview
        from smolpost.synthesis.run import generate

        self._check_start(work.stage.entry)
        job, whole = self.job(work), replace(self, tasks=1, retry_failed=False)
        prompts, number = _first_of_each_source(job.prompts(), rows)
        folders = {role: work.folder / role for role in self.ROLES}
        runs = {}
        for role, folder in folders.items():
            teacher, seconds = self.teachers()[role], [0.0]
            print(f"{role}: {named(teacher)}", flush=True)
            generate(
                folder,
                prompts,
                partial(job.converse, role),
                self.engine(role, work),
                whole,
                fingerprint={},
                concurrency=_concurrency(teacher),
                watch=lambda event, seconds=seconds: seconds.append(event.counts.seconds),
            )
            runs[role] = RoleRun(seconds[-1], _concurrency(teacher), _prices(teacher))
        outcomes = list(self._outcomes(job, folders, work.stage.entry))
        show_preview(outcomes, console(), num_prompts=number, runs=runs)

    def _outcomes(self, job: "Job", folders: Mapping[str, Path], entry: str) -> Iterator["Outcome"]:
        """What becomes of every prompt, in their order.

        Args:
            folders: Role -> of its run.
            entry: Name of the stage in the recipe.
        """
        from smolpost.synthesis.filters.shared import without_near_duplicates

        outcomes = _joined(job, folders)
        if not self.filters.near:
            return outcomes
        return without_near_duplicates(outcomes, self.filters.near, f"stages.{entry}.filters")

    def _ask_all(self, job: "Job", work: Work, task: int | None) -> dict[str, "RunCounts"]:
        """Ask one teacher after the other, so that two checkpoints need the memory of one."""
        self._check_start(work.stage.entry)
        for role, found in work.replies.items():
            _note_older(found.folder, f"{work.stage.name}-{role}")
        number = sum(1 for _ in job.prompts())
        return {role: self._ask_and_show(role, job, work, task, number) for role in self.ROLES}

    def _check_start(self, entry: str) -> None:
        """
        Raises:
            UserError: A filter cannot work, or a server has no address.
        """
        from smolpost.synthesis.filters import check_filters

        check_filters(self.filters, f"stages.{entry}.filters")
        for role, teacher in self.teachers().items():
            if not teacher.stage and not teacher.url:
                key = f"stages.{entry}.{role}.url"
                raise UserError(
                    f"{key} has no value; serve {teacher.model} (`smolpost serve` prints the command) and give the "
                    f"address of its API, such as {key}=http://localhost:8000/v1"
                )

    def _ask_and_show(self, role: str, job: "Job", work: Work, task: int | None, number: int) -> "RunCounts":
        """The run of one role, with what it does in the terminal and in status.json.

        Args:
            number: Of prompts.
        """
        from smolpost.synthesis.run import generate
        from smolpost.synthesis.status import RunStatus

        teacher, (folder, parts) = self.teachers()[role], work.replies[role]
        print(f"{role}: {named(teacher)}; replies: {folder}", flush=True)
        engine = self.engine(role, work)
        with RunStatus(
            f"{work.stage.name}: {role}",
            folder / STATUS if task is None else folder / f"status-{task}.json",
            number,
            prices=_prices(teacher),
            load=None if teacher.stage else lambda: (engine.under_way, engine.width),
        ) as watch:
            counts = generate(
                folder,
                job.prompts(),
                partial(job.converse, role),
                engine,
                self,
                fingerprint=parts,
                concurrency=_concurrency(teacher),
                task=task,
                watch=watch,
            )
            watch.conclude(counts)
        return counts

    def engine(self, role: str, work: Work) -> "TeacherEngine":
        """The teacher, ready to be asked."""
        teacher, key = self.teachers()[role], f"stages.{work.stage.entry}.{role}"
        if not teacher.stage:
            from smolpost.synthesis.client import ChatEngine

            return ChatEngine(teacher, key=key, modes=self.modes(role))
        from smolpost.model.loading import load_for_inference
        from smolpost.synthesis.local import LocalTeacher

        return LocalTeacher(partial(load_for_inference, work.inputs[teacher.stage]), teacher, self.today, key=key)


def named(teacher: Teacher) -> str:
    """The teacher in a few words."""
    if teacher.stage:
        return f"checkpoint of stage {teacher.stage}" if teacher.stage != "checkpoint" else "model.checkpoint"
    return f"{teacher.model} at {teacher.url or '(no url yet)'}"


def _sampling(teacher: Teacher) -> str:
    """Mode and sampling in a few words, those of the defaults too: they decide the replies more than anything else."""
    mode = {True: "think", False: "no_think", None: "in the mode of each row"}[teacher.thinking]
    set_ = {name: getattr(teacher, name) for name in SAMPLING if name != "thinking"}
    return ", ".join([mode, *(f"{name} {value}" for name, value in set_.items() if value is not None)])


def _concurrency(teacher: Teacher) -> int:
    """Requests that the teacher gets at once, at most."""
    return teacher.batch_size if teacher.stage else teacher.concurrency


def _prices(teacher: Teacher) -> "Prices":
    from smolpost.synthesis.status import Prices

    return Prices(teacher.input_price, teacher.output_price)


def _found(folder: Path) -> str:
    """How many replies lie in a folder, in words."""
    from smolpost.synthesis.run_folder import RunFolder

    if not (folder / RUN).is_file():
        return f"no replies yet; they will lie in {folder}"
    run = RunFolder(folder)
    return f"{run.num_finished():,} of {run.num_prompts:,} prompts are finished; replies: {folder}"


def _note_older(folder: Path, name: str) -> None:
    """Say where the replies to other settings lie, which new ones are asked for beside."""
    from smolpost.synthesis.run_folder import REPLIES

    older = sorted({path.parent.parent.name for path in folder.parent.glob(f"{name}-*/{REPLIES}/*.jsonl")})
    if older and not folder.is_dir():
        print(f"teacher, prompts or settings changed, so all prompts are asked again; kept: {', '.join(older)}")


def _joined(job: "Job", folders: Mapping[str, Path]) -> Iterator["Outcome"]:
    """The outcomes of all prompts; the records of all roles are read side by side."""
    from smolpost.synthesis.jobs.prompts import numbered
    from smolpost.synthesis.records import Outcome
    from smolpost.synthesis.run import records

    for found in zip(*(records(folder) for folder in folders.values()), strict=True):
        prompt = found[0][0]
        of_role = dict(zip(folders, (record for _, record in found), strict=True))
        errors = [f"{role}: {record.error}" for role, record in of_role.items() if record.error]
        if errors:
            for part in numbered(prompt, job.rows_per_prompt):
                yield Outcome(part, None, error=errors[0], records=of_role)
        else:
            yield from job.outcomes(prompt, of_role)


def _first_of_each_source(prompts: Iterable["Prompt"], number: int) -> tuple[list["Prompt"], int]:
    """The first prompts, spread evenly over their sources, and how many there are in all."""
    firsts: dict[str, list[Prompt]] = {}
    total = 0
    for prompt in prompts:
        total += 1
        if len(of_source := firsts.setdefault(prompt.source, [])) < number:
            of_source.append(prompt)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*firsts.values()))
    return list(itertools.islice(filter(None, in_turn), number)), total
