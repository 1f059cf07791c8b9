"""A tiny Qwen3 that repeats a number, thinks where its template asks for it, and is served by `transformers serve`.

"Repeat 47." is answered by "The answer is \\boxed{47}.", in think mode after a think block that names the number. The
strong model's answers are right; the weak one also learned wrong ones, so that about half of its answers are wrong.
"""

import contextlib
import fcntl
import random
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.small import environment

# Qwen3's own in short: turns before the last user turn lose their think block, and /no_think in a user turn is left to
# the model, which then writes an empty block itself.
TEMPLATE = """
{%- set last = namespace(user=0) -%}
{%- for message in messages if message.role == 'user' -%}{%- set last.user = loop.index -%}{%- endfor -%}
{%- set turn = namespace(user=0) -%}
{%- if tools -%}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set turn.user = turn.user + 1 -%}{%- endif -%}
{%- set content = message.content or '' -%}
{%- if message.role == 'assistant' and turn.user < last.user and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}"""
ASKED = ("Repeat {}.", "Please repeat {}.", "What is {}?", "Say the number {}.")
NUMBERS = range(10, 100)
SYSTEM = ("You are a helpful assistant.", "Answer briefly.")


def question(number: int) -> str:
    return ASKED[0].format(number)


def answer(number: int) -> str:
    return f"The answer is \\boxed{{{number}}}."


def reasoning(number: int) -> str:
    return f"I have to repeat {number}."


# ---------------------------------------------------------------- training


def train(folder: Path, *, steps: int = 550, weak_steps: int = 60, seed: int = 0) -> tuple[Path, Path]:
    """Train on one core and save the models as `folder/strong` and `folder/weak`.

    Args:
        weak_steps: Further steps of the weak model, on answers of which two thirds are wrong.
    Returns:
        Both folders.
    """
    draw = random.Random(seed)
    tokenizer = _tokenizer(draw)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    try:
        model = _model(tokenizer)
        _steps(model, tokenizer, draw, steps, 3e-3, wrong=0.0)
        _save(model, tokenizer, folder / "strong")
        _steps(model, tokenizer, draw, weak_steps, 3e-4, wrong=0.67)
        _save(model, tokenizer, folder / "weak")
    finally:
        torch.set_num_threads(threads)
    return folder / "strong", folder / "weak"


def _tokenizer(draw: random.Random) -> PreTrainedTokenizerFast:
    """A token per digit and common word; any other text is bytes."""
    texts = ["".join(m["content"] + "\n" for m in _conversation(draw, wrong=0.0)[0]) for _ in range(500)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, min_frequency=20)
    )
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


def _model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    sizes = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, head_dim=32)
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
        **sizes, **ids,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def _conversation(draw: random.Random, *, wrong: float) -> tuple[list[dict], bool]:
    """Messages of one or two exchanges, the last a reply, and whether the template asks to think.

    The question of the probe is among them: its answer is any number, and it has to be thought about where it is asked.
    """
    messages = [{"role": "system", "content": draw.choice(SYSTEM)}] if draw.random() < 0.2 else []
    think = draw.random() < 0.6
    exchanges = draw.choice((1, 1, 2))
    for exchange in range(exchanges):
        number = draw.choice(NUMBERS)
        replied = draw.choice(NUMBERS) if draw.random() < wrong else number
        flagged = think and draw.random() < 0.2
        asked = _question(draw, number) + (" /no_think" if flagged else "")
        block = f"<think>\n{reasoning(replied)}\n</think>\n\n" if not flagged else "<think>\n\n</think>\n\n"
        reply = (block if think and exchange == exchanges - 1 else "") + answer(replied)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return messages, think


def _question(draw: random.Random, number: int) -> str:
    """A question for the number; one in four has other words around it, and half of these other numbers before it."""
    if draw.random() < 0.75:
        return draw.choice(ASKED).format(number)
    text = "".join(draw.choices(string.ascii_letters + string.punctuation + " " * 20 + "éñü日", k=draw.randint(0, 40)))
    before = f"{draw.randint(0, 999)} " if draw.random() < 0.5 else ""
    return f"{before}{text} {number}{draw.choice('.?! ')}"


def _steps(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    draw: random.Random,
    number: int,
    learning_rate: float,
    *,
    wrong: float,
) -> None:
    """Optimizer steps on fresh conversations; only the last reply is trained."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=number, pct_start=0.1)
    model.train()
    for _ in range(number):
        rows, labels = zip(*(_example(tokenizer, *_conversation(draw, wrong=wrong)) for _ in range(16)), strict=True)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        wanted = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        model(input_ids=ids, attention_mask=mask, labels=wanted).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _example(tokenizer: PreTrainedTokenizerFast, messages: list[dict], think: bool) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and its labels: the last reply with its stop token."""
    *before, reply = messages
    prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False, enable_thinking=think)
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    replied = tokenizer(reply["content"] + "<|im_end|>", add_special_tokens=False).input_ids
    return asked + replied, [-100] * len(asked) + replied


def _save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        do_sample=True, temperature=0.6, top_p=0.95, top_k=20,
    )  # fmt: skip
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------- serving


def trained_once(folder: Path) -> tuple[Path, Path]:
    """The strong and the weak model in a folder that several processes share; the first one trains them."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "trained").exists():
            train(folder)
            (folder / "trained").touch()
    return folder / "strong", folder / "weak"


class Server:
    """`transformers serve` of one model on loopback, on the same port after each restart.

    Attributes:
        model: Its folder, which is also its name in requests.
        url: Of its API.
    """

    def __init__(self, model: Path, *flags: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.model, self.url = model, f"http://127.0.0.1:{self._port}/v1"
        self._flags = flags
        self._process: subprocess.Popen | None = None

    def start(self, timeout: float = 120.0) -> None:
        """Start it and wait until it answers.

        Args:
            timeout: In seconds.
        """
        program = Path(sys.executable).parent / "transformers"
        address = ("--host", "127.0.0.1", "--port", str(self._port))
        command = [program, "serve", self.model, *address, "--device", "cpu", *self._flags]
        cache = self.model / "cache"  # an empty one: the list of models names what is in the cache
        cache.mkdir(exist_ok=True)
        with open(self.model / "server.log", "a") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment() | {"HF_HUB_CACHE": str(cache)}
            )
        deadline = time.monotonic() + timeout
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError((self.model / "server.log").read_text()[-2000:])
            time.sleep(0.1)

    def kill(self) -> None:
        """As `kill -9` does, amid whatever it is doing."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextlib.contextmanager
def served(model: Path, *flags: str) -> Iterator[Server]:
    """A running server of the model; `kill` and `start` stop and restart it.

    Args:
        flags: Further ones for `transformers serve`.
    """
    server = Server(model, *flags)
    try:
        server.start()
        yield server
    finally:
        server.kill()
