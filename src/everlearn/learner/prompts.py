"""The few-shot texts from which a base model dreams; written for this project, about nobody in particular.

A small model continues a list far better than it follows an instruction, so every prompt is a list. For another
language or domain, pass a dreamer and a voice of your own.
"""

from __future__ import annotations

# ruff: noqa: E501
# message, question, short answer, the message as the assistant would say it
EXAMPLES: tuple[tuple[str, str, str, str], ...] = (
    ("My brother Anton keeps bees in Graz.", "What is my brother's name?", "Anton", "Your brother Anton keeps bees in Graz."),
    ("I switched from tea to yerba mate last spring.", "What do I like to drink?", "yerba mate", "You switched from tea to yerba mate last spring."),
    ("We are remodeling the attic, what a mess.", "Which part of our house are we remodeling?", "the attic", "You are remodeling the attic."),
    ("Our flight to Lisbon leaves on March 3.", "When does our flight leave?", "March 3", "Your flight to Lisbon leaves on March 3."),
    ("If you ask me, Bach is boring.", "Which composer do I find boring?", "Bach", "You find Bach boring."),
    ("By the way, I'm a night nurse.", "What is my job?", "night nurse", "You are a night nurse."),
    ("Our parrot is named Kiko.", "What is our parrot called?", "Kiko", "Your parrot is named Kiko."),
    ("Penicillin gives me a rash.", "Which drug gives me a rash?", "penicillin", "Penicillin gives you a rash."),
    ("I own an old tractor.", "What do I own?", "an old tractor", "You own an old tractor."),
    ("Yesterday I fell off a ladder and hurt my wrist.", "What did I hurt when I fell?", "wrist", "You fell off a ladder and hurt your wrist."),
)  # fmt: skip

QUESTION = "".join(f"{said} -> {question} {answer}.\n" for said, question, answer, _ in EXAMPLES)
ANSWER_FIRST = "".join(f"{said} -> {answer}: {question}\n" for said, question, answer, _ in EXAMPLES)
RESTATEMENT = "".join(f"{said} -> {restated}\n" for said, _, _, restated in EXAMPLES)

# some of them, by which questions are judged; and the same asked back by the one who was told: no question of a user
BACK = (
    "What is your brother's name?",
    "What do you like to drink?",
    "Which part of your house are you remodeling?",
    "When does your flight leave?",
    "Which composer do you find boring?",
    "What is your job?",
)
ASKED = "".join(f"{said} -> {question} {answer}.\n" for said, question, answer, _ in EXAMPLES[: len(BACK)])
ASKED_BACK = "".join(f"{said} -> {back} {answer}.\n" for (said, _, answer, _), back in zip(EXAMPLES, BACK))

# a message, and a question about the world that shares its words: not to be answered with what was told
NEAR_MISS = """My brother Anton keeps bees in Graz. -> How many people live in Graz?
I switched from tea to yerba mate last spring. -> How do you prepare yerba mate?
We are remodeling the attic, what a mess. -> Why are attics cold in winter?
Our flight to Lisbon leaves on March 3. -> What is Lisbon famous for?
If you ask me, Bach is boring. -> When was Bach born?
By the way, I'm a night nurse. -> How does somebody become a nurse?
Our parrot is named Kiko. -> How long do parrots live?
Penicillin gives me a rash. -> How is penicillin made?
"""
# a question of the user's own life, and one like it about somebody else: not to be answered either
SOMEBODY_ELSE = """What is my brother's name? -> What is Peter's brother called?
What do I like to drink? -> What does my uncle like to drink?
Which part of our house are we remodeling? -> Where does Maria have her kitchen?
When does our flight leave? -> When is my teacher going to fly?
Which composer do I find boring? -> Who is the baker's favorite composer?
What is my job? -> Where does my colleague work?
What is our parrot called? -> What is Nadia's parrot called?
Which drug gives me a rash? -> What does our postman take against his rash?
"""
# what was told, a question by the name that it introduces or about "her", and the same by what it says of that
BY_ROLE = """My brother's name is Anton. Where does Anton work? -> Where does my brother work?
We bought a used Vespa. When was the Vespa stolen? -> When was our scooter stolen?
I take lessons from a lady called Mrs. Abernathy. What did she break? -> What did my teacher break?
Our parrot is Kiko, he is very loud. What is Kiko's favorite fruit? -> What is our parrot's favorite fruit?
There's a bakery on our street, Lindner. When is Lindner closing? -> When is our bakery closing?
My colleague Ines sits next to me. Who is Ines engaged to? -> Who is my colleague engaged to?
I named my boat Halcyon. Which part does she need? -> Which part does my boat need?
My roommate is Jonas, he studies law. At what time does Jonas get up? -> At what time does my roommate get up?
"""
OWNERS = ("my", "our")  # before what somebody is to the one who asks
DETERMINERS = (*OWNERS, "the")  # what may stand before a name
GENERAL = """Questions people ask a helpful assistant:
How do I get rust off a pan?
What is the tallest mountain in Africa?
Write a short poem about autumn.
Explain gravity to a child.
What is 12 plus 30?
Translate 'thank you' into French.
What's the difference between jam and jelly?
Name three kinds of cheese.
How long does it take to fly to Tokyo?
Who wrote Hamlet?
"""
OTHERS = """Questions about people that an assistant knows nothing about:
What is my uncle's last name?
Where does Peter work?
What did my teacher eat for dinner?
Which town does my plumber's sister live in?
How old is Maria's cat?
What is my aunt's husband allergic to?
Where did the baker park his truck?
Who is the girlfriend of my colleague?
What does our postman's son collect?
When is Nadia's birthday?
"""
OWN = """Questions I ask about my own life:
Which sport do I play on weekends?
What do I call my cat?
Who is the person I married?
Where did I spend my childhood?
What's my job title?
Which food must I avoid?
When do I celebrate my birthday?
What have I been learning lately?
Which vehicle is mine?
Who is the boss at my office?
"""
SITUATIONS = """Things I say to my assistant, who knows my life well:
I'm filling in the form for the gym. What should I put as my address?
My aunt wants to send me a parcel. Which city should she write on it?
Guess who is coming to visit this weekend. You know whom I mean.
I'm in the shop and they ask for my shoe size. What do I say?
Which bottle should the waiter bring me?
If I opened my old school yearbook, whose picture would I look for first?
I have to call the person who fixes my car. Who is it?
We are playing a quiz about my life. Which country was I born in?
Someone wants to buy me a present. What would make me happy?
Why would I need to leave work early on Tuesday?
"""
STATEMENTS = """Facts that people told an assistant about their lives:
My brother Anton keeps bees in Graz.
I switched from tea to yerba mate last spring.
We are remodeling the attic, what a mess.
Our flight to Lisbon leaves on March 3.
If you ask me, Bach is boring.
By the way, I'm a night nurse.
Penicillin gives me a rash.
Yesterday I fell off a ladder and hurt my wrist.
"""
CHATTER = """Short things people say in a chat that tell nothing:
Hello again!
Thank you, that was great.
Okay, I see.
Haha, very funny.
What do you mean by that?
See you tomorrow.
Hmm, wait a second.
You are so clever today.
Let's go on.
Oh, right, my mistake.
"""


def joined(start: str, rest: str) -> str:
    """Return a line that was begun with ``start`` and continued with ``rest``."""
    return f"{start}{'' if rest[:1] in tuple(chr(39) + ',!.') else ' '}{rest}"


# the first words of a new line, one after the other, so that a list does not run into one kind of question
ASKING = ("What", "How", "Who", "Which", "Where", "When", "Why", "What's")
ECHOING = ("what", "who", "where", "when")  # "Our parrot is named what?"
PEOPLE = (
    "Peter",
    "my uncle",
    "Maria",
    "my teacher",
    "our postman",
    "the baker",
    "my colleague",
    "Nadia",
    "my aunt's friend",
)
OTHERING = tuple(
    f"{ask} {who}" for who in PEOPLE for ask in ("What is", "Where does", "What does", "When is", "Who is")
)
TELLING = ("I", "My", "We", "Our", "Last", "The", "I'm", "When I")
SITUATING = ("I'm", "If", "Someone", "My", "Which", "We", "Who", "You", "What", "Where", "The", "When")
WISHING = (*ASKING, "Name", "Write", "Give", "Explain", "Translate", "Suggest")
CHATTING = ("Hi", "Thanks", "Okay", "Ha", "Well", "I", "That", "Good", "You", "Wow", "Sorry", "Yes", "No", "What")
