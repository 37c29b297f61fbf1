"""Prompts of four tasks to profile and compare with: a set of our own, or read from a file in Spec-Bench's format."""

import json
from collections import defaultdict
from pathlib import Path

from speckv.errors import InputError
from speckv.passages import PASSAGES

TASKS = ("code", "math", "chat", "summarization")
# Spec-Bench's categories, and the tasks' own names; others, translation among them, belong to none of the tasks.
TASK_OF_CATEGORY = {
    "code": "code", "coding": "code", "humaneval": "code",
    "math": "math", "math_reasoning": "math",
    "chat": "chat", "writing": "chat", "roleplay": "chat", "reasoning": "chat", "stem": "chat", "humanities": "chat",
    "qa": "chat",
    "summarization": "summarization", "rag": "summarization", "extraction": "summarization"}
FORMAT = '{"category": "coding", "turns": ["Write a function that ..."]}'

CODE = (
    "Write a Python function that tells whether a string is a palindrome, ignoring case, spaces and punctuation.",
    "Write a Python function that merges two sorted lists into one sorted list without calling sort.",
    "Implement a stack in Python that returns its smallest element in constant time. Add docstrings.",
    "Write a Python class for a bank account with deposit, withdraw and transfer. An account may not be overdrawn.",
    "Write a Python function that counts how often each word occurs in a text file and prints the ten most frequent.",
    "This function should return the average of a list, but it fails for an empty one. Fix it and say what you "
    "changed:\n\n```python\ndef average(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n```",
    "Explain line by line what this function does:\n\n```python\ndef f(n):\n    a, b = 0, 1\n    while a < n:\n"
    "        yield a\n        a, b = b, a + b\n```",
    "Write pytest tests for a function `slugify(title)` that turns a title into lower-case words joined by hyphens.",
    "Rewrite this loop as a list comprehension and explain when that is a good idea:\n\n```python\nresult = []\n"
    "for row in rows:\n    if row['age'] >= 18:\n        result.append(row['name'].strip())\n```",
    "Write a SQL query that lists every customer with the number of orders placed in 2023 and the total amount, the "
    "largest first. The tables are customers(id, name) and orders(id, customer_id, placed_on, amount).",
    "Write a JavaScript function that waits until a user has stopped typing for 300 milliseconds before it calls "
    "another function.",
    "Write a bash script that renames all .jpeg files in a folder to .jpg and prints what it renamed.",
    "Implement binary search in C. Return the index of the element or -1, and mind overflow of the midpoint.",
    "Write a Python decorator that caches the results of a function for a given number of seconds.",
    "Write a Python function that converts a Roman numeral to an integer and raises ValueError for an invalid one.",
    "Write an HTML form for a newsletter with name, e-mail and a check box, and the CSS that centres it on the page.",
    "Implement a queue using two stacks in Java and state the running time of each operation.",
    "Write a recursive Python function that lists all files under a folder that are larger than a given size.",
    "Find the bug in this code and correct it:\n\n```python\ndef add_item(item, items=[]):\n    items.append(item)\n"
    "    return items\n\nprint(add_item('a'))\nprint(add_item('b'))\n```",
    "Write a Python function that validates a 9 by 9 sudoku: no digit twice in a row, a column or a box.",
    "Write a Go function that reads lines from standard input and prints them in reverse order.",
    "Complete this function:\n\n```python\ndef running_mean(values, width):\n"
    '    """The mean of each window of `width` consecutive values."""\n```',
    "Write a Python generator that yields the prime numbers one after another, without a limit.",
    "Write a Rust function that returns the longest word of a sentence. Explain the lifetime in its signature.",
    "Implement depth-first and breadth-first search of a graph given as a dictionary of neighbours, in Python.",
    "Write a Python script that fetches a URL with a timeout, tries again three times and saves the page to a file.",
    "Turn this function into one without nested conditions:\n\n```python\ndef fee(age, is_member):\n"
    "    if age < 18:\n        if is_member:\n            return 0\n        else:\n            return 5\n    else:\n"
    "        if is_member:\n            return 8\n        else:\n            return 12\n```",
    "Write a regular expression that matches dates like 2024-03-09 and a Python function that extracts all of them "
    "from a text as date objects.",
    "Write a small command-line tool in Python with argparse that converts temperatures between Celsius and "
    "Fahrenheit.",
    "Implement a least recently used cache in Python with a fixed capacity, using a dictionary and a linked list.",
    "Write a Python function that multiplies two matrices given as lists of lists, and check that their sizes fit.",
    "Write a TypeScript interface for a to-do item and a function that groups items by whether they are done.",
)
MATH = (
    "A shop sells pens at 1.20 each and gives one free pen for every five bought. How much do 18 pens cost? Show your "
    "steps.",
    "Solve for x: 3(x - 4) + 2 = 5x - 18. Check the solution.",
    "A rectangular garden is 4 metres longer than it is wide and has an area of 96 square metres. Find its sides.",
    "Anna reads 24 pages a day and finishes a book in 15 days. How many days would it take her at 20 pages a day?",
    "Two trains 450 km apart leave at the same time towards each other at 80 and 70 km/h. When and where do they meet?",
    "A jacket that costs 85 is reduced by 20 percent, and then by another 10 percent. What is the final price, and "
    "what reduction is that in all?",
    "What is the probability that the sum of two dice is at least 9? List the outcomes.",
    "Find the derivative of f(x) = x^3 - 6x^2 + 9x + 1, and say where f has a maximum and a minimum.",
    "A tank is filled by one pipe in 6 hours and by another in 4 hours. How long do both take together?",
    "Compute the sum of all whole numbers from 1 to 200 that are divisible by 7.",
    "Tom is three times as old as his sister. In six years he will be twice as old as she is. How old are both?",
    "Solve the system 2x + 3y = 12 and x - y = 1, step by step.",
    "A circle has a circumference of 31.4 cm. What is its area? Use 3.14 for pi.",
    "Prove that the sum of two odd numbers is always even.",
    "A bakery makes 240 rolls in the morning and a third fewer in the afternoon. It sells 310. How many are left?",
    "Convert 0.375 to a fraction in lowest terms and explain how.",
    "In how many ways can four people sit in a row if two of them insist on sitting next to each other?",
    "A sum of 2,000 is invested at 3 percent a year with compound interest. How much is it after 4 years?",
    "The mean of five numbers is 14. Four of them are 9, 12, 17 and 20. What is the fifth?",
    "Simplify (2a^2 b)(3ab^3) / (6a b^2) and state which rules you used.",
    "A ladder of 5 metres leans against a wall with its foot 3 metres from it. How high does it reach? If the foot "
    "slips one metre further, how much does the top sink?",
    "Mia saves 15 in the first week and 3 more in each week than in the one before. How much has she saved after 10 "
    "weeks?",
    "Find all solutions of x^2 - 5x + 6 = 0 by factoring and again with the quadratic formula.",
    "A recipe for 6 people takes 450 g of flour and 3 eggs. How much of each is needed for 10 people?",
    "Write the number 84 as a product of primes, and use it to find the greatest common divisor of 84 and 126.",
    "A car uses 6.5 litres of fuel per 100 km. Fuel costs 1.80 a litre. What does a trip of 340 km cost?",
    "A bag has 5 red, 3 blue and 2 green balls. Two are drawn without putting them back. How likely are both red?",
    "Evaluate the integral of 2x + 3 from 0 to 4 and describe the area that it measures.",
    "There are 36 heads and 100 feet of rabbits and hens in a yard. How many of each are there?",
    "A clock shows a quarter past three. What is the angle between its hands? Explain your reasoning.",
    "Three friends share a bill of 74.40 so that the second pays twice as much as the first, and the third 10 more "
    "than the second. What does each pay?",
    "Write 45 in binary and add it to the binary number 10011. Give the result in decimal too.",
)
CHAT = (
    "My neighbour plays the drums every evening. How can I talk to him about it without a quarrel?",
    "Write a short, friendly e-mail to my team that moves tomorrow's meeting from ten to two o'clock.",
    "What is the difference between weather and climate? Explain it as you would to a child.",
    "I want to start running but give up after a week each time. What could I do differently?",
    "Plan a three-day visit to a city by the sea for a family with two small children and little money.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle addressed to him.",
    "Why is the sky red at sunset?",
    "You are the captain of an old sailing ship. Tell a new sailor what the first day on board will be like.",
    "What are the arguments for and against a working week of four days?",
    "Give me five ideas for a birthday present for a father who says that he needs nothing.",
    "How do vaccines work, and why are some of them given twice?",
    "Write a poem of three verses about the first snow in a big city.",
    "My flight was cancelled and the airline does not answer. What steps should I take?",
    "Compare tea and coffee: history, taste, and what they do to the body.",
    "Write a dialogue between a cat and a dog who wait for the same person to come home.",
    "What should I look at when I rent a flat for the first time?",
    "Explain how a mortgage works and what happens if the interest rate rises.",
    "All swans in the park are white. The bird in the pond is black. What can you conclude, and what can you not?",
    "Suggest a simple dinner with chickpeas, spinach and tomatoes, with the steps in order.",
    "What caused the fall of the Roman Empire in the west? Name the most important reasons.",
    "Help me to write a wedding toast for my sister. She is a nurse, loves hiking and is always late.",
    "How can I remember the names of people I have just met?",
    "Describe a market on a Saturday morning so that a reader can hear and smell it.",
    "What is inflation, and who gains from it?",
    "I have an interview for a job in a library next week. Which questions should I prepare for?",
    "Write a review of a restaurant where the food was excellent and the service slow.",
    "Why do people dream? Tell me what is known and what is only supposed.",
    "Pretend that you are a tour guide on the Moon and welcome a group of visitors.",
    "Which houseplants survive in a dark room, and how often do they need water?",
    "How did the invention of printing change the way people lived in Europe?",
    "Give advice to somebody who moves to another country and does not yet speak its language.",
    "What makes a good apology? Give an example of a bad one and improve it.",
)
INSTRUCTIONS = (
    "Summarize the following text in two sentences.",
    "What are the main points of this text? List them briefly.",
    "Write a summary of this text in about fifty words.",
    "Summarize this for a reader who has half a minute.",
)
PROMPTS = {
    "code": CODE,
    "math": MATH,
    "chat": CHAT,
    "summarization": tuple(f"{INSTRUCTIONS[number % len(INSTRUCTIONS)]}\n\n{' '.join(passage.split())}"
                           for number, passage in enumerate(PASSAGES)),
}


def read_prompts(file: Path) -> dict:
    """{task: (prompt, ...)} of a file in Spec-Bench's format: a JSON object a line, of which the first turn counts.

    A task's categories take turns, so that its first few prompts are of all of them. Lines of other categories are
    left out, and so are tasks without a prompt. Raises InputError, with the line, where the file cannot be read.
    """
    by_category = defaultdict(list)
    for number, line in enumerate(_text(file).split("\n"), start=1):  # splitlines would split inside prompts too
        if line.strip():
            category, prompt = _entry(line, f"{file}, line {number}")
            by_category[category].append(prompt)
    prompts = {task: _in_turn([texts for category, texts in by_category.items()
                               if TASK_OF_CATEGORY.get(category) == task]) for task in TASKS}
    if not any(prompts.values()):
        raise InputError(f"{file} has no prompt of a known category ({', '.join(TASK_OF_CATEGORY)}): give a file with "
                         f"lines like {FORMAT}")
    return {task: texts for task, texts in prompts.items() if texts}


def _text(file):
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read ({error}): give a file with lines like {FORMAT}") from error


def _entry(line, place):
    """Category and prompt of a line."""
    try:
        entry = json.loads(line)
        category, prompt = entry["category"], entry["turns"][0]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise InputError(f"{place} is not a prompt ({error!r}): it must look like {FORMAT}") from error
    if not isinstance(category, str) or not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{place} is not a prompt: category and first turn must be text; it must look like {FORMAT}")
    return category, prompt


def _in_turn(lists):
    """The first of each list, then the second of each that has one, and so on."""
    longest = max(map(len, lists), default=0)
    return tuple(texts[rank] for rank in range(longest) for texts in lists if rank < len(texts))
