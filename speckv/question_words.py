"""The words of the made-up questions in questions.py: what they are about and how they are put. All are our own."""

NAMES = (
    "Anna", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kofi", "Lena", "Marco",
    "Nadia", "Oscar", "Priya", "Quentin", "Rosa", "Samir", "Tina", "Uma", "Victor", "Wendy", "Yusuf", "Zoe", "Amy",
    "Bruno", "Chloe", "Derek", "Emma", "Felix", "Gina", "Henry", "Isabel", "Jack", "Kate", "Liam", "Maya", "Noah",
    "Olivia", "Peter", "Rachel", "Sam", "Tom", "Mr. Lewis", "Mrs. Chen", "Sarah's brother", "Daniel", "Julia", "Martha")
THINGS = (
    "apples", "books", "marbles", "stamps", "pencils", "tickets", "cookies", "bottles", "eggs", "coins", "chairs",
    "flowers", "photos", "stickers", "shirts", "bricks", "candles", "oranges", "cards", "toys", "balloons", "cupcakes",
    "pens", "seeds", "shells", "beads", "magazines", "sandwiches", "trees", "lamps", "plates", "pizzas", "letters",
    "tomatoes", "puzzles", "socks", "hats", "fish", "kites", "bagels")
PLACES = (
    "a bakery", "a school", "a farm", "a library", "a factory", "a museum", "a garden", "a hotel", "a cinema",
    "a bookshop", "a market", "a garage", "a theatre", "a cafe", "a zoo", "a hospital", "a toy shop", "a gym",
    "an office", "a post office", "an airport", "a restaurant")
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
    "the European Union", "camping", "fermentation", "satellites", "online learning", "the brain", "salt", "rivers",
    "unemployment", "superconductors", "the Black Death", "stoicism", "the opera", "a trip to Hawaii", "monopolies",
    "blockchain", "the Magna Carta", "house plants", "the ozone layer", "cooking pasta", "the Ottoman Empire",
    "stress at work", "the speed of light", "game theory", "spiders", "the history of mathematics", "Buddhism",
    "the minimum wage", "mitochondria", "street food", "acids and bases", "the Amazon river", "writing a novel",
    "the United Nations", "owning a dog", "radioactivity", "the Aztecs", "photography", "blood pressure", "probability",
    "the Sahara", "the Suez Canal", "taxes", "yoga", "the theory of relativity", "first aid", "the Vikings", "wolves",
    "the carbon cycle", "social media", "chocolate", "parenting", "smartphones", "the Wright brothers", "coffee",
    "the greenhouse effect", "small talk", "knitting", "semiconductors", "the Russian Revolution", "hurricanes",
    "search engines", "diabetes", "the Beatles", "steam engines", "a good night routine", "human rights", "volcanic "
    "islands", "the two-party system", "painting with watercolours", "enzymes", "Japan", "Brazil", "Kenya", "Paris",
    "New York", "Rome", "the Arctic", "penguins", "vitamin C", "the gold standard", "compilers", "neural networks",
    "operating systems", "version control", "databases", "the World Cup", "swimming", "tennis", "ballet", "the tango",
    "ancient Greece", "Plato", "Newton's laws", "the Civil War in America", "the Second World War", "Napoleon",
    "Marie Curie", "Leonardo da Vinci", "Mozart", "Albert Einstein", "Cleopatra", "Gandhi", "Charles Darwin",
    "leadership", "team work", "conflict with a neighbour", "a wedding toast", "a birthday party for a child",
    "a resume without experience", "learning Spanish", "the origin of language", "tigers", "elephants", "sharks",
    "dinosaurs", "the ice age", "plate tectonics", "the human eye", "the lungs", "memory", "anxiety", "happiness",
    "the scientific method", "entropy", "magnets", "batteries", "solar panels", "rockets", "Mars", "the Milky Way",
    "comets", "the Big Bang", "prime numbers", "triangles", "the number pi", "fractions", "statistics", "calculus",
    "mortgages", "insurance", "start-ups", "marketing to young people", "brand names", "global trade", "cities of the "
    "future", "self-driving cars", "robots in hospitals", "3D printing", "virtual reality", "fake news", "the death "
    "penalty", "school uniforms", "homework", "zoos", "eating meat", "plastic bags", "tourism", "the four-day week")
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
    "a new law on renting flats", "a scientist who finds a new kind of frog",
    "a footballer who signs for a rival", "a plane that makes an emergency landing", "police who find a lost child",
    "a singer who cancels a tour", "a family that sues a hospital", "a president who visits a disaster zone",
    "a student suspended for a joke", "a record price at an auction", "an outbreak of flu in a nursing home",
    "a mountain climber missing for days", "a tennis player who retires", "an oil spill on a beach",
    "a lottery winner who gives it all away", "a minister who resigns", "a dog that saves its owner",
    "two trains that collide", "a village that runs out of water", "a film that breaks records",
    "a prison escape", "a video that costs a teacher the job", "a restaurant closed by inspectors",
    "a soldier who comes home", "protests against a pipeline", "a cyber attack on a city")
PEOPLE = (
    "a composer", "a river", "a mountain village", "an actress", "a football club", "a university", "a painter",
    "a battle", "an island", "a television series", "a rock band", "a castle", "a physicist", "a newspaper",
    "a film", "a railway line", "a politician", "a species of bird", "a novel", "a bridge", "a disease", "a law",
    "a currency", "a sports stadium", "a queen", "a medieval town", "a video game", "a song", "a treaty", "a volcano",
    "a holiday", "a dish", "an explorer", "a constitution", "a plant", "a chemical element", "a space mission")
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
    "Write a speech about {topic}.", "What is the connection between {topic} and {other}?",
    "Write a product description that mentions {topic}.", "Draft a letter to a newspaper about {topic}.",
    "You are a pirate. Tell me what you think of {topic}.", "Give three examples that show why {topic} is hard to "
    "explain.", "Can you recommend some books about {topic}?", "Make a quiz with four questions about {topic} and give "
    "the answers.", "Write a haiku about {topic}, then explain it.", "How would you explain {topic} to somebody who "
    "only knows {other}?", "Write the beginning of a mystery novel in which {topic} plays a part.", "What are the "
    "causes and the consequences of {topic}?", "Define {topic} and give an example.", "Rewrite this sentence more "
    "formally: I really think {topic} is a big deal and everyone should know it.", "Fix the grammar: she don't knows "
    "nothing about {topic} because nobody have told her.", "Write a persuasive email to your boss about {topic}.",
    "Describe a scene with {topic} that the reader can smell.", "Make a table that compares {topic} with "
    "{other}.", "Which came first, {topic} or {other}?", "In one paragraph, what is the future of {topic}?",
    "Act as a doctor who is asked about {topic}. What do you say?", "Write a funny advertisement for {topic}.",
    "Tell me about {topic} in the style of a fairy tale.", "Explain in simple words how {topic} and {other} differ, "
    "and give advice to a beginner.", "What should I ask an expert on {topic}?", "Write a step-by-step guide to "
    "{topic}.", "Is it true that {topic} has changed history? Give evidence.", "Write a review of a documentary about "
    "{topic}.", "Create a plan for a week to learn about {topic}.", "when was {topic} first mentioned", "who is known "
    "for {topic}", "where can you find {topic}", "what does {topic} mean", "how many kinds of {topic} are there",
    "Name three famous people connected with {topic} and say why.", "Translate to French: I am interested in {topic}.",
    "Translate into English: Ich möchte mehr über {topic} wissen, weil es wichtig ist.", "Write a summary of what "
    "scientists know about {topic}, in bullet points.", "If you had to argue against {topic}, what would you say?")
CODE = (
    "Write a Python function that {task}.", "Write a function to {base}.", "Implement a class in Python that {task}.",
    "How do I {base} in Python? Show an example.", "Write a Python script that {task} and prints the result.",
    "Write a program in JavaScript that {task}.", "Write a C++ function that {task}.",
    "Write unit tests for a Python function that {task}.", "Give an efficient algorithm to {base}, with code.",
    "Write a Java method that {task}.", "Explain step by step how to {base}, then write the code.",
    "I wrote a function that {task}, but it is too slow. How can I make it faster?", "Write a one-line Python "
    "expression that {task}.", "Write a recursive function that {task}, and one with a loop.", "What is the time "
    "complexity of a program that {task}?", "Write a bash script that {task}.", "Write a Go function that {task}.")
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
    ("returns the second largest element", "find the second largest element"), ("makes passwords", "make passwords"),
    ("converts a number to binary", "convert a number to binary"), ("finds missing numbers", "find a missing number"),
    ("draws a bar chart", "draw a bar chart"), ("compresses a string by run lengths", "compress a string"),
    ("inserts into a binary search tree", "build a binary search tree"), ("sends an e-mail", "send an e-mail"),
    ("generates all permutations", "list all permutations of a string"), ("plays tic-tac-toe", "write tic-tac-toe"),
    ("keeps an inventory of a shop", "model the inventory of a shop"), ("counts inversions", "count inversions"),
    ("finds the longest increasing subsequence", "find the longest increasing subsequence"),
    ("queries an SQLite database", "query a database"), ("serves a small web page", "write a small web server"),
    ("moves zeros to the end", "move the zeros of a list to the end"), ("capitalizes each word", "capitalize words"),
    ("evaluates an arithmetic expression", "evaluate an expression"), ("rounds to n digits", "round numbers"),
    ("estimates pi at random", "estimate pi"), ("finds the mode of a list", "find the most frequent element"),
    ("simulates a bank account", "model a bank account"), ("solves a sudoku", "solve a sudoku"),
    ("schedules meetings", "find free time between meetings"), ("renames files in a folder", "rename files"))
ABOUT_CODE = (
    "Explain what this function does:\n```python\n{code}\n```", "Complete this function:\n```python\n{head}\n```",
    "Write a docstring for this function:\n```python\n{code}\n```", "{head}",
    "Complete the following Python code.\n\n{head}", "Is there a bug in this code?\n```python\n{code}\n```",
    "Rewrite this function so that it is easier to read:\n```python\n{code}\n```",
    "Write a test for this function:\n```python\n{code}\n```", "Add comments and type hints:\n\n{code}",
    "Translate this Python function to JavaScript:\n```python\n{code}\n```", "```python\n{head}\n```\nFinish it.",
    "What does this print, and when does it fail?\n{code}", "def solution():\n    pass\n\n{head}")
SUMMARIZE = ("Summarize: {text}", "Summarize the following text:\n{text}", "{text}\n\nSummarize this in two sentences.",
             "Give me a summary of this article:\n{text}", "What are the main points of this text?\n\n{text}",
             "{text}\nTL;DR:", "Write a headline and a short summary for this:\n{text}", "Summary of: {text}\n",
             "Shorten this to a third of its length:\n\n{text}", "Rewrite this text in simple English.\n\n{text}",
             "Summarize this in bullet points.\n{text}")
ASK_ABOUT = ("{text}\n\nBased on this passage, what is it mainly about?", "Context: {text}\n\nQuestion: Who or what is "
             "described?\nAnswer:", "{text}\n\nList three facts stated in the text.", "Answer from the text below.\n"
             "{text}\n\nWhat happened, and why?", "Read this and answer: what is the most important detail?\n\n{text}",
             "{text}\n\nWhen and where does this take place?", "Extract all names, places and dates from this text and "
             "print them as JSON.\n\n{text}", "Use these notes to answer the question.\n{text}\nQuestion: how did it "
             "begin?", "Here is some text:\n{text}\nIs its tone positive, negative or neutral? Explain.", "{text}\n\n"
             "Continue the text.")
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
    "If {d} workers build a wall in {b} days, how long do {a} workers need?",
    "{name} bakes {c} {things} and puts them in bags of {b}. {d} bags are sold for ${a} each. How much is "
    "earned, and how many {things} remain?", "There are {a} rows of {b} seats at {place}, and {c} people come. How "
    "many must stand?",
    "{name} has three times as many {things} as {friend}, who has {a} more than {b}. How many has {name}?",
    "In a class of {a} pupils, {b} play football, {d} play chess and none does both. What percentage does neither?",
    "A tank holds {c} litres. {a} litres run out each hour and {b} run in. When is it empty?",
    "Every morning {name} drinks {d} cups of tea with {b} grams of sugar each. How much sugar is that in {a} days?",
    "{name} drives {c} miles on {a} gallons. How many gallons are needed for {b} hundred miles?",
    "A phone plan costs ${a} a month and ${b} for each extra gigabyte. What does {name} pay for {d} extra gigabytes in "
    "a year?", "Given f(x) = {a}x^2 - {b}x + {d}, find f({b}) and the derivative.", "Factor x^2 + {b}x + {d}.",
    "The vertices of a triangle are at (0, 0), ({a}, {b}) and ({d}, 0). What is its area?",
    "What is the remainder when {c} is divided by {b}?", "How many different committees of {d} can be chosen from {a} "
    "people?", "{name} ran {a} laps and {friend} {b} fewer. A lap is {c} metres. How far did they run in all?",
    "{place_start} gave a discount of {a}% on {d} {things} at ${c} each. What was paid?",
    "Half of {name}'s {c} {things} are red, a third of the rest are blue. How many are neither?")
