"""Questions to put to a target when it writes training text: endless, from templates and from Python's own sources.

A small model left to itself asks little and badly; a drafter that has only seen such text meets a real question as a
stranger. Every question is drawn from a random.Random, so the same seed asks the same.
"""

import ast
import sysconfig
import textwrap
from functools import lru_cache
from pathlib import Path

from speckv.question_words import (
    ABOUT_CODE,
    ASK_ABOUT,
    CHAT,
    CODE,
    CODE_TASKS,
    EVENTS,
    MATH,
    NAMES,
    PEOPLE,
    PLACES,
    SUMMARIZE,
    THINGS,
    TOPICS,
)

SHARES = (("chat", 0.28), ("math", 0.22), ("code", 0.15), ("about_code", 0.13), ("article", 0.15), ("passage", 0.07))
LONGEST_CODE = 900  # characters
PASSAGE_WORDS = 120


def question(random) -> tuple:
    """One question: (text, None); or for an article (request, follow-up), the follow-up with {text} for the answer."""
    kind = random.choices([name for name, _ in SHARES], [share for _, share in SHARES])[0]
    if kind == "article":
        subject = random.choice((
            f"Write a news article about {random.choice(EVENTS)}.",
            f"Write a detailed encyclopedia entry about {random.choice(PEOPLE)}, with names, places and dates.",
            f"Write two paragraphs about {random.choice(TOPICS)}."))
        return subject, random.choice(SUMMARIZE + ASK_ABOUT)
    ask = {"chat": _chat, "math": _math, "code": _code, "about_code": _about_code, "passage": _passage}[kind]
    return ask(random), None


def _chat(random):
    topic, other = random.sample(TOPICS, 2)
    return random.choice(CHAT).format(topic=topic, other=other)


def _math(random):
    name, friend = random.sample(NAMES, 2)
    place = random.choice(PLACES)
    return random.choice(MATH).format(
        name=name, friend=friend, place=place, place_start=place.capitalize(), things=random.choice(THINGS),
        a=random.randint(2, 40), b=random.randint(2, 12), c=random.randint(50, 900), d=random.randint(2, 9))


def _code(random):
    task, base = random.choice(CODE_TASKS)
    return random.choice(CODE).format(task=task, base=base)


def _about_code(random):
    heads = python_functions()
    if not heads:  # an interpreter without sources
        return _code(random)
    head, code = random.choice(heads)
    return random.choice(ABOUT_CODE).format(head=head, code=code)


def _passage(random):
    words = python_manual()
    if len(words) <= PASSAGE_WORDS:  # an interpreter without its manual
        return _chat(random)
    start = random.randrange(len(words) - PASSAGE_WORDS)
    text = " ".join(words[start:start + random.randint(PASSAGE_WORDS // 2, PASSAGE_WORDS)])
    return random.choice(SUMMARIZE + ASK_ABOUT).format(text=text)


@lru_cache(maxsize=1)
def python_manual() -> tuple:
    """The words of the language reference that comes with Python for help(): prose that no model wrote."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return ()
    return tuple(" ".join(topics[name] for name in sorted(topics)).split())


@lru_cache(maxsize=1)
def python_functions() -> tuple:
    """Functions of Python's standard library with a docstring: (signature and docstring, whole source)."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            source = file.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError):
            continue
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
                continue
            code = textwrap.dedent("\n".join(lines[node.lineno - 1:node.end_lineno]))
            if len(code) <= LONGEST_CODE:
                head = textwrap.dedent("\n".join(lines[node.lineno - 1:node.body[0].end_lineno]))
                found.append((head, code))
    return tuple(found)
