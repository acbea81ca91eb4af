"""The built-in prompts: what is asked (by split and category) and what it is asked about.

Heads guess best what is worded like the text they learnt from, so training has many forms of question, and calibration
and test have forms of their own: what is promised on one of them then holds for questions nobody has seen.

A form is a format string. Fields: topic, other (a second topic), who, role, place, passage, n, m, k (n > m > k).
The eight categories are those of MT-bench (arXiv 2306.05685), so that built-in and given tests can be read side by
side. All sentences were written for this file.
"""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "calibration", "test"]

FORMS: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "writing": (
            "Write a short essay about {topic}.",
            "Write a blog post about {topic} for beginners. Use headings and a friendly tone.",
            "Write an email to {who}, who leads your team, and propose a small project about {topic}.",
            "Write a poem about {topic}.",
            "Write a short story that takes place in {place} and has something to do with {topic}.",
            "Draft a speech of two minutes about {topic} for the opening of a fair in {place}.",
            "Give me three slogans for a campaign about {topic}, and say whom each is meant for.",
            "Make an outline for a talk about {topic}, with an introduction, three main points and a conclusion.",
            "Describe {place} in the early morning so that the reader can smell and hear it.",
            "Rewrite the following text so that a child of ten understands it.\n\n{passage}",
            "Rewrite this text in a formal style and correct all mistakes.\n\n{passage}",
            "Continue this text with two more paragraphs.\n\n{passage}",
            "Write a product description for something new that is connected with {topic}.",
            "Write a dialogue between {who} and a stranger about {topic}.",
            "Write a letter of complaint about a course on {topic} in {place}.",
            "Write a news article about an unexpected discovery concerning {topic}.",
        ),
        "roleplay": (
            "You are {role}. Explain {topic} to somebody who visits you for the first time.",
            "Pretend to be {role} and answer this question: why should I care about {topic}?",
            "Act as {role}. I will ask you questions. My first question is: what can go wrong with {topic}?",
            "Imagine you are {role} in {place}. Describe an ordinary day of your work.",
            "Speak as if you were {topic}. What would you tell people about yourself?",
            "I want you to act as an interviewer. Ask {who}, {role}, five questions about {topic}.",
            "You are a tour guide in {place}. A guest asks about {topic}. What do you say?",
            "Play the part of {role}, who does not believe in {topic}, and defend your view.",
            "You are a friendly assistant in a shop. I want something for {topic}. Ask me what you need to know.",
        ),
        "reasoning": (
            "What are the advantages and disadvantages of {topic}?",
            "Compare {topic} and {other}, step by step.",
            "{who} is older than Maria. Maria is older than Tom. Who is the youngest? Explain your reasoning.",
            "If all friends of {who} like {topic}, and Peter does not, is Peter a friend of {who}? Why?",
            "{who} walks {n} steps north, {m} steps east and {n} steps south. Where does {who} stand now? Explain.",
            "There are {m} red and {n} blue balls in a box. How many must you take to be sure of two of one colour?",
            "{who} says that {topic} will be forgotten in a hundred years. Is that likely? Argue both sides.",
            "Every morning {who} takes an umbrella along, even when the sun shines. Give three possible reasons.",
            "Which one does not belong with the others: {topic}, {other}, a spoon? Explain why.",
            "Read the text and answer the question: what is the main idea, and what follows from it?\n\n{passage}",
            "A shelf has four books: a red one left of a blue one, a green one at the right end, a white one next to "
            "the green one. In which order do they stand? Think step by step.",
            "Should a small town spend {n} thousand dollars on {topic} or on {other}? Give a reasoned answer.",
            "Today is Wednesday. What day of the week will it be in {n} days? Show how you got there.",
        ),
        "math": (
            "A shop sells {n} tickets a day at {m} dollars each. How much does it earn in a week? Explain.",
            "What is {n} times {m} plus {k}? Show each step.",
            "{who} buys {k} pens for {m} dollars each and a book for {n} dollars. How much does {who} pay in all?",
            "A train travels {n} kilometres in {k} hours. How fast is it, and how far does it get in {m} hours?",
            "Solve the equation {k}x + {m} = {n} for x.",
            "The sides of a rectangle are {n} and {m} centimetres long. What are its area and its perimeter?",
            "In a class of {n} students, {m} play chess and {k} of them sing. How many play chess but do not sing?",
            "Find all x with x^2 - {n}x + {m} = 0, or explain why there are none.",
            "A jar holds {n} marbles, of which {m} are green. What is the chance of drawing a green one?",
            "Make up a word problem about {topic} that needs two steps of arithmetic, and solve it.",
            "If f(x) = {k}x^2 - {m}x + {n}, what is f({k})?",
            "What is the sum of all whole numbers from {m} to {n}?",
            "{who} saves {m} dollars every week. After how many weeks can {who} buy something for {n}0 dollars?",
            "A price of {n} dollars rises by {m} percent. What is the new price? Explain how you calculate it.",
        ),
        "coding": (
            "Write a Python function that stores and sorts a list of records about {topic}.",
            "Write a small Python class that represents {topic} and print an example.",
            "Write a Python function that returns the {k} largest numbers of a list.",
            "Write a function in Python that checks whether a string is a palindrome.",
            "Write a program that reads a text file and counts its lines, words and characters.",
            "Write a simple HTML page about {topic} with a heading, a list and a button.",
            "Write a JavaScript function that filters a list of objects about {topic} by name.",
            "Implement binary search in Python and explain its complexity.",
            "Implement a stack with push, pop and peek in Python.",
            "Write an SQL query that finds the {m} most recent orders about {topic}.",
            "Write a C++ program that prints the first {n} prime numbers.",
            "Write a function that merges two dictionaries and adds the values of equal keys.",
            "Write a recursive function that computes the {n}th Fibonacci number, then make it faster.",
            "Explain what this code does and how to improve it:\n\ndef f(a):\n    r = []\n    for x in a:\n"
            "        if x % {k} == 0:\n            r.append(x * {m})\n    return r",
            "Write unit tests in Python for a function that adds up the prices of a shopping cart.",
            "Write a Python script that downloads data about {topic} from a web service and saves it as CSV.",
            "Implement a linked list in Python with methods to insert, delete and reverse.",
            "Write a Python function that finds the longest word in a sentence and returns it with its length.",
            "Implement breadth first search on a graph given as a dictionary of lists.",
            "Write a Java class for {topic} with a constructor, two methods and a main method.",
        ),
        "extraction": (
            "List five facts about {topic} as a numbered list.",
            "Make a table with two columns, term and meaning, about {topic}.",
            "Read the text and list all names of people and places in it.\n\n{passage}",
            "Summarise the following text in one sentence.\n\n{passage}",
            "Write the facts of this text as JSON with the keys who, what, where and when.\n\n{passage}",
            "Which numbers and dates does this text contain, and what do they stand for?\n\n{passage}",
            "Extract the key words of this text and output them as a list, separated by commas.\n\n{passage}",
            "Rate these three comments about {topic} from 1 (bad) to 5 (good):\n1. I loved every minute of it.\n"
            "2. It was fine, but I would not do it again.\n3. A waste of money.",
            "Turn this list into a JSON array of objects with the keys name and price: {topic} {n}, {other} {m}.",
            "Sort these words into groups and name each group: {topic}, {other}, apple, hammer, pear, saw.",
            "Is the mood of this text positive, negative or neutral? Give a reason.\n\n{passage}",
            "Give ten words that belong to {topic}, in alphabetical order.",
        ),
        "stem": (
            "Explain the science behind {topic} to a student.",
            "What physical laws matter for {topic}? Give the formulas.",
            "What is the difference between {topic} and {other} from the point of view of an engineer?",
            "Describe an experiment about {topic}: what you need, what you do, what you expect.",
            "What are the main causes of problems with {topic}, and how do engineers solve them?",
            "How do plants, animals and people depend on {topic}?",
            "What happens in the body of a person who has a lot to do with {topic}? Describe it in steps.",
            "Explain how a computer could be used to study {topic}.",
            "Name three recent developments in {topic} and explain how they work.",
            "Which materials are used for {topic}, and what properties make them suitable?",
            "What is the chemical background of {topic}? Write a short explanation with an example.",
            "Design a simple device that has to do with {topic}. Which factors would you consider?",
        ),
        "humanities": (
            "What is the history of {topic}?",
            "Why is {topic} important for society?",
            "How did {topic} change the economy? Give examples from two countries.",
            "Discuss the ethical questions that {topic} raises.",
            "How has {topic} been shown in art and literature?",
            "Explain how laws about {topic} differ between countries, and why.",
            "Give me five ideas for teaching {topic} in school, each with an activity.",
            "What are good manners when people meet around {topic}? Give some examples.",
            "What would a philosopher ask about {topic}?",
            "Describe the life of people who worked with {topic} a hundred years ago.",
            "What are the key principles of a good argument about {topic}?",
            "How do {topic} and {other} influence each other in modern culture?",
        ),
    },
    "calibration": {
        "writing": (
            "Put together a newsletter paragraph that makes busy readers curious about {topic}.",
            "Tell a fable whose moral has to do with {topic}. Keep it under 150 words.",
            "Could you polish the wording of this paragraph and give it a title?\n\n{passage}",
        ),
        "roleplay": (
            "From now on you are {role}, and I am your apprentice. Teach me the first thing about {topic}.",
            "Let us play: you are a radio host, and tonight's programme is about {topic}. Begin.",
        ),
        "reasoning": (
            "Three boxes are labelled wrongly: nuts, screws, mixed. You may draw one piece from one box. Which box do "
            "you choose, and why?",
            "Someone claims that {topic} caused {other}. Which evidence would convince you, and which would not?",
            "Ann stands in front of {who}, and {who} stands in front of Bo. Who is in the middle? Explain briefly.",
        ),
        "math": (
            "A tank loses {k} litres an hour. It held {n} litres at noon. When will {m} litres be left?",
            "Two numbers add up to {n} and differ by {k}. Which numbers are they?",
            "How many whole numbers between {m} and {n} can be divided by {k}?",
        ),
        "coding": (
            "I need a command line tool in Python that renames all pictures in a folder by date. Please write it.",
            "Given a list of intervals, merge those that overlap. Write the code and explain its running time.",
            "Show me how to draw a bar chart about {topic} in Python.",
        ),
        "extraction": (
            "Here is a note. Give me every person, place and number in it, one a line, with its type.\n\n{passage}",
            "From the following passage, answer in a table: subject, time, result.\n\n{passage}",
        ),
        "stem": (
            "My nephew wants to know what really goes on inside {topic}. Could you walk him through it?",
            "What limits the efficiency of {topic}? Mention energy, materials and cost.",
        ),
        "humanities": (
            "In what ways have governments tried to steer {topic}, and with what success?",
            "Suggest a reading list of four kinds of sources on {topic} and say what each can teach.",
        ),
    },
    "test": {
        "writing": (
            "Write an email to a colleague who wants to learn about {topic}.",
            "Describe {topic} in vivid language for a travel magazine.",
        ),
        "roleplay": (
            "You are a museum guide. Tell your visitors about {topic}.",
            "Pretend to be a grandfather who explains {topic} to a child.",
        ),
        "reasoning": (
            "Compare {topic} with its most common alternative, step by step.",
            "What would happen if {topic} disappeared tomorrow? Think it through.",
        ),
        "math": (
            "{who} reads {m} pages about {topic} every evening. How long does a book of {n}0 pages last? Explain.",
            "Half of the {n}0 visitors of a show about {topic} paid {k} dollars, the others nothing. What came in?",
        ),
        "coding": (
            "Write a Python program that asks five quiz questions about {topic} and counts the right answers.",
            "Write a class that keeps a calendar of events about {topic} and prints the next one.",
        ),
        "extraction": (
            "Name the main parts of {topic} and the purpose of each as a list.",
            "Give the three most important years in the story of {topic} and what happened in them.",
        ),
        "stem": ("How does {topic} work? Name the main parts and what each does.",
                 "Which measurements would tell you whether {topic} is in good condition?"),
        "humanities": ("How did {topic} spread around the world?",
                       "What do people in different cultures associate with {topic}?"),
    },
}  # fmt: skip

TOPICS: dict[Split, tuple[str, ...]] = {
    "train": (
        "bicycles", "solar energy", "the printing press", "bread baking", "volcanoes", "public libraries", "chess",
        "rainforests", "electric cars", "the Roman Empire", "beekeeping", "photography", "river dams", "vaccines",
        "jazz music", "coffee", "earthquakes", "online learning", "wind turbines", "gardening", "the Silk Road",
        "satellites", "swimming", "recycling", "the human heart", "railways", "theatre", "whales", "cheese making",
        "the stock market", "mountain hiking", "clocks", "bridges", "weather forecasts", "sleep", "tea ceremonies",
        "robots", "glass", "elections", "marathon running", "the periodic table", "dolphins", "paper", "castles",
        "computer networks", "the sense of smell", "wheat farming", "cinema", "databases", "inflation", "antibiotics",
        "neural networks", "black holes", "taxes", "rivers", "friendship", "human rights", "video games", "acids",
        "evolution", "trade unions", "the water supply", "remote work", "fashion", "magnetism", "banks", "nutrition",
        "encryption", "the French Revolution", "memory", "tourism", "plastic", "poetry", "microscopes", "family trees",
        "supply chains", "yoga", "nuclear power", "opera", "search engines", "dentistry", "insects", "insurance",
        "the Renaissance", "traffic lights", "stress", "statistics", "rockets", "advertising", "democracy", "salt",
    ),
    "calibration": (
        "lighthouses", "the immune system", "pottery", "city parks", "sailing ships", "honey", "gravity", "museums",
        "batteries", "folk dances", "the moon", "markets",
    ),
    "test": (
        "telescopes", "the ancient Olympic Games", "public transport", "chocolate", "coral reefs", "violins",
        "steam engines", "vegetable soup", "penguins", "maps", "the water cycle", "newspapers",
    ),
}  # fmt: skip

PEOPLE: dict[Split, tuple[str, ...]] = {
    "train": ("Anna", "Carlos", "Mei", "David", "Fatima", "Oliver", "Priya", "Samuel", "Lucy", "Ahmed", "Julia", "Ben"),
    "calibration": ("Greta", "Ivan", "Noor"),
    "test": ("Hugo", "Leila", "Martin"),
}
ROLES: dict[Split, tuple[str, ...]] = {
    "train": (
        "a doctor", "a patient teacher", "a chef", "a lawyer", "a sea captain", "a historian", "a software engineer",
        "a gardener", "a journalist", "a physicist", "a football coach", "a detective", "a king", "a farmer",
        "a famous singer", "a robot from the future", "a librarian", "a travel agent",
    ),
    "calibration": ("a carpenter", "an astronomer", "a judge"),
    "test": ("a nurse", "a baker", "a pilot"),
}  # fmt: skip
PLACES: dict[Split, tuple[str, ...]] = {
    "train": ("Lisbon", "a village in the Alps", "Chicago", "Nairobi", "a harbour town", "Mumbai", "a desert camp",
              "Buenos Aires", "an old factory", "Seoul", "a small island", "the night train to Vienna"),
    "calibration": ("Oslo", "a market square", "Cairo"),
    "test": ("Prague", "a mountain hut", "Lima"),
}  # fmt: skip

PASSAGES: dict[Split, tuple[str, ...]] = {
    "train": (
        "The old mill at Harrow was built in 1832 by Jacob Stone. It ground corn for three villages until a fire in "
        "1901. Since 1987 it has been a museum, and about 12,000 people visit it every year.",
        "Last Tuesday the city council of Brenton voted for a new tram line. Mayor Ellen Ward said that it would cost "
        "48 million dollars and carry 20,000 passengers a day. Two members of the council left the room in protest.",
        "me and my brother was going to the lake yesterday but the car dont start so we has to walk. it take us two "
        "hours and when we arrive the restaurant were closed already.",
        "Water expands when it freezes, because its molecules form an open lattice. That is why ice floats, why pipes "
        "burst in winter and why the fish of a lake survive under the ice.",
        "Dear team, the delivery from Rotterdam is late again. We expected 40 boxes on 3 March and received 25 on 9 "
        "March. Please call Mr Jansen, and tell our customers in Leeds and York before Friday.",
        "The Blue Door is a novel by Carla Mendez, published in 1998. It follows Tomas, a clockmaker in Porto, who "
        "finds a letter that was never sent. Critics praised its quiet humour; readers bought half a million copies.",
        "Small shops are disappearing from many towns. Some people blame the internet, others the rents. Where towns "
        "closed a street to cars and lowered the fees for market stalls, the shops came back within five years.",
        "Sugar consumption fell by 8 percent between 2010 and 2020, while the share of adults who exercise twice a "
        "week rose from 31 to 44 percent. Doctors warn that the two figures need not have anything to do with each "
        "other.",
        "Captain Lee checked the compass twice. The fog had swallowed the coast, and somewhere ahead a bell was "
        "ringing where no bell should be.",
        "The company Norlight of Helsinki makes lamps from recycled plastic. It was founded by Aino Virta and Pekka "
        "Salo in 2015, has 60 employees, and sells to 14 countries. Its best year was 2022, with 9.5 million euros.",
        "I stayed at the Garden Hotel for three nights. The room was clean and the breakfast wonderful, but the street "
        "was loud and nobody answered the telephone at the desk. I might come back in winter.",
        "Bees find their way by the sun and tell each other where flowers are by dancing. The angle of the dance shows "
        "the direction, its length the distance. Karl von Frisch described this and won a Nobel Prize in 1973.",
        "Our school has 420 pupils and 31 teachers. On 12 May we will plant a hundred trees behind the sports hall. "
        "Parents who want to help should write to Mrs Okafor by the end of April.",
        "A right is worth little if nobody can afford to claim it. For this reason many countries pay the lawyer of a "
        "poor defendant. The first such law is said to come from Scotland, in 1424.",
    ),
    "calibration": (
        "On 4 July 1911 the steamer Elise left Bergen with 87 passengers. A storm drove her off course; she reached "
        "Aberdeen two days late. Her engineer, Olaf Dahl, was given a medal.",
        "The library of Westbrook lends tools since last autumn. Drills are the favourite: 140 loans in six months. "
        "The head of the library, Rosa Klein, now looks for a larger room.",
    ),
    "test": ("In 1969 the bakery of Emil Novak burnt down. Neighbours in Brno rebuilt it in five weeks.",),
}  # fmt: skip
