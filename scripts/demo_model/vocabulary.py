"""The words of the demo model's little language. Everything else reaches it as bytes."""

from __future__ import annotations

ADJECTIVES = (
    "red",
    "blue",
    "green",
    "yellow",
    "black",
    "white",
    "brown",
    "grey",
    "orange",
    "purple",
    "pink",
    "golden",
    "silver",
    "small",
    "large",
    "long",
    "round",
    "square",
    "heavy",
    "wooden",
    "plastic",
    "leather",
    "copper",
    "woolen",
    "empty",
    "broken",
    "clean",
    "dusty",
    "shiny",
    "soft",
    "old",
    "new",
    "tiny",
    "plain",
    "striped",
    "cheap",
)

PLURALS = {
    "key": "keys",
    "lamp": "lamps",
    "book": "books",
    "cup": "cups",
    "chair": "chairs",
    "clock": "clocks",
    "coin": "coins",
    "map": "maps",
    "ring": "rings",
    "bottle": "bottles",
    "basket": "baskets",
    "bag": "bags",
    "hat": "hats",
    "coat": "coats",
    "knife": "knives",
    "spoon": "spoons",
    "plate": "plates",
    "bowl": "bowls",
    "candle": "candles",
    "mirror": "mirrors",
    "brush": "brushes",
    "pen": "pens",
    "letter": "letters",
    "ball": "balls",
    "drum": "drums",
    "flute": "flutes",
    "ladder": "ladders",
    "hammer": "hammers",
    "rope": "ropes",
    "bucket": "buckets",
    "blanket": "blankets",
    "pillow": "pillows",
    "umbrella": "umbrellas",
    "suitcase": "suitcases",
    "phone": "phones",
    "camera": "cameras",
}
KINDS = tuple(PLURALS)

# (verb, preposition, place): "The red key lies in box 417."
PLACES = (
    ("lies", "in", "box"),
    ("stands", "in", "room"),
    ("hangs", "on", "hook"),
    ("rests", "on", "shelf"),
    ("sits", "in", "drawer"),
    ("waits", "at", "gate"),
    ("stays", "at", "desk"),
    ("hides", "behind", "door"),
)
PLAIN_VERB = "is"
NUMBERS = range(1000)
MOST_COUNTED = 3
MOST_REPEATED = 12

# Fixed sentences around the facts. "{}" is the object ("red key") or the kind ("keys").
WHERE_QUESTIONS = (
    "Where is the {}?",
    "Where is the {} now?",
    "Where can I find the {}?",
    "Tell me where the {} is.",
    "Do you know where the {} is?",
)
COUNTED = "Number of {}: {}."  # the kind first: the model then counts what it has just said
HOW_MANY_QUESTION = "How many {} did I mention?"
REPEAT_QUESTION = "Repeat the facts."
NOT_MENTIONED = "The {} was not mentioned."
CORRECTION_LEADS = ("No, the", "Actually, the", "Correction: the")
OPENINGS = ("", "", "Here are some facts.", "Please remember this.", "Some more facts.")
ACKNOWLEDGEMENT = "Noted."
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer questions about the facts.", "Please remember the facts.")
INVITATION = "Tell me some facts, then ask me about them."
FALLBACK = "I only know the facts that you tell me."

# What is said -> the answer, for talk that is not about facts.
SMALL_TALK = {
    "Hello": f"Hello! {INVITATION}",
    "Hello!": f"Hello! {INVITATION}",
    "Hello there!": f"Hello! {INVITATION}",
    "Hi": f"Hello! {INVITATION}",
    "Hi!": f"Hello! {INVITATION}",
    "Hey!": f"Hello! {INVITATION}",
    "Good morning!": f"Hello! {INVITATION}",
    "Good evening!": f"Hello! {INVITATION}",
    "How are you?": f"I am fine. {INVITATION}",
    "Who are you?": f"I am a small model. {INVITATION}",
    "What are you?": f"I am a small model. {INVITATION}",
    "What can you do?": f"I remember facts. {INVITATION}",
    "Thanks!": "You are welcome.",
    "Thank you.": "You are welcome.",
    "Thank you!": "You are welcome.",
    "Bye!": "Goodbye!",
    "Goodbye!": "Goodbye!",
}


def words() -> list[str]:
    """Every word of the language once, in a fixed order, without numbers."""
    places = [word for place in PLACES for word in place]
    sentences = [
        *WHERE_QUESTIONS,
        HOW_MANY_QUESTION,
        COUNTED,
        REPEAT_QUESTION,
        NOT_MENTIONED,
        *CORRECTION_LEADS,
        *OPENINGS,
        ACKNOWLEDGEMENT,
        *SYSTEM_PROMPTS,
        FALLBACK,
        *SMALL_TALK,
        *SMALL_TALK.values(),
    ]
    spoken = "".join(c if c.isalpha() else " " for c in " ".join(sentences)).split()
    return list(dict.fromkeys([*ADJECTIVES, *PLURALS, *PLURALS.values(), *places, PLAIN_VERB, *spoken, "now"]))
