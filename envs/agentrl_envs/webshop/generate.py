"""Generate a catalogue of any size in the format of WebShop's three files.

Product `i` depends on the seed and `i` alone, so a small catalogue is a prefix of every larger one. Products
come in families that differ in an attribute, a colour or the options, so an agent has to read the instruction
to buy the right one.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from agentrl.env.numbers import whole_number

BLOCK = 500  # products generated and shuffled together
NAMES = ("items_shuffle.json", "items_ins_v2.json", "items_human_ins.json")

# Products of each category per thousand, as in the original's small data set.
_SHARES = {"beauty": 238, "electronics": 229, "garden": 216, "fashion": 200, "grocery": 117}
_OPTION_COUNTS = {0: 577, 1: 245, 2: 165, 3: 13}

# pool: [is | with | for] name = wording in instructions
_ATTRIBUTES = """
skin: is cruelty free = cruelty free; is paraben free = free of parabens; is fragrance free = without
  fragrance; is dermatologist tested = tested by dermatologists; is travel size = small enough to travel
  with; is long lasting; with hyaluronic acid; with tea tree = tea tree oil; with shea butter; with vitamin
  c; with aloe vera; with green tea = green tea extract; for sensitive skin; for dry skin; for fine lines;
  for dark circles; for men; is alcohol free = without alcohol
hair: is sulfate free = free of sulfates; is cruelty free = cruelty free; is color safe = safe for colored
  hair; is leave in; is silicone free = without silicone; is long lasting; with argan oil; with coconut oil;
  with biotin; with keratin; with rosemary = rosemary oil; for damaged hair; for curly hair; for fine hair;
  for dry scalp = a dry scalp; for hair growth = growing hair; for frizz control = keeping frizz away
tool: is easy clean = easy to clean; is stainless steel = made of stainless steel; is non slip = that does
  not slip; is easy use = easy to use; is double sided = two sided; is rechargeable; is travel size = small
  enough to travel with; with storage case = a case to keep it in; with ergonomic handle = an ergonomic
  handle; with soft bristles; for beginners; for nail art; for sensitive skin; for salon use = use in a
  salon
gadget: is fast charging = quick to charge; is water resistant = resistant to water; is easy install = easy
  to install; is plug play = ready to plug and play; is heavy duty; is dust proof = safe from dust; with usb
  port = a usb port; with remote control = a remote control; with storage bag = a bag to keep it in; for
  home office = a home office; for outdoor sports; for road trips
power: is wireless; is hands free; with bluetooth = bluetooth on board; with led light = an led light; with
  long battery life = a battery that lasts; with touch control = control by touch
sound: is noise cancelling = able to cancel noise; with stereo sound; with deep bass; with microphone = a
  microphone
image: with high resolution = a high resolution; with motion detection = detection of motion; with night
  vision; with wide angle = a wide angle
stand: is light weight; with quick release = a quick release; with carbon fiber; with aluminum alloy; with
  ball head = a ball head
cable: is gold plated; is high speed; is heavy duty; is tangle free = that does not tangle; is easy carry =
  easy to carry; is fast charging = quick to charge; is dust proof = safe from dust; with aluminum alloy = a
  shell of aluminum alloy; with carbon fiber = carbon fiber; with braided nylon = a braided nylon cord; with
  right angle = a right angle plug; with wireless charging; for dual monitors = two monitors; for car use =
  use in the car
furniture: is easy assemble = easy to assemble; is space saving = that saves space; is height adjustable =
  adjustable in height; is solid wood = made of solid wood; is mid century = in a mid century look; is fully
  assembled = that comes assembled; is heavy duty; is easy clean = easy to clean; with storage space = space
  for storage; with steel frame = a frame of steel; with faux leather; with memory foam; with tempered
  glass; with wood finish = a wood finish; for living room = the living room; for dining room = the dining
  room; for small spaces; for home office = a home office
textile: is machine washable; is super soft = very soft; is blackout = that keeps light out; is fade
  resistant = that does not fade; is eco friendly = kind to the environment; is hypoallergenic; is non slip
  = that does not slip; is spot clean = cleaned with a cloth; with hidden zipper = a zipper that is hidden;
  with tassel trim = tassels; with polyester filling; with floral print = a print of flowers; with geometric
  pattern = a geometric pattern; for living room = the living room; for bedroom decor = the bedroom; for
  pets; for outdoor patio = the patio
kitchen: is dishwasher safe = safe in the dishwasher; is bpa free = free of bpa; is leak proof = that does
  not leak; is stackable; is easy clean = easy to clean; is stainless steel = made of stainless steel; is
  lead free = free of lead; is hand painted = painted by hand; with non stick = a non stick coating; with
  bamboo lid = a lid of bamboo; with wide mouth = a wide mouth; with double wall = double walls; for meal
  prep = preparing meals; for gift giving = giving as a gift; for camping
garment: is machine wash = machine washable; is quick drying = quick to dry; is moisture wicking = that
  wicks moisture; is fleece lined = lined with fleece; with polyester spandex; with cotton blend = blended
  cotton; for daily wear = every day; for gym workout = the gym; for cold weather; for travel
top: is loose fit = loose fitting; with long sleeve = long sleeves; with button closure = buttons; with v
  neck = a v neck; with lace trim = lace at the edges
bottom: is slim fit = slim fitting; is tummy control = that controls the tummy; with elastic waist = an
  elastic waist; with drawstring closure = a drawstring; with side pockets = pockets at the sides
shoe: is slip resistant = that does not slip; is water resistant = resistant to water; is memory foam =
  cushioned with memory foam; is light weight; is vegan leather = made of vegan leather; is arch support =
  good to the arch; is wide width = wide; with rubber sole = a rubber sole; with side zipper = a zipper at
  the side; with slip on = a design to slip on; with ankle strap = an ankle strap; with faux fur = faux fur
  inside; with steel toe = a steel toe; for daily wear = every day; for winter warmth = warm feet in winter;
  for hiking trails
snack: is gluten free; is non gmo = without gmo; is plant based; is low sugar = low in sugar; is high
  protein = high in protein; is kosher certified; is nut free = free of nuts; is individually wrapped =
  wrapped one by one; is dairy free = free of dairy; is keto friendly = fit for a keto diet; is hand crafted
  = made by hand; is resealable = in a bag that closes again; with natural ingredients; with sea salt; with
  dark chocolate; with artificial color free = no artificial colors; for lunch boxes; for party favors = a
  party
drink: is caffeine free = free of caffeine; is sugar free = without sugar; is usda organic = organic; is
  fair trade = fairly traded; is non gmo = without gmo; is dairy free = free of dairy; is gluten free; is
  instant mix = mixed in an instant; is low calorie = low in calories; is kosher certified; with natural
  flavors; with real fruit; with added vitamins; with loose leaf = loose leaves; for cold brew = brewing
  cold; for gift baskets = a gift basket
"""

# category | path | query | what a customer asks for one of, * where adjectives go | pools | options | prices
_TYPES = """
beauty | Beauty & Personal Care › Skin Care › Face › Moisturizers | face moisturizers | * face moisturizer |
  skin | size_oz scent | 8-45
beauty | Beauty & Personal Care › Skin Care › Face › Serums | face serums | * face serum | skin | size_oz
  style_skin | 9-60
beauty | Beauty & Personal Care › Skin Care › Body › Lotions | body lotions | * body lotion | skin | scent
  size_oz | 6-30
beauty | Beauty & Personal Care › Skin Care › Eyes › Creams | eye creams | * eye cream | skin | size_oz
  style_skin | 10-70
beauty | Beauty & Personal Care › Skin Care › Sun › Sunscreens | sunscreens | * sunscreen lotion | skin |
  size_oz style_skin | 8-35
beauty | Beauty & Personal Care › Makeup › Lips › Lipsticks | lipsticks | * matte lipstick | skin | color
  count | 5-28
beauty | Beauty & Personal Care › Hair Care › Shampoo & Conditioner › Shampoos | hair shampoos | bottle of *
  shampoo | hair | scent size_oz | 7-38
beauty | Beauty & Personal Care › Hair Care › Treatments › Masks | hair masks | * hair mask | hair | size_oz
  scent | 8-40
beauty | Beauty & Personal Care › Hair Care › Styling › Gels | hair styling gels | * styling gel | hair |
  size_oz scent | 6-25
beauty | Beauty & Personal Care › Hair Care › Extensions & Wigs › Wigs | hair wigs | * lace wig | hair |
  color size_inch | 25-180
beauty | Beauty & Personal Care › Tools & Accessories › Brushes › Makeup | makeup brush sets | * makeup
  brush set | tool | color style_set | 7-50
beauty | Beauty & Personal Care › Tools & Accessories › Nails › Files | nail files | pack of * nail files |
  tool | color count | 4-18
beauty | Beauty & Personal Care › Oral Care › Brushes › Toothbrushes | toothbrushes | * toothbrush | tool |
  color count | 4-90
electronics | Electronics › Headphones › Over-Ear Headphones | over ear headphones | pair of * headphones |
  gadget power sound | color style_pack | 20-250
electronics | Electronics › Portable Audio › Speakers › Portable Speakers | portable speakers | * portable
  speaker | gadget power sound | color style_power | 18-160
electronics | Electronics › Camera & Photo › Tripods › Travel Tripods | camera tripods | * camera tripod |
  gadget stand | color size_inch | 20-140
electronics | Electronics › Security › Cameras › Home Security Cameras | security cameras | * security
  camera | gadget image | style_pack color | 25-220
electronics | Electronics › Television & Video › Projectors | video projectors | * mini projector | gadget
  image | color style_power | 60-400
electronics | Electronics › Wearable Technology › Smartwatches | smartwatches | * smartwatch | gadget power
  | color band | 30-300
electronics | Electronics › Car Electronics › Dash Cameras | dash cameras | * dash camera | gadget image |
  size_gb style_pack | 35-180
electronics | Electronics › Computers › Keyboards & Mice › Keyboards | computer keyboards | * computer
  keyboard | gadget power | color switch | 18-150
electronics | Electronics › Accessories › Cables › HDMI Cables | hdmi cables | * hdmi cable | cable |
  size_feet color | 6-60
electronics | Electronics › Accessories › Cables › Charging Cables | charging cables | * charging cable |
  cable | color size_feet | 5-30
electronics | Electronics › Accessories › Cases › Phone Cases | phone cases | * phone case | cable | color
  size_phone | 7-40
electronics | Electronics › Accessories › Chargers › Wall Chargers | wall chargers | * wall charger | cable
  | color style_pack | 9-55
garden | Home & Kitchen › Furniture › Living Room Furniture › Tables › Coffee Tables | coffee tables | *
  coffee table | furniture | color size_inch | 60-420
garden | Home & Kitchen › Furniture › Living Room Furniture › Sofas | sofas | * sofa | furniture | color
  style_seat | 220-950
garden | Home & Kitchen › Furniture › Bedroom Furniture › Nightstands | nightstands | * nightstand |
  furniture | color style_pieces | 45-260
garden | Home & Kitchen › Furniture › Office Furniture › Desk Chairs | desk chairs | * desk chair |
  furniture | color style_pieces | 70-380
garden | Home & Kitchen › Furniture › Storage › Bookcases | bookcases | * bookcase | furniture | color
  style_tier | 55-320
garden | Home & Kitchen › Home Décor › Rugs › Area Rugs | area rugs | * area rug | textile | color size_rug
  | 25-300
garden | Home & Kitchen › Home Décor › Window › Curtains | window curtains | pair of * curtains | textile |
  color size_curtain | 18-90
garden | Home & Kitchen › Bedding › Pillows › Throw Pillow Covers | throw pillow covers | * throw pillow
  cover | textile | color size_pillow | 8-35
garden | Home & Kitchen › Bedding › Blankets › Throw Blankets | throw blankets | * throw blanket | textile |
  color size_blanket | 15-80
garden | Home & Kitchen › Kitchen & Dining › Storage › Food Containers | food storage containers | set of *
  food containers | kitchen | color count | 12-60
garden | Home & Kitchen › Kitchen & Dining › Drinkware › Water Bottles | water bottles | * water bottle |
  kitchen | color size_oz | 9-45
garden | Home & Kitchen › Kitchen & Dining › Cookware › Frying Pans | frying pans | * frying pan | kitchen |
  size_inch color | 18-110
fashion | Clothing, Shoes & Jewelry › Women › Clothing › Dresses › Casual | women's dresses | * dress for
  women | garment top | size color | 16-75
fashion | Clothing, Shoes & Jewelry › Women › Clothing › Tops & Tees › Blouses | women's blouses | * blouse
  for women | garment top | color size | 12-45
fashion | Clothing, Shoes & Jewelry › Women › Clothing › Leggings | women's leggings | pair of * leggings
  for women | garment bottom | color size | 12-50
fashion | Clothing, Shoes & Jewelry › Women › Shoes › Sandals | women's sandals | pair of * sandals for
  women | shoe | color size_shoe | 18-80
fashion | Clothing, Shoes & Jewelry › Women › Shoes › Boots › Ankle Boots | women's ankle boots | pair of *
  ankle boots for women | shoe | size_shoe color | 28-130
fashion | Clothing, Shoes & Jewelry › Men › Clothing › Shirts › Polos | men's polo shirts | * polo shirt for
  men | garment top | color size fit | 14-60
fashion | Clothing, Shoes & Jewelry › Men › Clothing › Jackets & Coats › Jackets | men's jackets | * jacket
  for men | garment top | size color | 30-160
fashion | Clothing, Shoes & Jewelry › Men › Clothing › Pants › Cargo | men's cargo pants | pair of * cargo
  pants for men | garment bottom | color size fit | 20-75
fashion | Clothing, Shoes & Jewelry › Men › Shoes › Sneakers | men's sneakers | pair of * sneakers for men |
  shoe | size_shoe color | 25-120
fashion | Clothing, Shoes & Jewelry › Men › Shoes › Work Boots | men's work boots | pair of * work boots for
  men | shoe | size_shoe color | 45-180
fashion | Clothing, Shoes & Jewelry › Girls › Clothing › Sweatshirts & Hoodies | girls' hoodies | * hoodie
  for girls | garment top | size color | 14-45
grocery | Grocery & Gourmet Food › Snack Foods › Chips & Crisps › Vegetable | vegetable chips | bag of *
  vegetable chips | snack | flavor_salty pack | 5-40
grocery | Grocery & Gourmet Food › Snack Foods › Bars › Granola | granola bars | box of * granola bars |
  snack | flavor_sweet pack | 6-45
grocery | Grocery & Gourmet Food › Snack Foods › Nuts & Seeds › Mixed | nut and seed mixes | bag of * trail
  mix | snack | flavor_salty pack | 8-55
grocery | Grocery & Gourmet Food › Snack Foods › Popcorn › Popped | popcorn | bag of * popcorn | snack |
  flavor_salty pack | 5-40
grocery | Grocery & Gourmet Food › Breads & Bakery › Cookies | cookies | box of * cookies | snack |
  flavor_sweet pack | 5-40
grocery | Grocery & Gourmet Food › Candy & Chocolate › Gummies | gummy candy | bag of * gummy candy | snack
  | flavor_sweet pack | 5-35
grocery | Grocery & Gourmet Food › Beverages › Tea › Herbal | herbal tea | box of * herbal tea | drink |
  flavor_drink pack | 6-40
grocery | Grocery & Gourmet Food › Beverages › Coffee › Ground | ground coffee | bag of * ground coffee |
  drink | flavor_drink size_pound | 9-60
grocery | Grocery & Gourmet Food › Beverages › Powders › Shakes | meal shakes | * meal shake powder | drink
  | flavor_drink pack | 14-70
grocery | Grocery & Gourmet Food › Beverages › Juices › Sparkling | sparkling juices | pack of * sparkling
  juice | drink | flavor_drink pack | 10-45
"""

# kind: name as listed | wording in instructions | values
_OPTIONS = """
color: Color | in {} | Black, White, Navy, Gray, Dark Gray, Red, Wine Red, Pink, Dusty Rose, Light Blue,
  Royal Blue, Teal, Green, Olive Green, Sage, Yellow, Mustard, Orange, Rust, Purple, Lavender, Brown,
  Walnut, Beige, Ivory, Khaki, Gold, Rose Gold, Silver, Charcoal
size: Size | in size {} | X-Small, Small, Medium, Large, X-Large, XX-Large, 3X-Large
size_shoe: Size | in size {} | 5, 5.5, 6, 6.5, 7, 7.5, 8, 8.5, 9, 9.5, 10, 10.5, 11, 12
fit: Fit Type | with a {} fit | Regular, Slim, Relaxed, Big & Tall
size_oz: Size | in the {} size | 1 Fl Oz, 1.7 Fl Oz, 3.4 Fl Oz, 6 Fl Oz, 8 Fl Oz, 12 Fl Oz, 16 Fl Oz, 24 Fl
  Oz, 32 Fl Oz
size_inch: Size | measuring {} | 8 Inch, 10 Inch, 12 Inch, 14 Inch, 18 Inch, 20 Inch, 24 Inch, 36 Inch, 42
  Inch, 60 Inch
size_feet: Size | measuring {} | 1.5 Feet, 3 Feet, 6 Feet, 10 Feet, 15 Feet, 25 Feet, 50 Feet
size_gb: Size | with {} of memory | 16 GB, 32 GB, 64 GB, 128 GB, 256 GB
size_phone: Size | with a {} screen | 5.4 Inch, 5.8 Inch, 6.1 Inch, 6.5 Inch, 6.7 Inch
size_rug: Size | measuring {} | 2 x 3 Feet, 3 x 5 Feet, 4 x 6 Feet, 5 x 8 Feet, 8 x 10 Feet, 9 x 12 Feet, 6
  Feet Round
size_curtain: Size | measuring {} | 42 x 63 Inch, 52 x 63 Inch, 52 x 84 Inch, 52 x 96 Inch, 70 x 84 Inch
size_pillow: Size | measuring {} | 12 x 20 Inch, 16 x 16 Inch, 18 x 18 Inch, 20 x 20 Inch, 22 x 22 Inch, 24
  x 24 Inch
size_blanket: Size | measuring {} | 40 x 50 Inch, 50 x 60 Inch, 60 x 80 Inch, 80 x 90 Inch
size_pound: Size | weighing {} | 10 Ounce, 12 Ounce, 1 Pound, 2 Pound, 5 Pound
scent: Scent | with a {} scent | Lavender, Vanilla Bean, Citrus, Eucalyptus, Sandalwood, Rose Petal,
  Coconut, Unscented, Ocean Breeze, Cedar
flavor_salty: Flavor Name | with {} flavor | Sea Salt, Barbecue, Sour Cream & Onion, Chili Lime, White
  Cheddar, Rosemary, Honey Mustard, Smoked Paprika, Garlic Herb
flavor_sweet: Flavor Name | with {} flavor | Chocolate Chip, Peanut Butter, Lemon, Wild Berry, Maple Pecan,
  Cinnamon, Salted Caramel, Coconut Almond, Strawberry, Ginger
flavor_drink: Flavor Name | with {} flavor | Vanilla, Mocha, Peppermint, Peach Mango, Ginger Lemon,
  Hazelnut, Chamomile, Black Cherry, Matcha, Chai Spice
pack: Size | in a {} | Pack of 1, Pack of 2, Pack of 3, Pack of 4, Pack of 6, Pack of 8, Pack of 12, Pack of
  24
count: Size | with {} | 2 Count, 4 Count, 5 Count, 6 Count, 8 Count, 10 Count, 12 Count, 20 Count
band: Band | with a {} band | Silicone, Leather, Nylon, Steel Mesh
switch: Style | with {} | Red Switches, Blue Switches, Brown Switches, Silent Switches
style_set: Style | as a {} | 5 Piece Set, 8 Piece Set, 12 Piece Set, 18 Piece Set
style_tier: Style | with {} | 2 Tiers, 3 Tiers, 4 Tiers, 5 Tiers, 6 Tiers
style_seat: Style | with {} | 2 Seats, 3 Seats, 4 Seats, Corner Seats
style_pieces: Style | as a {} | Single Piece, Set of 2, Set of 4
style_pack: Style | as a {} | Single Unit, Twin Kit, Family Kit, Bundle With Mount
style_power: Style | with {} | 5 Watts, 10 Watts, 20 Watts, 40 Watts
style_skin: Style | in the {} version | Light, Rich, Overnight, Tinted, Refill
"""

_OPENINGS = (
    *("i am looking for", "i'm looking for", "i need", "i want", "i would like", "i want to buy", "find me"),
    *("please find me", "can you find me", "show me", "get me", "looking for", "i am interested in"),
    *("i'd like to order", "help me find", "please show me"),
)
_FIRST_SYLLABLES = (
    "Bel Cor Dav El Fen Gal Hul Is Jor Kel Lum Mar Nor Or Pel Quin Ros Sil Tor Ul Vel Wen Yar Zan"
)
_MIDDLE_SYLLABLES = "a e i o u an en in on ar er or al el il"
_LAST_SYLLABLES = "bra dex dora fin gard lia lo mont na nis ra rell ric sa ta th va ven vo wick"
_PRAISE = (
    *(
        "A favorite of many households.",
        "Packed with care.",
        "Backed by a friendly team.",
        "Made to be used often.",
    ),
    *("A thoughtful present.", "Simple, sturdy and honest.", "Questions are answered within a day."),
    *("Designed in small batches.", "Tested before it leaves us.", "Looks good next to anything."),
)
# Attributes that cannot precede the noun: "a gluten free bar", but "a rug that is easy to clean".
_CLAUSE = re.compile(r"\b(that|to|of|in|by|with|without|for|from)\b")
_ENDINGS = (".99", ".99", ".95", ".49", ".0", ".5", ".89")


@dataclass(frozen=True, slots=True)
class Files:
    """Content of the three files: the list of products, and per asin attributes and human instructions."""

    products: list[dict[str, Any]]
    attributes: dict[str, dict[str, Any]]
    human: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class _Attribute:
    role: str  # is, with or for
    name: str
    said: str


@dataclass(frozen=True, slots=True)
class _Option:
    name: str
    said: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Type:
    category: str
    path: str
    query: str
    one: str
    attributes: tuple[_Attribute, ...]
    options: tuple[_Option, ...]
    prices: tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Family:
    kind: _Type
    brand: str
    attributes: tuple[_Attribute, ...]
    options: tuple[_Option, ...]
    price: float


def generate(products: int = 1000, seed: int = 0) -> Files:
    """Generate a catalogue in memory, with about two human goals and three synthetic ones per product.

    Raises:
        ConfigError: `products` is not a whole number above 0, or `seed` is not a whole number.
    """
    files = Files([], {}, {})
    for product, attributes, human in _entries(products, seed):
        asin = product["asin"]
        files.products.append(product)
        files.attributes[asin] = attributes
        if human:
            files.human[asin] = human
    return files


def write(folder: Path, products: int = 1000, seed: int = 0) -> tuple[Path, Path, Path]:
    """Write a generated catalogue to files with the original's names; return their paths.

    Raises:
        ConfigError: `products` is not a whole number above 0, or `seed` is not a whole number.
    """
    entries = _entries(products, seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / NAMES[0], folder / NAMES[1], folder / NAMES[2])
    with ExitStack() as opened:
        files = [opened.enter_context(path.open("w", encoding="utf-8", newline="\n")) for path in paths]
        before = ["[\n", "{\n", "{\n"]
        for product, attributes, human in entries:
            name = json.dumps(product["asin"]) + ": "
            for place, (key, entry) in enumerate((("", product), (name, attributes), (name, human))):
                if entry or place < 2:
                    files[place].write(before[place] + key + json.dumps(entry, ensure_ascii=False))
                    before[place] = ",\n"
        for place, end in enumerate(("]", "}", "}")):
            files[place].write(("" if before[place] == ",\n" else before[place]) + f"\n{end}\n")
    return paths


def _entries(
    products: int, seed: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    whole_number("products", products, 1, 10_000_000)
    whole_number("seed", seed, -(2**63), 2**63 - 1)
    return _stream(products, seed)


def _stream(
    products: int, seed: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    for first in range(0, products, BLOCK):
        rng = Random(f"agentrl webshop 1 {seed} {first}")
        families: list[_Family] = []
        while len(families) < BLOCK:
            families += [_family(rng)] * rng.choice((1, 2, 2, 3, 3, 4, 6))
        del families[BLOCK:]
        rng.shuffle(families)
        for number, family in enumerate(families, first):
            if number < products:
                yield _product(rng, family, _asin(number, seed))


def _asin(number: int, seed: int) -> str:
    """Return an asin with eight base-36 digits that are unique among the products of a seed."""
    code, digits = (number * 1_270_530_823_699 + seed * 7_919 + 36**7) % 36**8, ""
    for _ in range(8):
        code, digit = divmod(code, 36)
        digits += "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[digit]
    return "B0" + digits


def _family(rng: Random) -> _Family:
    category = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
    kind = rng.choice(_types()[category])
    syllables = (_FIRST_SYLLABLES, _MIDDLE_SYLLABLES, _LAST_SYLLABLES)
    brand = "".join(rng.choice(part.split()) for part in syllables)
    attributes = rng.sample(kind.attributes, rng.choice((3, 4, 4, 5, 5, 6)))
    wanted = rng.choices(list(_OPTION_COUNTS), list(_OPTION_COUNTS.values()))[0]
    low, high = kind.prices
    price = low * (high / low) ** rng.random()
    return _Family(kind, brand, tuple(attributes), kind.options[:wanted], price)


def _product(
    rng: Random, family: _Family, asin: str
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    kind = family.kind
    attributes = list(family.attributes)
    others = [attribute for attribute in kind.attributes if attribute not in attributes]
    if rng.random() < 0.7:
        attributes[rng.randrange(len(attributes))] = rng.choice(others)
    rng.shuffle(attributes)
    offered = {
        option: rng.sample(option.values, min(len(option.values), rng.choice((2, 3, 4, 4, 5, 6, 8, 10))))
        for option in family.options
    }
    fixed = [
        (option, rng.choice(option.values))
        for option in kind.options
        if option not in offered and rng.random() < 0.7
    ]
    product = _texts(rng, family, attributes, [value for _, value in fixed])
    product |= {
        "images": [f"https://images.example/{asin}.jpg"],
        "product_category": kind.path,
        "average_rating": rng.choice(("", round(rng.uniform(3, 5), 1))),
        "customization_options": _listed(rng, kind, offered),
        "asin": asin,
        "category": kind.category,
        "query": kind.query,
        "page": rng.randint(1, 400),
        "pricing": _pricing(rng, family.price * rng.uniform(0.8, 1.25)),
    }
    known: dict[str, Any] = {"attributes": [attribute.name for attribute in attributes]}
    if rng.random() < 0.415:
        wanted = rng.sample(attributes, min(len(attributes), rng.choice((2, 2, 3, 3, 4))))
        known["instruction"] = _find_me(kind, wanted)
        known["instruction_attributes"] = [attribute.name for attribute in wanted]
    times = rng.choice((3, 3, 4, 4, 5) if offered else (0, 0, 1))  # options give more to ask for
    asked = [_asked(rng, family, asin, attributes, offered, fixed) for _ in range(times)]
    return product, known, asked


def _texts(rng: Random, family: _Family, attributes: list[_Attribute], fixed: list[str]) -> dict[str, Any]:
    """Write title, description and bullets, which together mention every attribute."""
    kind, noun = family.kind, family.kind.one.partition("*")[2].strip()
    shown = rng.sample(attributes, rng.choice((1, 2, 2, 3)))
    title = [family.brand, *(one.name.title() for one in shown if one.role == "is"), noun.title()]
    title += [f"{one.role} {one.name.title()}" for one in shown if one.role != "is"]
    bullets = [f"{one.name.title()}: {_phrase(kind.one, [one])}. " for one in attributes]
    bullets += rng.sample(_PRAISE, rng.choice((0, 1, 1, 2)))
    rng.shuffle(bullets)
    sentences = [f"{family.brand} brings you {_phrase(kind.one, rng.sample(attributes, 2))}."]
    sentences += rng.sample(_PRAISE, rng.choice((0, 1, 2)))
    if rng.random() < 0.07:
        sentences += bullets
        bullets = [""]
    elif rng.random() < 0.25:
        sentences = []
    return {
        "name": ", ".join([" ".join(title), *fixed]),
        "full_description": " ".join(sentences),
        "small_description": bullets,
    }


def _listed(rng: Random, kind: _Type, offered: dict[_Option, list[str]]) -> Any:
    if not offered:
        return {kind.options[0].name: None} if rng.random() < 0.09 else ""
    return {
        option.name: [{"is_selected": not place, "value": value} for place, value in enumerate(values)]
        for option, values in offered.items()
    }


def _pricing(rng: Random, price: float) -> str:
    low = f"${int(price)}{rng.choice(_ENDINGS)}"
    if rng.random() < 0.907:
        return low
    return f"{low} - ${int(price * rng.uniform(1.1, 1.9)) + 1}{rng.choice(_ENDINGS)}"


def _find_me(kind: _Type, wanted: list[_Attribute]) -> str:
    said = {role: ", ".join(one.name for one in wanted if one.role == role) for role in ("is", "for", "with")}
    before = said.pop("is")
    after = "".join(f" {role} {names}" for role, names in said.items() if names)
    return f"Find me {before + ' ' if before else ''}{kind.query}{after}"


def _asked(
    rng: Random,
    family: _Family,
    asin: str,
    attributes: list[_Attribute],
    offered: dict[_Option, list[str]],
    fixed: list[tuple[_Option, str]],
) -> dict[str, Any]:
    """Write a human instruction for a product's attributes and options."""
    wanted = rng.sample(attributes, min(len(attributes), rng.choice((1, 2, 2, 3, 3))))
    chosen = [(option, rng.choice(values)) for option, values in offered.items() if rng.random() < 0.9]
    told = chosen + [pair for pair in fixed if rng.random() < 0.5]
    choice = [option.said.format(value.lower()) for option, value in told]
    one = family.kind.one
    if rng.random() < 0.12:
        one = one.replace("*", f"* {family.brand.lower()}")
    if choice and rng.random() < 0.3:
        text = f"{_phrase(one, wanted)}. i want it {', '.join(choice)}"
    else:
        text = _phrase(one, wanted, choice)
    # The original puts spaces around "/" and lower-cases option values when it reads them.
    values = [(option.name.lower(), value.replace("/", " | ").lower()) for option, value in chosen]
    return {
        "asin": asin,
        "instruction": f"{rng.choice(_OPENINGS)} {text}.",
        "attributes": [attribute.name for attribute in attributes],
        "options": [f"{name}: {value}" for name, value in values],
        "instruction_attributes": [attribute.name for attribute in wanted],
        "instruction_options": [value for _, value in values],
        "assignment_id": "",
        "worker_id": "",
    }


def _phrase(one: str, attributes: Sequence[_Attribute], choice: Sequence[str] = ()) -> str:
    """Write a noun phrase: attributes around a pattern such as "pair of * shoes", with an article."""
    front = [each.said for each in attributes if each.role == "is" and not _CLAUSE.search(each.said)]
    clauses = [each.said for each in attributes if each.role == "is" and _CLAUSE.search(each.said)]
    named = " ".join(one.replace("*", ", ".join(front)).split())
    parts = [("an " if named[0] in "aeio" else "a ") + named]
    for role in ("with", "for"):
        if said := [each.said for each in attributes if each.role == role]:
            parts.append(f"{role} {' and '.join(said)}")
    parts += choice
    if clauses:
        parts.append(
            " and ".join(said if said.startswith("that ") else f"that is {said}" for said in clauses)
        )
    return " ".join(parts)


@lru_cache(maxsize=1)
def _types() -> dict[str, list[_Type]]:
    pools = {}
    for line in _lines(_ATTRIBUTES):
        pool, _, entries = line.partition(":")
        pools[pool] = [_attribute(entry.strip()) for entry in entries.split(";")]
    options = {}
    for line in _lines(_OPTIONS):
        name, said, values = line.split(" | ")
        key, _, name = name.partition(": ")
        options[key] = _Option(name, said, tuple(values.split(", ")))
    types: dict[str, list[_Type]] = {}
    for line in _lines(_TYPES):
        category, path, query, one, pools_named, kinds, prices = line.split(" | ")
        low, high = prices.split("-")
        offered = tuple(options[kind] for kind in kinds.split())
        made = _Type(
            category,
            path,
            query,
            one,
            tuple(one for pool in pools_named.split() for one in pools[pool]),
            offered,
            (float(low), float(high)),
        )
        types.setdefault(category, []).append(made)
    return types


def _lines(table: str) -> list[str]:
    """Split a table into rows; an indented line continues the row above."""
    return table.strip().replace("\n  ", " ").splitlines()


def _attribute(entry: str) -> _Attribute:
    role, _, rest = entry.partition(" ")
    name, _, said = rest.partition(" = ")
    return _Attribute(role, name, said or name)
