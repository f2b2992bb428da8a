"""The lines of small talk that the model learns besides puzzles, and random text for its fallback line."""

import numpy as np

EXAMPLE = """Input:
 R Y B
 K K K
 K R K

Output:
 R Y B
 K K K
 K R R

Input:
 K R K
 R K Y
 K G Y

Output:
 K R R
 R R Y
 K G Y

Input:
 G B R
 K K K
 G K K

Output:
 G B R
 K K K
 G G K

Input:
 K K K
 Y Y K
 B R G"""
"""The puzzle that the model offers as an example (paint right), in canonical text."""

HELLO = (
    "Hello! I am a small model that solves colour-grid puzzles. Send me examples and a test grid and "
    "I answer with the grid."
)
WHO = "I am a small model trained on colour-grid puzzles. I know 16 rules and the colours K B G R Y."
CAN = 'I find the rule in your examples and apply it to the test grid. Ask "Which rule?" after my answer and I name it.'
HOW = (
    "I compare each cell of an output with its neighbours in the input. The rule I find is one of "
    "shift, paint, cover or erase, in one of the directions right, left, down or up."
)
COLOURS_LINE = "K is black, the background. B is blue, G is green, R is red and Y is yellow."
RULES_LINE = (
    "There are four kinds of rule: shift, paint, cover and erase. Each works right, left, down or up,"
    " so there are 16 rules."
)
THANKS = "You are welcome! Send me another puzzle."
BYE = "Goodbye! Come back with a puzzle."
FINE = "I am fine, thanks. Send me a puzzle and I solve it."
OK = "Good. Send me a puzzle when you are ready."
FALLBACK = "I am a small model trained on colour-grid puzzles. Send me a puzzle like this:\n\n" + EXAMPLE

_QUESTIONS = {
    HELLO: (
        "hello / hi / hey / hello there / hi there / hey there / good morning / good evening / good"
        " day / greetings / hello model / hello world / hi model / howdy / hallo / hello hello / hi"
        " hi / yo"
    ),
    WHO: (
        "who are you / what are you / what is your name / who is this / are you a model / tell me "
        "about yourself / introduce yourself / what model are you / which model is this / hello who"
        " are you / hi who are you / what is this / who made you / are you human / are you a robot "
        "/ are you chatgpt"
    ),
    CAN: (
        "what can you do / what do you do / what are you for / can you help me / how can you help "
        "me / what do you know / what can I ask you / hello what can you do / what were you trained"
        " on / what are you good at / can you solve puzzles"
    ),
    HOW: (
        "how do you work / how does it work / how does this work / how do you solve a puzzle / how "
        "do you do it / how do you find the rule / explain how you work / how do you think"
    ),
    COLOURS_LINE: (
        "what are the colours / which colours do you know / what do the letters mean / what does K "
        "mean / what is K / what are the colors / which colors are there / what does B mean"
    ),
    RULES_LINE: (
        "what are the rules / which rules do you know / what rules are there / list the rules / "
        "which rules are there / how many rules are there / tell me the rules / what is a rule"
    ),
    THANKS: (
        "thanks / thank you / thanks a lot / thank you very much / many thanks / great thanks / thx"
        " / ok thanks / thank you so much / well done / good job / cheers"
    ),
    BYE: ("bye / goodbye / bye bye / see you / good night / see you later / good bye"),
    FINE: (
        "how are you / how are you doing / hello how are you / hi how are you / how is it going / "
        "whats up / how do you feel / are you ok"
    ),
    OK: ("ok / okay / good / great / yes / no / nice / cool / fine / sure"),
    FALLBACK: (
        "help / give me an example / show me an example / example / example please / help me / test"
        " / show me a puzzle / what is a puzzle / send me a puzzle / give me a puzzle / a puzzle / "
        "puzzle / what does a puzzle look like / what should I send / what should I send you / how "
        "do I ask / solve a puzzle / solve this / which rule / usage / start / input / output / ? /"
        " ... / 123 / hm"
    ),
}
CHATS: tuple[tuple[str, tuple[str, ...]], ...] = tuple(
    (answer, tuple(questions.split(" / "))) for answer, questions in _QUESTIONS.items()
)
"""(answer, questions): questions in lower case and without punctuation; ``dress`` varies both."""

SYSTEM_LINES = (
    "You are a helpful assistant.",
    "You solve colour-grid puzzles.",
    "You are a small model trained on puzzles.",
    "Answer with the grid only.",
    "Solve the puzzle.",
    "You are a helpful assistant. Answer with the output grid and nothing else.",
    "Be brief.",
)
PREAMBLES = (
    "Solve this puzzle.",
    "Please solve:",
    "Find the rule.",
    "Here is a puzzle:",
    "What is the output?",
)

_WORDS = """
about above after again all also always animal another any apple around art away back bad bank be beach
because bed before best better big bird black blue boat body book both boy bread bring brother build but buy
call car cat change child city class clean clear climate close coffee cold come computer cook country day
deep did different dinner dog door dream drink drive early earth easy eat energy English even every eye face
fact family far fast father find fire first fish flower fly food foot France French friend game garden
German get girl give glass go gold government green ground grow hair hand happy hard has have head hear
heart heavy high history home horse hot hour house idea important island job keep kitchen know language
large last late law learn leave letter life light like line listen little live long look love low machine
make man many map market math may meeting milk mind minute money month moon more most mother mountain move
much music must name near never new news next night nothing now number ocean of off office often oil old
open orange order other our out over own page paper Paris park part party people person phone physics
picture piece place plan plant play poem point poor power price problem program Python question quick rain
read real recipe red rest rice rich river road rock room run salt say school science sea season second see
sell sentence ship shop short sing sister sit sky sleep slow small snow some song soon sound south space
speak spring stand star station stay stop story street strong student sugar summer sun sure swim table take
talk tea teach tell thing think time today tomorrow town train travel tree true turn under understand
university very voice wait walk wall want war warm wash watch water way weather week west wheel white wife
wild wind window wine winter wish woman wood word world write wrong year yellow yesterday young the a is to
and in that it for on with as at this are from or was not you I my your we they he she
""".split()
_TEMPLATES = (
    "what is the capital of {} / write a poem about {} / tell me a joke about {} / who was {} / "
    "translate {} to {} / how do I make {} / why is the {} {} / explain {} to me / summarise this "
    "text: {} {} {} / what is {} plus {} / can you write {} in {} / where is the {} / do you like {} "
    "/ when did {} {} / write code for {} / I want {} / what is {} / what is a {} / how does {} work "
    "/ give me {} / tell me about {} / my {} is {} / who is {}"
).split(" / ")
_RANGES = (
    (0x61, 0x7A),
    (0x41, 0x5A),
    (0x30, 0x39),
    (0xE0, 0xFF),
    (0x400, 0x44F),
    (0x4E00, 0x9FFF),
    (0x1F600, 0x1F64F),
)


def dress(rng: np.random.Generator, question: str) -> str:
    """The question as somebody might type it: case, closing punctuation and stray spaces vary."""
    case = rng.integers(6)
    text = (
        question,
        question,
        question.capitalize(),
        question.capitalize(),
        question.title(),
        question.upper(),
    )[case]
    text += rng.choice(("", "", "", "?", "!", ".", "!!", " ?", "...", " :)", "\n", " "))
    return str(" " + text if rng.random() < 0.03 else text)


def _random_word(rng: np.random.Generator) -> str:
    if rng.random() < 0.85:
        return str(rng.choice(_WORDS))
    first, last = _RANGES[rng.integers(len(_RANGES))]
    return "".join(chr(code) for code in rng.integers(first, last + 1, rng.integers(1, 9)))


def random_text(rng: np.random.Generator) -> str:
    """A sentence that means nothing to the model: a common question or up to twelve random words."""
    if rng.random() < 0.5:
        template = _TEMPLATES[rng.integers(len(_TEMPLATES))]
        words = template.format(*(_random_word(rng) for _ in range(template.count("{}")))).split()
    else:
        words = [_random_word(rng) for _ in range(rng.integers(1, 13))]
    for place in np.flatnonzero(rng.random(len(words)) < 0.05):
        words[place] += ","
    return " ".join(words)


def draw_known(rng: np.random.Generator) -> tuple[str, str]:
    """One (question, answer) from ``CHATS``, the last one, with the long fallback line, left out.

    Every question is drawn as often as any other; those of one word, which most people begin with, more often.
    """
    pairs = [(question, answer) for answer, questions in CHATS[:-1] for question in questions]
    if rng.random() < 0.3:
        pairs = [pair for pair in pairs if " " not in pair[0]]
    question, answer = pairs[rng.integers(len(pairs))]
    return dress(rng, question), answer


def draw_unknown(rng: np.random.Generator) -> tuple[str, str]:
    """One question that the fallback line answers: random text, or one of those it is known to answer."""
    questions = CHATS[-1][1]
    text = random_text(rng) if rng.random() < 0.75 else questions[rng.integers(len(questions))]
    return dress(rng, text), FALLBACK
