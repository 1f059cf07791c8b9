"""A checkpoint as lm-evaluation-harness sees it: its likelihoods, our replies."""

import json
import sys
from collections import defaultdict
from statistics import fmean
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smolpost.chat.reasoning import ends_thinking
from smolpost.chat.turn_end import endless_replies
from smolpost.errors import UserError
from smolpost.evaluation.harness.replies import answer_of
from smolpost.evaluation.task import MODES
from smolpost.inference.engine import Reply
from smolpost.inference.generation import generate, padding_token_id, reply_text, stop_token_ids
from smolpost.progress import Progress
from smolpost.schema import Harness


class HarnessModel(HFLM):
    """HFLM with three differences in what is generated.

    A reply that ends inside its think block has no answer, where HFLM takes the thoughts for one. A task's stop strings
    end the answer, not the thoughts, where HFLM stops generating at the first one. A prompt that leaves no room for the
    longest reply is refused, where HFLM cuts its beginning off.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, harness: Harness, mode: str):
        """
        Args:
            tokenizer: Its chat template holds the date (`smolpost.chat.clock.frozen`).
            mode: "think" or "no_think"; anything else: the bare text is asked, and all of a reply is its answer.
        """
        arguments = {"enable_thinking": MODES[mode]} if mode in MODES else {}
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=harness.batch_size,
            chat_template_args=arguments,
        )
        self.thinks, self.seed = mode in MODES, harness.seed
        self.stop_tokens = stop_token_ids(model.generation_config)
        if self.thinks and (line := endless_replies(tokenizer, self.stop_tokens, model.name_or_path)):
            print(line, flush=True)
        self.replies: dict[tuple[str, int], list[Reply]] = defaultdict(list)  # (task name, row) -> its replies

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, which is the reply without thoughts, up to the task's stop strings."""
        answers = [""] * len(requests)
        groups = defaultdict(list)
        for place, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(place)
        with Progress(requests[0].task_name, len(requests), "prompt", shown=not disable_tqdm) as progress:
            for places in groups.values():
                asked = [requests[place] for place in places]
                for place, answer in zip(places, self._answers(asked, progress), strict=True):
                    answers[place] = answer
        return answers

    def _answers(self, requests: list[Instance], progress: Progress) -> list[str]:
        """Answers to requests with one set of generation settings."""
        settings = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        stops, longest = settings.pop("until"), settings.pop("max_gen_toks")
        sampled, temperature = settings.pop("do_sample"), settings.pop("temperature", 0.0)
        top_p = settings.pop("top_p", 1.0)
        if settings:
            name, value = next(iter(settings.items()))
            raise UserError(
                f"task {requests[0].task_name} has generation_kwargs.{name}={value}, and replies here know only until, "
                "max_gen_toks, do_sample, temperature and top_p; take it out in a task file of your own"
            )
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        self._check_room(requests[0].task_name, max(map(len, prompts)), longest)
        replies = generate(
            self.model,
            prompts,
            max_new_tokens=longest,
            temperature=temperature if sampled else 0.0,
            top_p=top_p,
            seed=self.seed,
            eos_token_ids=self.stop_tokens,
            pad_token_id=padding_token_id(self.tokenizer),
            batch_size=self.batch_size,
            progress=progress.update,
        )
        produced = [
            Reply(reply_text(self.tokenizer, reply, self.stop_tokens), len(reply), reply[-1] not in self.stop_tokens)
            for reply in replies
        ]
        for request, reply in zip(requests, produced, strict=True):
            self.replies[request.task_name, request.doc_id].append(reply)
        return [answer_of(reply.text, stops, thinks=self.thinks) for reply in produced]

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._check_room("a task", max(len(context) + len(rest) for _, context, rest in requests), 0)
        disable_tqdm = disable_tqdm or not sys.stderr.isatty()  # its bar would fill a log file with control characters
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

    def _check_room(self, task: str, prompt: int, reply: int) -> None:
        if prompt + reply > self.max_length:
            raise UserError(
                f"harness.tasks: {task} needs {prompt} tokens for its longest prompt and {reply} for a reply, and the "
                f"checkpoint has {self.max_length} positions; lower harness.max_new_tokens or harness.num_fewshot"
            )


def sample_records(samples: dict[str, list[dict[str, Any]]], replying: HarnessModel) -> list[dict[str, Any]]:
    """lm_eval's samples, one per row in place of one per row and filter.

    Args:
        samples: Task name -> what `simple_evaluate` logged.
        replying: What replied.
    Returns:
        "id" (TASK/ROW), "metrics", "record": the prompt, what was replied (likelihoods where nothing was), what each
        filter parsed, what was expected.
    """
    records: dict[str, dict[str, Any]] = {}
    for task, rows in samples.items():
        for row in rows:
            name, suffix = f"{task}/{row['doc_id']}", "" if row["filter"] == "none" else f",{row['filter']}"
            if name not in records:
                records[name] = _record(name, row, replying.replies.get((task, row["doc_id"])), replying.thinks)
            records[name]["metrics"] |= {f"{metric}{suffix}": row[metric] for metric in row["metrics"]}
            records[name]["record"]["parsed"][row["filter"]] = row["filtered_resps"]
    return list(records.values())


def _record(name: str, row: dict[str, Any], replies: list[Reply] | None, thinks: bool) -> dict[str, Any]:
    metrics = {}
    if replies:
        metrics["cut"] = fmean(reply.cut for reply in replies)
        if thinks:
            metrics["unclosed"] = fmean(ends_thinking(reply.text) for reply in replies)
    record = {
        "prompt": row["arguments"][0][0],
        "replies": [reply.text for reply in replies] if replies else row["resps"],
        "parsed": {},
        "expected": row["target"],
    }
    return {"id": name, "metrics": metrics, "record": record}
