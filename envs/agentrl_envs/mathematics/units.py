"""Units and counted things, which may follow a number without changing its value.

A word counts as a thing unless it is another number ("million", "half"), expresses doubt or denial
("roughly", "wrong", "not"), joins another answer ("or"), or is an operation ("minus", "squared").
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_PHRASE = 12  # words and signs

_SYMBOLS = """
m: meter meters metre metres
cm: centimeter centimeters centimetre centimetres
mm: millimeter millimeters millimetre millimetres
km: kilometer kilometers kilometre kilometres kms
in: inch inches
ft: foot feet
yd: yard yards yds
mi: mile miles
g: gram grams gm gms
kg: kilogram kilograms kgs
mg: milligram milligrams
oz: ounce ounces
ton: tons tonne tonnes
s: second seconds sec secs
ms: millisecond milliseconds
min: minute minutes mins
h: hour hours hr hrs
day: days
week: weeks wk wks
month: months
year: years yr yrs
L: liter liters litre litres l
mL: milliliter milliliters millilitre millilitres ml
gal: gallon gallons
pound: pounds lb lbs
dollar: dollars usd buck bucks
cent: cents
euro: euros eur
yen: jpy
rupee: rupees inr
degree: degrees deg
celsius:
fahrenheit:
rad: radian radians
V: volt volts
W: watt watts
kW: kilowatt kilowatts kw
J: joule joules
N: newton newtons
Pa: pascal pascals pa
kPa: kpa
Hz: hertz hz
kHz: khz
A: ampere amperes amp amps
mi/h: mph
km/h: kmh kph
unit: units
"""
_KNOWN: dict[str, str] = {}
for _line in _SYMBOLS.strip().splitlines():
    _symbol, _, _others = _line.partition(":")
    for _spelling in (_symbol, *_others.split()):
        _KNOWN[_spelling] = _symbol

# Letters that are units if they follow a number alone, unless the correct answer has variables.
LETTERS = frozenset(["m", "g", "s", "h", "L", "l", "V", "W", "J", "N", "A"])

_NUMBERS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand
    million billion trillion quadrillion quintillion sextillion zillion googol fold myriad lakh crore mil mill
    mn mln bn bln tn grand dozen half halves first third quarter fourth fifth sixth seventh eighth ninth
    tenth eleventh twelfth hundredth thousandth millionth billionth once twice thrice single double
    doubled triple tripled quadruple quadrupled halved kilo mega giga tera milli micro nano nil none
    nothing null naught infinite infinity pi
"""
_DOUBTS = """
    or nor but either neither versus vs alternatively instead rather otherwise else except excluding
    including besides without if unless because since although though while whereas however then than when
    where whether until so thus hence therefore yet still also too both no not nope never cannot non isn't
    wasn't aren't doesn't don't won't can't wrong incorrect incorrectly false untrue mistake mistaken
    error erroneous invalid impossible undefined wait sorry oops hmm hm uh um actually scratch correction
    corrected rejected denied about around roughly approximately approx approximate approximation circa ca
    nearly almost close closely maybe perhaps possibly probably probable likely unlikely
    presumably supposedly apparently seemingly estimated estimate estimates est guess guessing guessed
    think thought believe believed suppose supposed assume assumed assuming reckon feel hope hopefully
    unsure uncertain unclear unknown doubt doubtful might may could would should can will shall must seems
    seem seemed appears looks like sort kind question is are was were be been being am has have had having
    do does did done isn aren wasn doesn i you we he she it they me him us this that these those there
    here which who whom whose what why how my your our his its
    ish bit change something gross score couple few several some many
"""
# These change a number only if nothing follows them: 18 more apples are 18.
_BEFORE_THINGS = frozenset(
    ["more", "less", "fewer", "extra", "additional", "odd", "even", "positive", "possible"]
)
_COMPARISONS = """
    greater smaller larger bigger higher lower most least somewhat little
    tops max maximum minimum limit bound upto beyond exceeds exceed exceeding over under above below up
    down off by to from between through within near into onto out plus minus add added adding
    subtract subtracted multiply multiplied divide divided sum difference product quotient equal equals
    makes squared cubed power powers exponent raised factorial modulo mod remainder base choose inverse
    reciprocal negative opposite absolute theta alpha beta lambda log ln sin cos tan exp sqrt
    imaginary pm noon midnight o'clock bc ad bce ce january february march april june july august
    september october november december
"""
_SAYING_A_NUMBER = frozenset(_NUMBERS.split())
_NEVER_A_NAME = _SAYING_A_NUMBER.union(_DOUBTS.split())
_NEVER_A_THING = _NEVER_A_NAME.union(_COMPARISONS.split())
_SPELLED_NUMBER = re.compile(r"(?:[mbt]|tr)il+i[ao]\w*|\w*fold")  # also "milion", "milliard", "tenfold"
_ADVERB = re.compile(r"(?<!fami)(?<!jel)(?<!\bli)(?<!week)(?<!month)(?<!year)(?<!dai)(?<!hour)ly$")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_JOINING = frozenset(["per", "a", "an", "of", "each", "every", "in", "the", "on", "at", "for", "with", "and"])
_ARTICLES = frozenset(["a", "an", "the", "another"])


@dataclass(frozen=True, slots=True)
class Unit:
    """A phrase after a number.

    Attributes:
        measured: The known units and their powers, sorted: km/h is (("h", -1), ("km", 1)).
        counted: The other words, in the singular.
    """

    measured: tuple[tuple[str, int], ...]
    counted: frozenset[str] = frozenset()

    def agrees(self, other: "Unit") -> bool:
        """Return whether two numbers with these units can be equal."""
        if self.measured != other.measured:
            return False
        return bool(self.measured) or bool(self.counted & other.counted)


def known_unit(word: str) -> bool:
    """Return whether a word is the name or symbol of a unit, such as km; single letters do not count."""
    return len(word) > 1 and (word in _KNOWN or word.lower() in _KNOWN)


def names_a_thing(word: str) -> bool:
    """Return whether a word may follow a number without changing its value."""
    lowered = word.lower().replace("’", "'")
    if not _WORD.fullmatch(word) or lowered in _NEVER_A_THING or _ADVERB.search(lowered):
        return False
    if lowered.removesuffix("s") in _SAYING_A_NUMBER or _SPELLED_NUMBER.fullmatch(lowered):
        return False
    return len(word) > 2 or known_unit(word) or lowered in _JOINING


def names_a_value(words: Sequence[str]) -> bool:
    """Return whether words may precede "=", as in "total cost = 18"."""
    lowered = [word.lower().replace("’", "'") for word in words]
    return not any(word in _NEVER_A_NAME or _ADVERB.search(word) for word in lowered)


def unit(pieces: Sequence[str]) -> Unit | None:
    """Parse a phrase of words, "/", "*" and powers such as "^2"; return None if it is not a unit."""
    if not 0 < len(pieces) <= LONGEST_PHRASE:
        return None
    powers: Counter[str] = Counter()
    counted: set[str] = set()
    sign, power, last = 1, 1, ""  # sign and power of the next unit; the unit that a power would apply to
    for place, piece in enumerate(pieces):
        word, following = piece.lower(), pieces[place + 1] if place + 1 < len(pieces) else ""
        if piece.startswith("^") or word in ("squared", "cubed"):
            if not last or powers[last] not in (1, -1):
                return None
            powers[last] *= int(piece[1:]) if piece.startswith("^") else 2 if word == "squared" else 3
        elif piece in ("/", "*", "-") or word == "per":
            if not following or (piece in ("*", "-") and not (powers or counted)):
                return None
            sign = -1 if piece == "/" or word == "per" else sign
        elif word in ("square", "sq", "cubic", "cu"):
            power = 2 if word.startswith("sq") else 3
        elif word in _JOINING and (word != "in" or _goes_on(following)):
            if word == "and" and (not following or following.lower() in _ARTICLES or not (powers or counted)):
                return None
            if not following and word not in ("each", "every"):
                return None
            sign = -1 if word in ("a", "an", "each", "every") and (powers or counted) else sign
        elif piece in LETTERS or known_unit(piece):
            for part, way in zip((_KNOWN.get(piece) or _KNOWN[word]).split("/"), (1, -1), strict=False):
                last = part
                powers[part] += sign * way * power
            power = 1
        elif names_a_thing(piece) and (word not in _BEFORE_THINGS or names_a_thing(following)):
            last = ""
            counted.add(word.removesuffix("s"))
        else:
            return None
    if power != 1 or not (powers or counted):
        return None
    if powers["celsius"] or powers["fahrenheit"]:
        del powers["degree"]
    return Unit(tuple(sorted((part, n) for part, n in powers.items() if n)), frozenset(counted))


def _goes_on(following: str) -> bool:
    return bool(following) and following[0] not in "^/*"
