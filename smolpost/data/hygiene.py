"""Which rows a mixture does not use: duplicates, near duplicates, evaluation texts, other languages.

What depends on one row alone is computed by `features`, a plain function for any number of worker processes. What
depends on earlier rows is decided by `HygieneFilter.check`, in one process and in the order of the rows. The first of a
set of duplicates is kept, so the result depends on the order of the rows and not on the number of workers.

System turns and tool results are not compared, because neither the user nor the model wrote them. A policy or an API
result that many rows share would make all of them near duplicates, and a date in it would hide exact ones.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from smolpost.data.overlap import SHORTEST_TEXT, EvaluationTexts, SignatureIndex, signature_of, words_of
from smolpost.data.sources import read_rows
from smolpost.data.validate import message_text
from smolpost.errors import UserError
from smolpost.schema import Hygiene, Source

NEAR_WORDS = 5  # of the n-grams whose sets near duplicates share
PERMUTATIONS = (16, 1024)  # fewer estimate a similarity to worse than 0.12, more cost memory for nothing
LANGUAGE_CHARACTERS = 4000  # of a row, as many from each turn: the detector reads about 1 MB/s
DIGEST_SIZE = 16  # bytes
SIGNATURE_TYPE = np.dtype("<u4")
TOOL_CALL = "tool call"
KEPT, REMOVED = b"+", b"-"  # first byte of features
CONTAMINATED, LANGUAGE, EXACT, NEAR = "contaminated", "language", "exact duplicate", "near duplicate"

Turns = list[tuple[str, str]]  # (role, text)


@dataclass(frozen=True)
class Removal:
    """Why a row goes.

    Attributes:
        reason: "contaminated", "language", "exact duplicate" or "near duplicate".
        detail: "'the quick brown ...' of eval.jsonl:3", "de 0.98", "of FILE:12", "0.87 of FILE:12".
    """

    reason: str
    detail: str


class HygieneFilter:
    """Decides row by row which ones go; see `schema.Hygiene` for what is looked for.

    A kept row costs about 220 bytes under exact, and 1,000 to 1,200 under near with 128 permutations at 0.8; what says
    of its file and row is part of both and kept once.

    Args:
        settings: Checked here, and the evaluation files read.
        key: The settings' key in the recipe, for messages.
    Raises:
        UserError: A value is out of range, an evaluation file is missing or without text, a library is missing.
    Attributes:
        searched: Evaluation file -> {"rows", "texts", "short texts"}: those of fewer than SHORTEST_TEXT words are not
            looked for.
    """

    def __init__(self, settings: Hygiene, *, key: str = "hygiene"):
        check_settings(settings, key)
        _, self.searched = evaluation_texts(settings)
        check_searched(self.searched, settings, key)
        self.index = SignatureIndex(settings.near_permutations, settings.near) if settings.near else None
        self.indexed = []  # file and row of each row in the index
        self.first = {}  # digest -> file and row
        self.digest_size = DIGEST_SIZE if settings.exact else 0

    @staticmethod
    def needed(settings: Hygiene) -> bool:
        """Whether there is anything to look for."""
        return bool(settings.exact or settings.near or settings.against or settings.languages)

    def check(self, features: bytes, where: str) -> Removal | None:
        """Whether the row goes; None keeps it, and those after it are compared with it.

        Args:
            features: Of the row, by `features` under the same settings.
            where: File and row, for the details of others' removals.
        """
        kind, content = features[:1], features[1:]
        if kind == REMOVED:
            return Removal(*content.decode().split("\n", 1))
        digest, signature = content[: self.digest_size], content[self.digest_size :]
        if digest in self.first:
            return Removal(EXACT, f"of {self.first[digest]}")
        if signature:
            similar = self.index.add(np.frombuffer(signature, SIGNATURE_TYPE))
            if similar:
                row, similarity = similar
                return Removal(NEAR, f"{similarity:.2f} of {self.indexed[row]}")
            self.indexed.append(where)
        if digest:
            self.first[digest] = where
        return None


# ---------------------------------------------------------------- one row


def features(row: dict, settings: Hygiene) -> bytes:
    """All of a row that does not depend on others, for worker processes; the same on every machine.

    The evaluation texts and the language models (up to 0.9 GB) are read once in each process.

    Args:
        row: As `rows.validate_row` accepts it.
        settings: As `HygieneFilter` accepts them.
    Returns:
        REMOVED, reason and detail on two lines; or KEPT, the digest where exact is on, and the signature where near is
        on and the text has words.
    """
    turns = turns_of(row)
    words = [words_of(text) for _, text in turns] if settings.against or settings.near else []
    removal = contamination(words, settings) or wrong_language(turns, settings)
    if removal:
        return REMOVED + f"{removal.reason}\n{removal.detail}".encode()
    digest = digest_of(turns) if settings.exact else b""
    if not settings.near:
        return KEPT + digest
    signature = signature_of([word for turn in words for word in turn], NEAR_WORDS, settings.near_permutations)
    return KEPT + digest + (b"" if signature is None else signature.astype(SIGNATURE_TYPE).tobytes())


def turns_of(row: dict) -> Turns:
    """Texts of user and model in order; of a pair, what both sides begin with comes once, then chosen, then rejected.

    The arguments of tool calls are the model's text. Reasoning in a field of its own precedes the reply.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is not None and rejected is not None:
        parted = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        messages = chosen + rejected[next(parted, min(len(chosen), len(rejected))) :]
    elif row.get("messages") is not None:
        messages = row["messages"]
    else:
        return [("text", row["text"])]
    return [turn for message in messages if message["role"] in ("user", "assistant") for turn in message_turns(message)]


def message_turns(message: dict) -> Turns:
    texts = (message.get("reasoning_content"), message_text(message, ""))
    text = "\n".join(text for text in texts if text)
    turns = [(message["role"], text)] if text else []
    return turns + [(TOOL_CALL, call_text(call)) for call in message.get("tool_calls") or ()]


def call_text(call: dict) -> str:
    """A call's name and arguments, however they are stored; without its id, which differs between copies."""
    function = call["function"]
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        arguments = json.loads(arguments)
    return f"{function['name']} {json.dumps(arguments or {}, ensure_ascii=False, sort_keys=True)}"


def strings(value) -> Iterator[str]:
    """Every string value at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def digest_of(turns: Turns) -> bytes:
    """DIGEST_SIZE bytes that equal texts by equal roles share; Unicode form (NFC) and white space do not count."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for role, text in turns:
        folded = " ".join(unicodedata.normalize("NFC", text).split())
        digest.update(f"{role}\0{len(folded)}\0{folded}".encode("utf-8", "surrogatepass"))
    return digest.digest()


def contamination(words: list[list[str]], settings: Hygiene) -> Removal | None:
    """The removal of a row in which a turn shares n consecutive words with an evaluation text, or equals a shorter one.

    Args:
        words: The words of each turn.
    """
    if not settings.against:
        return None
    texts, _ = evaluation_texts(settings)
    for turn in words:
        found = texts.find(turn)
        if found:
            shared, where = found
            return Removal(CONTAMINATED, f"'{shared}' of {where}")
    return None


def wrong_language(turns: Turns, settings: Hygiene) -> Removal | None:
    """The removal of a row whose most likely language is not one to keep, with at least min_confidence.

    A row that is too short to decide, or has no words, is kept.
    """
    if not settings.languages:
        return None
    texts = [text for role, text in turns if role != TOOL_CALL]
    share = LANGUAGE_CHARACTERS // max(1, len(texts))
    code, confidence = detected_language("\n".join(text[:share] for text in texts))
    if code in settings.languages or confidence < settings.min_confidence:
        return None
    return Removal(LANGUAGE, f"{code} {confidence:.2f}")


def detected_language(text: str) -> tuple[str, float]:
    """ISO 639-1 code of the most likely of all languages known, and the detector's confidence, in [0, 1]."""
    detector, codes = language_detector()
    # Halves of surrogate pairs have no UTF-8.
    best = detector.compute_language_confidence_values(text.encode("utf-8", "replace").decode())[0]
    return codes[best.language.name], best.value


# ---------------------------------------------------------------- read once in each process


@lru_cache(maxsize=1)
def language_detector():
    from lingua import Language, LanguageDetectorBuilder  # an extra

    codes = {language.name: language.iso_code_639_1.name.lower() for language in Language.all()}
    # The low accuracy mode takes a tenth of the memory, and 9% of short English texts for another language.
    return LanguageDetectorBuilder.from_all_languages().build(), codes


def evaluation_texts(settings: Hygiene) -> tuple[EvaluationTexts, dict[str, dict[str, int]]]:
    """The texts of the evaluation files, every string of every row, and `HygieneFilter.searched`."""
    found = [(path, os.stat(path)) for path in settings.against]
    stamps = tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in found)
    return read_evaluation_texts(stamps, settings.ngram)


@lru_cache(maxsize=4)
def read_evaluation_texts(stamps: tuple[tuple[str, int, int], ...], ngram: int):
    """The texts of evaluation files.

    Args:
        stamps: Path, time and size of each file, so that a changed file is read again.
    """
    texts, searched = [], {}
    for path, _, _ in stamps:
        counts = searched[path] = {"rows": 0, "texts": 0, "short texts": 0}
        for _, row in read_rows(Source(path=path)):
            counts["rows"] += 1
            for words in map(words_of, strings(row)):
                is_short = len(words) < min(ngram, SHORTEST_TEXT)
                counts["short texts" if is_short else "texts"] += 1
                if not is_short:
                    texts.append((row.where, words))
    return EvaluationTexts.of(texts, ngram), searched


# ---------------------------------------------------------------- settings


def check_settings(settings: Hygiene, key: str) -> None:
    if not 0 <= settings.near <= 1:
        raise UserError(f"{key}.near={settings.near} is outside [0, 1]; use a similarity such as 0.8, or 0 for off")
    if settings.ngram < 1:
        raise UserError(f"{key}.ngram={settings.ngram} is below 1; use a number of words such as 13")
    low, high = PERMUTATIONS
    if not low <= settings.near_permutations <= high:
        raise UserError(f"{key}.near_permutations={settings.near_permutations} is outside [{low}, {high}]; use 128")
    if not 0 < settings.min_confidence <= 1:
        raise UserError(f"{key}.min_confidence={settings.min_confidence} is outside (0, 1]; use 0.5")
    if settings.near:
        check_installed("datasketch", f"{key}.near={settings.near}")
    if settings.languages:
        check_installed("lingua", f"{key}.languages={settings.languages}")
        check_languages(settings.languages, key)
    for i, path in enumerate(settings.against):
        if not Path(path).is_file():
            raise UserError(f"{key}.against[{i}]={path} is not a file; expected JSONL or Parquet with evaluation rows")


def check_installed(module: str, setting: str) -> None:
    try:
        __import__(module)
    except ImportError as error:
        raise UserError(f"{setting} needs {module}, which is not installed; pip install 'smolpost[hygiene]'") from error


def check_languages(languages: list[str], key: str) -> None:
    _, codes = language_detector()
    for i, code in enumerate(languages):
        if code not in codes.values():
            raise UserError(
                f"{key}.languages[{i}]={code} is not a language of the detector; use ISO 639-1 codes, "
                f"of {', '.join(sorted(codes.values()))}"
            )


def check_searched(searched: dict[str, dict[str, int]], settings: Hygiene, key: str) -> None:
    for path, counts in searched.items():
        if not counts["texts"]:
            raise UserError(
                f"{key}.against: {path}: none of its {counts['short texts']} texts has "
                f"{min(settings.ngram, SHORTEST_TEXT)} words or more, so nothing would be found; check the file or "
                "remove it"
            )
