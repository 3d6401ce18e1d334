"""English text as TorToise reads it (arXiv 2305.07243): no accents, lower case, numbers and titles in words.

Must match the original's `english_cleaners` (whose numbers are those of the package inflect) and, with
`style="transformers"`, the normaliser of transformers' `ClvpTokenizer`, which differs: it drops all that is
not ASCII where the original writes it in ASCII, reads 1984 as one thousand, nine hundred eighty-four, and
spells ordinals as in "twond". Numbers of more than 36 digits are read digit by digit; the original fails.

A quirk kept: £ is written "PS" before prices are looked for, so that only the other style reads pounds.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

from ldm_audio.errors import InputError

Style = Literal["original", "transformers"]

SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
THOUSANDS = [
    "thousand", "million", "billion", "trillion", "quadrillion", "quintillion", "sextillion", "septillion",
    "octillion", "nonillion", "decillion",
]  # fmt: skip
IRREGULAR_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip
ABBREVIATIONS = {
    "mrs": "misess", "mr": "mister", "dr": "doctor", "st": "saint", "co": "company", "jr": "junior",
    "maj": "major", "gen": "general", "drs": "doctors", "rev": "reverend", "lt": "lieutenant",
    "hon": "honorable", "sgt": "sergeant", "capt": "captain", "esq": "esquire", "ltd": "limited",
    "col": "colonel", "ft": "fort",
}  # fmt: skip
# What has no decomposition of its own, as the original's transliteration writes it.
ASCII = str.maketrans(
    {
        "¡": "!", "¢": "C/", "£": "PS", "¤": "$?", "¥": "Y=", "¦": "|", "§": "SS", "¨": '"', "©": "(c)",
        "«": "<<", "¬": "!", "\xad": "", "®": "(r)", "¯": "-", "°": "deg", "±": "+-", "´": "'", "µ": "u",
        "¶": "P", "·": "*", "¸": ",", "»": ">>", "¼": " 1/4", "½": " 1/2", "¾": " 3/4", "¿": "?",
        "Æ": "AE", "æ": "ae", "Ð": "D", "ð": "d", "×": "x", "Ø": "O", "ø": "o", "Þ": "Th", "þ": "th",
        "ß": "ss", "÷": "/", "Đ": "D", "đ": "d", "Ħ": "H", "ħ": "h", "ı": "i", "ĸ": "k", "Ŀ": "L",
        "ŀ": "l", "Ł": "L", "ł": "l", "ŉ": "'n", "Ŋ": "NG", "ŋ": "ng", "Œ": "OE", "œ": "oe", "Ŧ": "T",
        "ŧ": "t",
        "‐": "-", "‑": "-", "‒": "-", "–": "-", "—": "--", "―": "--", "‘": "'", "’": "'", "‚": ",",
        "‛": "'", "“": '"', "”": '"', "„": ",,", "‟": '"', "•": "*", "…": "...", "′": "'", "″": "''",
        "‹": "<", "›": ">", "€": "EUR", "™": "(tm)", "−": "-",
    }
)  # fmt: skip


def clean_english(text: str, style: Style = "original") -> str:
    """A text as the tokenizer was trained on it; neither begin nor end is stripped of spaces."""
    if style not in ("original", "transformers"):
        raise InputError(f"style={style!r}: expected 'original' or 'transformers'")
    if style == "original":
        text = to_ascii(text)
    else:
        text = text.encode("ascii", "ignore").decode()
    text = expand_numbers(text.lower(), style)
    for short, word in ABBREVIATIONS.items():
        text = re.sub(rf"\b{short}\.", word, text)
    return re.sub(r"\s+", " ", text).replace('"', "")


def clean_basic(text: str) -> str:
    """Lower case and single spaces only, for other languages; the original's `basic_cleaners`."""
    return re.sub(r"\s+", " ", text.lower())


def to_ascii(text: str) -> str:
    """Letters without their accents, quotes, dashes and signs as ASCII; what has no such form stays."""
    written = unicodedata.normalize("NFKD", text.translate(ASCII))
    return "".join(character for character in written if not unicodedata.combining(character))


def expand_numbers(text: str, style: Style) -> str:
    """Prices, decimals, ordinals and numbers in words, in the original's order."""
    text = re.sub(r"[0-9][0-9,]+[0-9]", lambda found: found[0].replace(",", ""), text)
    text = re.sub(r"£([0-9,]*[0-9])", r"\1 pounds", text)
    text = re.sub(r"\$([0-9.,]*[0-9])", lambda found: dollars(found[1]), text)
    text = re.sub(r"[0-9]+\.[0-9]+", lambda found: found[0].replace(".", " point "), text)
    text = re.sub(r"([0-9]+)(?:st|nd|rd|th)", lambda found: ordinal(found[1], style), text)
    return re.sub(r"[0-9]+", lambda found: cardinal(found[0], style), text)


def dollars(amount: str) -> str:
    """`3.05` -> `3 dollars, 5 cents`; the digits behind the point are taken as a number of cents."""
    whole, *rest = amount.replace(",", "").split(".")
    if len(rest) > 1:
        return f"{amount} dollars"
    counts = (int(whole or 0), "dollar"), (int(rest[0] or 0) if rest else 0, "cent")
    told = [f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count]
    return ", ".join(told) or "zero dollars"


def cardinal(digits: str, style: Style) -> str:
    """A whole number in words; 1001 to 2999 as years are read."""
    number = int(digits)
    if style == "transformers" and number >= 10**18:
        return "number out of range"
    if number >= 10**36:
        return " ".join(SMALL[int(digit)] for digit in digits)
    if not 1000 < number < 3000 or (style == "transformers" and number not in spoken_otherwise()):
        return in_groups(number, hundreds_then=" ", last=" " if style == "original" else ", ")
    if number == 2000:
        return "two thousand"
    if 2000 < number < 2010:
        return f"two thousand {SMALL[number % 100]}"
    century, year = divmod(number, 100)
    if year == 0:
        return f"{below_hundred(century)} hundred"
    return f"{below_hundred(century)} {'oh ' if year < 10 else ''}{below_hundred(year)}"


def spoken_otherwise() -> set[int]:
    """The numbers from 1001 to 2999 that transformers too does not read as plain numbers."""
    return {*range(1100, 3000, 100), *range(2000, 2010)}


def ordinal(digits: str, style: Style) -> str:
    """A whole number's ordinal in words."""
    number = int(digits)
    if style == "transformers":
        teen = 10 <= number % 100 <= 20
        suffix = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
        return in_groups(number, hundreds_then=" ", last=", ") + suffix
    if number >= 10**36:
        return cardinal(digits, style) + "th"
    before, last = re.fullmatch(
        r"(.*?)(\w+)", in_groups(number, hundreds_then=" and ", last=" and ")
    ).groups()
    if last in IRREGULAR_ORDINALS:
        return before + IRREGULAR_ORDINALS[last]
    return before + (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")


def in_groups(number: int, *, hundreds_then: str, last: str) -> str:
    """A number below 10^36 in groups of three digits.

    hundreds_then: what stands between hundreds and the rest. last: what stands before a last group below 100.
    """
    if number == 0:
        return SMALL[0]
    groups = []
    for power in range(len(THOUSANDS), 0, -1):
        group, number = divmod(number, 1000**power)
        if group:
            groups.append(f"{below_thousand(group, hundreds_then)} {THOUSANDS[power - 1]}")
    told = ", ".join(groups)
    if number:
        told += (last if number < 100 else ", ") if groups else ""
        told += below_thousand(number, hundreds_then)
    return told


def below_thousand(number: int, hundreds_then: str) -> str:
    hundreds, rest = divmod(number, 100)
    if not hundreds:
        return below_hundred(rest)
    return f"{SMALL[hundreds]} hundred" + (hundreds_then + below_hundred(rest) if rest else "")


def below_hundred(number: int) -> str:
    if number < 20:
        return SMALL[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{SMALL[ones]}" if ones else "")


def split_text(text: str, *, desired: int = 200, longest: int = 300) -> list[str]:
    """A long text in pieces of at most `longest` characters, cut at the first sentence end after `desired`.

    A sentence ends at `!`, `?`, a line's end, or a full stop before a space, but not within quotes, and at
    the end of a quote. A piece without such an end is cut between words. Where the text holds `|`, it is cut
    there and nowhere else. Pieces of nothing but punctuation are left out.
    """
    if "|" in text:
        pieces = text.split("|")
    else:
        text = re.sub("[“”]", '"', re.sub(r"[^\S\n]+", " ", text)).strip()
        pieces, start, ends = [], 0, sentence_ends(text)
        while start < len(text):
            end = next_cut(text, start, ends, desired=desired, longest=longest)
            pieces.append(text[start:end])
            start = end
    pieces = [re.sub(r"\s+", " ", piece).strip() for piece in pieces]
    return [piece for piece in pieces if re.search(r"\w", piece)]


def next_cut(text: str, start: int, ends: list[int], *, desired: int, longest: int) -> int:
    """Where the piece that begins at `start` ends."""
    near = [end for end in ends if start < end <= start + longest]
    if whole := [end for end in near if end - start >= desired]:
        return whole[0]
    if len(text) - start <= longest:
        return len(text)
    space = text.rfind(" ", start + 1, start + longest)
    return near[-1] if near else (space + 1 if space > 0 else start + longest)


def sentence_ends(text: str) -> list[int]:
    """The places right behind the sentences of a text, in order."""
    ends, in_quote = [], False
    for found in re.finditer(r'"|\n|[!?.]+', text):
        end, following = found.end(), text[found.end() : found.end() + 1]
        if found[0] == '"':
            in_quote = not in_quote
            is_end = not in_quote and following in ("", " ", "\n")
        else:
            is_stop = found[0] != "." or following in ("", " ", "\n")
            is_end = is_stop and not in_quote
        if is_end:
            ends.append(end)
    return ends


CLEANERS: dict[str, Callable[[str], str]] = {
    "english": clean_english,
    "transformers": lambda text: clean_english(text, "transformers"),
    "basic": clean_basic,
}
