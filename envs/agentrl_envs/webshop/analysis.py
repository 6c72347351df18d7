"""Text analysis identical to Lucene 8's StandardTokenizer with Anserini's English analyzer."""

import re
from collections.abc import Callable
from functools import lru_cache

import regex

LONGEST = 255  # UTF-16 units; the rest of a longer word is a new word
_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these "
    "they this to was will with"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())


def _set(ranges: str) -> str:
    """Convert code points such as "A9 203C 2194-2199" to the inside of a character class."""
    return "".join("-".join(f"\\U{int(end, 16):08X}" for end in part.split("-")) for part in ranges.split())


# Lucene 8 knows the letters of Unicode 9 and the emoji of Unicode 11; `regex` knows later versions.
_NOT_YET = _set(
    "B8 2C2-2C5 2D2-2D6 2DE-2DF 2E5-2EB 2ED 2EF-2FF 558 55A-560 588 58A-58C 5C8-5C9 5EF 7FD 860-89F 8B5 "
    "8BE-8D3 9FC-9FE AFA-AFF B53-B55 C04 C3C C5C-C5D CDC-CDD CF3-D00 D04 D3B-D3C D81 E86 E89 E8C E8E-E93 "
    "E98 EA0 EA8-EA9 EAC EBA ECE 170D 1715-171F 180F 1878 1ABF-1AF0 1B4C 1C89-1CBF 1CF7 1CFA 1DF6-1DFA 208F "
    "209D-209F 2C2F 2C5F 312E-312F 31BB-31BF 4DB6-4DBF 9FD6-9FFF A708-A716 A720-A721 A789-A78A A7AF "
    "A7B8-A7F6 A82C A8FE-A8FF AB5B AB66-AB6D 1032D-1032F 10570-105F3 10780-107BF 10940-10959 10A34-10A35 "
    "10D00-10FF6 11070-11075 110C2-110CD 11144-11147 111C9 111CE-111CF 1123F-11241 1133B 11380-113E2 "
    "1145E-11461 116B8 116D0-116E3 1171A 11740-1183A 11900-11ABF 11B0A-11BF9 11D00-11FB0 1246F-1247F "
    "12550-12FF0 1342F-143FA 16100-16139 16A70-16AC9 16D40-16ED3 16F45-16F4F 16F7F-16F87 16FE1-1AFFE "
    "1B002-1B168 1CCF0-1D128 1D250-1D281 1D6A6 1DF00-1DFFF 1E030-1E7FE 1E94B 2A6D7-2A6FF 2B735-2B73F "
    "2B81E-2B81F 2CEA2-2F7FF 2FA1E-3FFFF"
)
_PICTURE = _set(
    "A9 AE 203C 2049 2122 2139 2194-2199 21A9-21AA 231A-231B 2328 2388 23CF 23E9-23F3 23F8-23FA 24C2 "
    "25AA-25AB 25B6 25C0 25FB-25FE 2600-2605 2607-2612 2614-2685 2690-2705 2708-2712 2714 2716 271D 2721 "
    "2728 2733-2734 2744 2747 274C 274E 2753-2755 2757 2763-2767 2795-2797 27A1 27B0 27BF 2934-2935 "
    "2B05-2B07 2B1B-2B1C 2B50 2B55 3030 303D 3297 3299 1F000-1F0FF 1F10D-1F10F 1F12F 1F16C-1F171 "
    "1F17E-1F17F 1F18E 1F191-1F19A 1F1AD-1F1E5 1F201-1F20F 1F21A 1F22F 1F232-1F23A 1F23C-1F23F 1F249-1F3FA "
    "1F400-1F53D 1F546-1F64F 1F680-1F6FF 1F774-1F77F 1F7D5-1F7FF 1F80C-1F80F 1F848-1F84F 1F85A-1F85F "
    "1F888-1F88F 1F8AE-1F8FF 1F90C-1F93A 1F93C-1F945 1F947-1FFFD"
)
_TINTED = _set(
    "261D 26F9 270A-270D 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F442-1F443 1F446-1F450 1F466-1F469 1F46E "
    "1F470-1F478 1F47C 1F481-1F483 1F485-1F487 1F4AA 1F574-1F575 1F57A 1F590 1F595-1F596 1F645-1F647 "
    "1F64B-1F64F 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F918-1F91C 1F91E-1F91F 1F926 1F930-1F939 1F93D-1F93E "
    "1F9B5-1F9B6 1F9B8-1F9B9 1F9D1-1F9DD"
)
_TINT = _set("1F3FB-1F3FF")
_FORMAT = _set("600-605 6DD 70F 8E2 1CF2-1CF3 110BD")

# Ordered so that the first matching alternative is the longest, which is the match that Lucene takes.
_PARTS = {
    "x": rf"[[\p{{WB=Extend}}\p{{WB=Format}}\p{{WB=ZWJ}}{_FORMAT}]--[{_TINT}]]*",
    "y": rf"[[\p{{WB=Extend}}\p{{WB=Format}}\p{{WB=ZWJ}}{_FORMAT}]--[{_TINT}\uFE0E\uFE0F]]*",
    "letter": rf"[[\p{{WB=ALetter}}\p{{WB=Hebrew_Letter}}]--[\u02D7{_FORMAT}]]<x>",
    "hebrew": r"\p{WB=Hebrew_Letter}<x>",
    "digit": rf"[[\p{{WB=Numeric}}\uFF10-\uFF19]--[\u19DA\U0001FBF0-\U0001FBF9{_FORMAT}]]<x>",
    "katakana": r"\p{WB=Katakana}<x>",
    "lines": rf"(?:\p{{WB=ExtendNumLet}}<x>){{0,{LONGEST}}}+",
    "in_letters": r"[\p{WB=MidLetter}\p{WB=MidNumLet}\p{WB=Single_Quote}\u02D7]<x>",
    "in_digits": r"[\p{WB=MidNum}\p{WB=MidNumLet}\p{WB=Single_Quote}\uFE10\uFE14]<x>",
    "quoted": r"<hebrew>(?:\p{WB=Single_Quote}<x>|\p{WB=Double_Quote}<x><hebrew>)",
    "letters": r"<letter>(?:<lines>(?!<quoted>)<letter>|<in_letters><letter>)*",
    "digits": r"<digit>(?:<lines><digit>|<in_digits><digit>)*",
    "run": r"(?:<katakana>(?:<lines><katakana>)*|(?:<quoted>|<digits>|<letters>)+)",
    "word": r"<lines><run>(?:(?=\p{WB=ExtendNumLet})<lines><run>)*<lines>",
    "tinted": rf"[{_TINTED}]<y>[{_TINT}]<y>",
    "tint": rf"[{_TINT}]<y>",
    "picture": rf"[{_PICTURE}]<y>\uFE0F?",
    "tags": r"[\U000E0020-\U000E007E]+\U000E007F",
    "joined": r"(?:\u200D*(?<=\u200D)(?:<tinted>|<picture>)|\u200D?(?<=\u200D)<tint>)*",
    "emoji": r"(?=[^\x00-\xA8])(?:\u200D*(?:<tinted>|<picture>)|<tint>)(?:<tags>|<joined>)"
    r"|[0-9#*]<y>\uFE0F?\u20E3<y>|(?:\p{WB=Regional_Indicator}<x>){2}",
    "south_east_asian": r"(?:[\p{LB=Complex_Context}\u19DA]<x>)+",
    "single": r"[\p{Script=Han}\p{Script=Hiragana}]<x>",
}


def _compiled(*names: str) -> "regex.Pattern[str]":
    grammar = "|".join(f"<{name}>" for name in names)
    while "<" in grammar.replace("(?<", ""):
        grammar = re.sub(r"(?<!\?)<(\w+)>", lambda part: _PARTS[part[1]], grammar)
    return regex.compile(grammar, regex.V1)


_KINDS = ("word", "emoji", "south_east_asian", "single")
_ANY = _compiled(*_KINDS)
_EACH = tuple(map(_compiled, _KINDS))
_LETTER_AND_PICTURE = re.compile("[\u2139\u24c2\U0001f170-\U0001f189]")
_ABSENT = re.compile(f"[{_NOT_YET}]")
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")
_ASCII = re.compile(
    rf"_{{0,{LONGEST}}}+[A-Za-z0-9]"
    r"(?:[A-Za-z0-9_]|(?<=[A-Za-z])[:.'](?=[A-Za-z])|(?<=[0-9])[.,;'](?=[0-9]))*"
)


def words(text: str) -> list[str]:
    """Split a text into words by Unicode word breaks (UAX 29), with emoji sequences (UTS 51) as words.

    Han and Hiragana become single characters; runs of Thai, Lao, Khmer and Burmese are not split.
    """
    if text.isascii():
        found = _ASCII.findall(text)
    else:
        text = _ABSENT.sub("\0", text)
        found = _ANY.findall(text)
    if max(map(len, found), default=0) * 2 > LONGEST or _LETTER_AND_PICTURE.search(text):
        return _longest(text)
    return found


def _longest(text: str) -> list[str]:
    """Split a text with words that are too long or that match several kinds."""
    found, place = [], 0
    while place < len(text):
        near = _ANY.search(text, place, place + 4 * LONGEST)
        if near is None or near.start() > place + 3 * LONGEST:
            place += 3 * LONGEST
            continue
        start = end = near.start()
        room = LONGEST
        while end < len(text) and (room := room - 1 - (text[end] > "\uffff")) >= 0:
            end += 1
        place = max((match.end() for kind in _EACH if (match := kind.match(text, start, end))), default=start)
        if place > start:
            found.append(text[start:place])
        else:
            place = start + 1
    return found


@lru_cache(maxsize=1)
def _stemmer() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer  # takes a second to import

    stem = PorterStemmer(PorterStemmer.MARTIN_EXTENSIONS).stem
    return lambda word: stem(word, to_lowercase=False)


MAX_CACHED_LENGTH = 32


@lru_cache(maxsize=1 << 18)
def term(word: str) -> str:
    """Return the search term of a word: no possessive, lower case, stemmed; "" for a stop word."""
    if word[-2:-1] in ("'", "’", "＇") and word[-1] in "sS":
        word = word[:-2]
    word = word.lower() if word.isascii() else "".join("i" if c == "İ" else c.lower() for c in word)
    if word in STOP_WORDS:
        return ""
    if word.isascii():
        return _stemmer()(word) if len(word) > 2 else word
    word = _ASTRAL.sub("\\g<0>\uffff", word)  # two UTF-16 units, as Lucene's stemmer counts
    return (_stemmer()(word) if len(word) > 2 else word).replace("\uffff", "")


def terms(text: str) -> list[str]:
    """Return the search terms of a text in order, with repeats."""
    # Long words are not cached: the shop's are short, and a policy may write any number of others.
    found = ((term if len(word) <= MAX_CACHED_LENGTH else term.__wrapped__)(word) for word in words(text))
    return [each for each in found if each]
