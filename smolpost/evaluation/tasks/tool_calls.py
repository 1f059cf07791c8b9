"""Berkeley's function-calling questions, asked for calls as JSON and as Python."""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from smolpost.chat.answers import opens_thinking, parts_of
from smolpost.chat.masks import encode_prompt
from smolpost.data.prompts import named
from smolpost.data.rows import Row, kind_of
from smolpost.data.sources import read_rows
from smolpost.data.tools import json_schema_tool
from smolpost.errors import UserError
from smolpost.evaluation.bfcl_match import TYPES, mismatch
from smolpost.evaluation.parse_calls import TAGS, Call, read_calls
from smolpost.evaluation.task import (
    Context,
    EvaluationTask,
    Item,
    Measurement,
    Sample,
    check_choices,
    check_counts,
    greedy_replies,
    measures,
)
from smolpost.inference.engine import Engine, Reply
from smolpost.schema import MISSING, Source, count, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VARIABLES = {"xml": "xml_tools", "python": "python_tools"}  # of the template
SHARES = ("parsed", "name", "cut")


class ToolCallsPrompt(NamedTuple):
    """A row in one style.

    Attributes:
        row: Its id.
        category: Its id without the number; "" where all rows have the same.
        style: xml or python.
        messages: What is asked.
        functions: Name -> document.
        expected: (name, accepted arguments) of each accepted call.
        opened: The prompt ends inside a think block.
    """

    row: str
    category: str
    style: str
    messages: list[dict]
    functions: dict[str, dict]
    expected: list[tuple[str, dict[str, list]]]
    opened: bool


@dataclass
class ToolCallsTask(EvaluationTask):
    """Berkeley function calling: calls compared with the accepted ones as syntax trees."""

    VERSION = 1

    kind: str = "tool_calls"
    questions: str = MISSING  # JSONL of {"id", "question", "function"}
    answers: str = MISSING  # JSONL of {"id", "ground_truth"}
    styles: list[str] = some("xml", "python")  # <tool_call> with JSON, <code> with Python
    max_rows: int | None = count(100)  # the first ones; null: all
    thinking: bool = False
    max_new_tokens: int = count(512)

    def files(self) -> list[tuple[str, str]]:
        return [("questions", self.questions), ("answers", self.answers)]


@measures(ToolCallsTask)
class ToolCalls(Measurement):
    """Share of rows that are answered with exactly the accepted calls, per style.

    Metrics, for each style of `config.styles`:
        STYLE: share of rows whose calls are right, with none missing and none too many; a block that
            cannot be read as a call makes a row wrong.
        STYLE/parsed: share of rows with at least one well-formed call.
        STYLE/name: share of rows whose calls name the accepted functions.
        STYLE/cut: share of replies that reached max_new_tokens.
        STYLE/CATEGORY: like STYLE, per category of the rows' ids, where there are several.

    Attributes:
        notes: "rows_without_answer": rows passed over as the answers do not have their id.
    """

    def __init__(self, name: str, config: ToolCallsTask, context: Context):
        super().__init__(name, config, context)
        check_choices(self.key, config, "styles", TAGS)
        check_counts(self.key, config, "max_rows", "max_new_tokens")

    def items(self, tokenizer: "PreTrainedTokenizerBase") -> list[Item]:
        answers = {}
        for row in self._rows("answers", ("id", "ground_truth")):
            answers[row["id"]] = row
        self.notes = {"rows_without_answer": 0}
        asked = []
        for row in self._rows("questions", ("id", "question", "function")):
            if len(asked) == self.config.max_rows:
                break
            if row["id"] in answers:
                asked.append((row, answers[row["id"]]))
            else:
                self.notes["rows_without_answer"] += 1
        several = len({category(row["id"]) for row, _ in asked}) > 1
        return [
            self._item(tokenizer, style, several, row, answer) for row, answer in asked for style in self.config.styles
        ]

    def measure(self, engine: Engine, items: list[Item]) -> list[Sample]:
        return [_sample(item, reply) for item, reply in zip(items, greedy_replies(engine, items), strict=True)]

    def _item(self, tokenizer: "PreTrainedTokenizerBase", style: str, several: bool, row: Row, answer: Row) -> Item:
        messages, functions = messages_of(row), functions_of(row)
        expected = accepted_calls(answer, functions)
        kwargs, tools = {"enable_thinking": self.config.thinking}, None
        documents = [json_schema_tool(function) for function in functions.values()]
        template = str(tokenizer.chat_template)
        if VARIABLES[style] in template:
            kwargs[VARIABLES[style]] = [json.dumps(document, ensure_ascii=False) for document in documents]
        elif style == "xml" and "tools" in template:
            tools = documents
        else:
            raise UserError(
                f"{self.key}.styles={self.config.styles}: the chat template does not read {VARIABLES[style]}; take "
                f"{style} out of styles, or use the template smollm3"
            )
        with named(row):
            ids = encode_prompt(tokenizer, messages, template_kwargs=kwargs, tools=tools, today=self.context.today)
        of_category = category(row["id"]) if several else ""
        opened = opens_thinking(tokenizer, ids)
        question = ToolCallsPrompt(row["id"], of_category, style, messages, functions, expected, opened)
        return Item(f"{row['id']}/{style}", ids, self.config.max_new_tokens, about=question)

    def _rows(self, key: str, columns: tuple[str, ...]) -> list[Row]:
        """The rows of a file, each with the columns and an id of its own."""
        rows, seen = [], set()
        for _, row in read_rows(Source(path=getattr(self.config, key))):
            where = f"{self.key}.{key}: {row.where}"
            if missing := [column for column in columns if column not in row]:
                raise UserError(f"{where}: has no {missing[0]} but the columns {', '.join(row)}; expected Berkeley's")
            if not isinstance(row["id"], str) or row["id"] in seen:
                raise UserError(f"{where}: id={row['id']!r:.80} is not a text, or an earlier row's; give each its own")
            if category(row["id"]) in SHARES:
                raise UserError(f"{where}: id={row['id']!r:.80} begins with the name of a metric; rename it")
            seen.add(row["id"])
            rows.append(row)
        return rows


def category(row_id: str) -> str:
    """What stands before the number of an id: simple_python of simple_python_12, live_simple of live_simple_0-0-0."""
    return re.sub(r"_\d+(-\d+)*$", "", row_id)


def messages_of(row: Row) -> list[dict]:
    """The messages of a row's only turn."""
    turns = row["question"]
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], list):
        found = f"a list of {len(turns)}" if isinstance(turns, list) else kind_of(turns)
        raise UserError(f"{row.where}: question is {found}; expected [[message, ...]], one turn; leave the row out")
    return turns[0]


def functions_of(row: Row) -> dict[str, dict]:
    """Name -> document of a row's functions, as Berkeley wrote them."""
    functions = row["function"] if isinstance(row["function"], list) else [row["function"]]
    for i, function in enumerate(functions):
        parameters = function.get("parameters") if isinstance(function, dict) else None
        if not isinstance(parameters, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{row.where}: function[{i}] has no name or no parameters; expected a function document")
        for name, schema in (parameters.get("properties") or {}).items():
            items = schema.get("items")
            kinds = [schema.get("type", "any"), items.get("type", "any") if isinstance(items, dict) else "any"]
            if unknown := [kind for kind in kinds if not isinstance(kind, str) or kind not in TYPES]:
                raise UserError(
                    f"{row.where}: function[{i}].parameters.properties.{name} is of type {unknown[0]!r:.80}; expected "
                    f"one of {', '.join(TYPES)}; leave out rows for other languages than Python"
                )
    return {function["name"]: function for function in functions}


def accepted_calls(answer: Row, functions: dict[str, dict]) -> list[tuple[str, dict[str, list]]]:
    """(name, accepted arguments) of each call that has to be made."""
    calls = answer["ground_truth"]
    if not isinstance(calls, list) or not calls:
        raise UserError(f"{answer.where}: ground_truth is {calls!r:.80}; expected a list of accepted calls")
    expected = []
    for i, call in enumerate(calls):
        where = f"{answer.where}: ground_truth[{i}]"
        arguments = next(iter(call.values())) if isinstance(call, dict) and len(call) == 1 else None
        if not isinstance(arguments, dict) or not lists_only(arguments):
            raise UserError(
                f"{where} is {call!r:.80}; expected {{function: {{argument: [value, ...]}}}}, and the same form for "
                "objects among the values"
            )
        name = next(iter(call))
        if name not in functions:
            raise UserError(
                f"{where} calls {name!r:.80}, which is not one of the question's functions {', '.join(functions)}; "
                "give the answers that belong to the questions"
            )
        expected.append((name, arguments))
    return expected


def lists_only(arguments: dict) -> bool:
    """Whether all arguments have lists of accepted values, and so have the keys of objects among these."""
    if not all(isinstance(values, list) for values in arguments.values()):
        return False
    choices = [choice for values in arguments.values() for choice in values]
    items = [item for choice in choices for item in (choice if isinstance(choice, list) else [choice])]
    return all(isinstance(values, list) for item in items if isinstance(item, dict) for values in item.values())


def _sample(item: Item, reply: Reply) -> Sample:
    question: ToolCallsPrompt = item.about
    answer = parts_of(reply.text, opened_in_prompt=question.opened).answer
    calls, faults = read_calls(answer, question.style)
    reason = _reason(question, calls, faults)
    style, names = question.style, [name for name, _ in question.expected]
    metrics = {
        style: float(not reason),
        f"{style}/parsed": float(bool(calls)),
        f"{style}/name": float(sorted(call.name for call in calls) == sorted(names)),
        f"{style}/cut": float(reply.cut),
    }
    if question.category:
        metrics[f"{style}/{question.category}"] = metrics[style]
    record = {
        "style": style,
        "question": question.messages,
        "functions": list(question.functions),
        "reply": reply.text,
        "calls": [str(call) for call in calls],
        "expected": [{name: arguments} for name, arguments in question.expected],
        "reason": reason,
    }
    return Sample(item.id, metrics, cluster=question.row, record=record)


def _reason(question: ToolCallsPrompt, calls: list[Call], faults: list[str]) -> str:
    """Why a reply is wrong; "" where it is right."""
    if faults:
        return "; ".join(faults)
    return mismatch(calls, question.functions, question.expected)
