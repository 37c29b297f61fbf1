"""Questions to put to a target when it writes training text: endless, from templates and from Python's own sources.

A small model left to itself asks little and badly; a drafter that has only seen such text meets a real question as a
stranger. Every question is drawn from a random.Random, so the same seed asks the same.
"""

import ast
import sysconfig
import textwrap
from functools import lru_cache
from pathlib import Path

NAMES = ("Anna", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kofi", "Lena", "Marco",
         "Nadia", "Oscar", "Priya", "Quentin", "Rosa", "Samir", "Tina", "Uma", "Victor", "Wendy", "Yusuf", "Zoe")
THINGS = ("apples", "books", "marbles", "stamps", "pencils", "tickets", "cookies", "bottles", "eggs", "coins", "chairs",
          "flowers", "photos", "stickers", "shirts", "bricks", "candles", "oranges", "cards", "toys")
PLACES = ("a bakery", "a school", "a farm", "a library", "a factory", "a museum", "a garden", "a hotel", "a cinema",
          "a bookshop", "a market", "a garage", "a theatre", "a cafe")
TOPICS = (
    "volcanoes", "the history of bread", "photosynthesis", "remote work", "the French Revolution", "black holes",
    "learning the piano", "urban gardening", "the water cycle", "chess openings", "machine learning", "honey bees",
    "the Silk Road", "vaccines", "electric cars", "the stock market", "meditation", "coral reefs", "the moon landing",
    "sleep", "public libraries", "the printing press", "inflation", "earthquakes", "recycling", "the Roman army",
    "jazz", "DNA", "wind turbines", "tea", "the Great Wall of China", "antibiotics", "time management", "glaciers",
    "the human heart", "marathon running", "democracy", "cryptography", "migration of birds", "the Renaissance",
    "healthy eating", "the Internet", "desert animals", "budgeting", "the periodic table", "gravity", "town planning",
    "poetry", "the Industrial Revolution", "dolphins", "cloud computing", "the solar system", "job interviews",
    "rainforests", "the Olympic Games", "supply and demand", "cheese making", "bridges", "quantum computers", "tides",
    "whales", "the Cold War", "interior design", "data privacy", "the immune system", "cycling", "ancient Egypt",
    "public speaking", "climate change", "the violin", "nuclear energy", "fashion", "the Great Depression", "ants",
    "the Himalayas", "artificial intelligence", "friendship", "evolution", "trains", "soil", "Shakespeare", "lightning",
    "the European Union", "camping", "fermentation", "satellites", "online learning", "the brain", "salt", "rivers")
EVENTS = (
    "a city council that votes to close a street to cars", "a flood in a small coastal town",
    "a local team that wins the cup after fifty years", "a new hospital wing that opens late and over budget",
    "a strike of bus drivers", "a school that bans mobile phones", "a company that recalls a toy",
    "the discovery of an old ship near a harbour", "a storm that leaves thousands without power",
    "a teenager who wins a science prize", "a museum that returns a painting", "a fire in a warehouse",
    "a court ruling about noise at night", "a bridge closed for repairs", "a rise in the price of milk",
    "a bank that changes its fees", "a rescue in the mountains", "a man who walks across a continent",
    "an election for mayor", "a factory that moves abroad", "a festival cancelled because of heat",
    "a doctor on trial for fraud", "a wolf seen near a village", "a merger of two airlines",
    "a new law on renting flats", "a scientist who finds a new kind of frog")
PEOPLE = ("a composer", "a river", "a mountain village", "an actress", "a football club", "a university", "a painter",
          "a battle", "an island", "a television series", "a rock band", "a castle", "a physicist", "a newspaper",
          "a film", "a railway line", "a politician", "a species of bird", "a novel", "a bridge")
CHAT = (
    "What is {topic}?", "Explain {topic} to a ten-year-old.", "Give me five tips about {topic}.",
    "Write a short story about {topic}.", "Why does {topic} matter?", "What are the pros and cons of {topic}?",
    "Write a poem about {topic}.", "I want to learn more about {topic}. Where should I start?",
    "Write a blog post about {topic}.", "Compare {topic} and {other}.", "Write an email inviting a colleague to a talk "
    "about {topic}.", "How has {topic} changed over the last hundred years?", "List the most important facts about "
    "{topic}.", "What would the world be like without {topic}?", "Describe {topic} in three sentences.",
    "Imagine you are a teacher. Plan a lesson on {topic}.", "What do people often get wrong about {topic}?",
    "Write a dialogue between two friends who disagree about {topic}.", "Who first studied {topic}, and when?",
    "Suggest a title and an outline for an essay on {topic}.", "Is {topic} more important than {other}? Argue both "
    "sides.", "Pretend to be an expert on {topic} and answer: what should everybody know?", "How does {topic} work?",
    "Write a speech about {topic}.", "What is the connection between {topic} and {other}?")
CODE = (
    "Write a Python function that {task}.", "Write a function to {base}.", "Implement a class in Python that {task}.",
    "How do I {base} in Python? Show an example.", "Write a Python script that {task} and prints the result.",
    "Write a program in JavaScript that {task}.", "Write a C++ function that {task}.",
    "Write unit tests for a Python function that {task}.", "Give an efficient algorithm to {base}, with code.")
CODE_TASKS = (
    ("reverses a linked list", "reverse a linked list"), ("counts the words in a text", "count the words in a text"),
    ("checks whether a string is a palindrome", "check whether a string is a palindrome"),
    ("merges two sorted lists", "merge two sorted lists"), ("parses a CSV file", "parse a CSV file"),
    ("finds the largest number in a list", "find the largest number in a list"),
    ("computes the greatest common divisor", "compute the greatest common divisor of two numbers"),
    ("sorts a list of dictionaries by a key", "sort a list of dictionaries by a key"),
    ("removes duplicates from a list", "remove duplicates from a list and keep the order"),
    ("finds all prime numbers below n", "find all prime numbers below n"),
    ("converts Celsius to Fahrenheit", "convert temperatures"), ("flattens a nested list", "flatten a nested list"),
    ("searches a sorted array", "search a sorted array with binary search"),
    ("counts how often each letter occurs", "count the letters of a string"),
    ("validates an e-mail address", "validate an e-mail address"), ("computes a factorial", "compute a factorial"),
    ("finds the longest common prefix", "find the longest common prefix of some strings"),
    ("rotates a matrix", "rotate a matrix by ninety degrees"), ("implements a stack", "implement a stack"),
    ("finds two numbers that add up to a target", "find two numbers in a list that add up to a target"),
    ("reads a file line by line", "read a file line by line"), ("implements a queue", "build a queue from two stacks"),
    ("computes the average of the even numbers", "average the even numbers of a list"),
    ("finds the shortest path in a graph", "find the shortest path in a graph"),
    ("multiplies two matrices", "multiply two matrices"), ("encodes text with a Caesar cipher", "encode text"),
    ("checks whether brackets are balanced", "check whether brackets are balanced"),
    ("finds the intersection of two arrays", "find the elements that two arrays share"),
    ("formats a date", "format a date"), ("downloads a web page", "download a web page"),
    ("counts the vowels in a string", "count the vowels in a string"), ("sums the digits", "sum a number's digits"),
    ("transposes a table", "transpose a list of lists"), ("groups anagrams", "group words that are anagrams"),
    ("finds the median", "find the median of a list"), ("prints a multiplication table", "print a table"),
    ("computes Fibonacci numbers", "compute the Fibonacci sequence"), ("splits a list into chunks", "split a list"),
    ("returns the second largest element", "find the second largest element"), ("makes passwords", "make passwords"))
ABOUT_CODE = (
    "Explain what this function does:\n```python\n{code}\n```", "Complete this function:\n```python\n{head}\n```",
    "Write a docstring for this function:\n```python\n{code}\n```", "{head}",
    "Complete the following Python code.\n\n{head}", "Is there a bug in this code?\n```python\n{code}\n```",
    "Rewrite this function so that it is easier to read:\n```python\n{code}\n```",
    "Write a test for this function:\n```python\n{code}\n```", "Add comments and type hints:\n\n{code}")
SUMMARIZE = ("Summarize: {text}", "Summarize the following text:\n{text}", "{text}\n\nSummarize this in two sentences.",
             "Give me a summary of this article:\n{text}", "What are the main points of this text?\n\n{text}",
             "{text}\nTL;DR:", "Write a headline and a short summary for this:\n{text}")
ASK_ABOUT = ("{text}\n\nBased on this passage, what is it mainly about?", "Context: {text}\n\nQuestion: Who or what is "
             "described?\nAnswer:", "{text}\n\nList three facts stated in the text.", "Answer from the text below.\n"
             "{text}\n\nWhat happened, and why?", "Read this and answer: what is the most important detail?\n\n{text}",
             "{text}\n\nWhen and where does this take place?")
MATH = (
    "{name} has {a} {things}. {friend} has {b} times as many. How many {things} do they have together?",
    "{name} buys {a} {things} at ${b} each and pays with ${c}. How much change does {name} get?",
    "At {place} there are {c} {things}. {name} takes {a} of them on Monday and {b} on Tuesday. How many are left?",
    "{name} walks {a} km every day and {b} km on Sundays. How far does {name} walk in {d} weeks?",
    "A box holds {a} {things}. How many boxes are needed for {c} {things}?",
    "{name} earns ${a} an hour and works {b} hours a day, {d} days a week. How much is that in a month of four weeks?",
    "{name} reads {a} pages on the first day and {b} more pages each day than the day before. How many pages are read "
    "in {d} days?", "Solve for x: {a}x + {b} = {c}.", "What is {a} * {b} + {c}?", "Compute {c} / {d}, and explain.",
    "A train leaves at {d} o'clock at {c} km/h. How far has it gone after {b} hours?",
    "The price of a coat is ${c}. It is reduced by {a} percent. What does it cost now?",
    "The sum of two numbers is {c} and their difference is {a}. What are the numbers?",
    "{name} is {a} years old. In {d} years {friend} will be twice as old as {name} will be. How old is {friend} now?",
    "A rectangle is {a} cm long and {b} cm wide. Find its area and its perimeter.",
    "{name}, {friend} and a neighbour share {c} {things} equally. {name} then gives {d} away. How many has {name} now?",
    "{place_start} sells {a} {things} in the morning and half as many in the afternoon, at ${d} each. How much money "
    "does it make?", "What is the probability of drawing a red ball from a bag of {a} red and {b} blue balls?",
    "{name} saves ${a} each week. How many weeks until there are ${c}?",
    "If {d} workers build a wall in {b} days, how long do {a} workers need?")
SHARES = (("chat", 0.28), ("math", 0.24), ("code", 0.16), ("about_code", 0.14), ("article", 0.18))
LONGEST_CODE = 900  # characters


def question(random) -> tuple:
    """One question: (text, None); or for an article (request, follow-up), the follow-up with {text} for the answer."""
    kind = random.choices([name for name, _ in SHARES], [share for _, share in SHARES])[0]
    if kind == "article":
        subject = random.choice((
            f"Write a news article about {random.choice(EVENTS)}.",
            f"Write a detailed encyclopedia entry about {random.choice(PEOPLE)}, with names, places and dates.",
            f"Write two paragraphs about {random.choice(TOPICS)}."))
        return subject, random.choice(SUMMARIZE + ASK_ABOUT)
    return {"chat": _chat, "math": _math, "code": _code, "about_code": _about_code}[kind](random), None


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
