"""Asks a teacher's server through ChatEngine, for tests."""

import asyncio

from smolpost.synthesis.client import ChatEngine
from smolpost.synthesis.records import Reply, Request
from smolpost.synthesis.settings import Teacher

KEY = "stages.traces.teacher"
VARIABLE = "SMOLPOST_TEST_KEY"


def asked(text: str, **more) -> Request:
    return Request([{"role": "user", "content": text}], True, 7, **more)


def teacher_of(at, **settings) -> Teacher:
    return Teacher(**({"model": "teacher", "url": at.url, "request_timeout": 5.0, "deadline": 20.0} | settings))


def outcomes(teacher: Teacher, *texts: str) -> list:
    """What asking all the texts at once gave: replies and exceptions."""

    async def ask_all():
        async with ChatEngine(teacher, key=KEY) as engine:
            return await asyncio.gather(*(engine.ask(asked(text)) for text in texts), return_exceptions=True)

    return asyncio.run(ask_all())


def outcome(teacher: Teacher, text: str) -> Reply:
    [found] = outcomes(teacher, text)
    if isinstance(found, BaseException):
        raise found
    return found


def identify(teacher: Teacher) -> dict:
    async def say():
        async with ChatEngine(teacher, key=KEY) as engine:
            return await engine.identity()

    return asyncio.run(say())
