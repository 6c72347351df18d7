"""Normalization of answers: Unicode becomes LaTeX, and delimiters around an answer are dropped."""

import re

GROUPING = "\ue000"  # a comma that only separates thousands, as in 1{,}234
_LETTERS = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon
    phi chi psi omega
"""
GREEK = _LETTERS.split()

_COMMANDS = r"""
· \cdot  ⋅ \cdot  ∙ \cdot  • \cdot  × \times  ÷ \div  ± \pm  ∓ \mp  √ \sqrt  ∞ \infty  ∅ \emptyset
≤ \le  ⩽ \le  ≦ \le  ≥ \ge  ⩾ \ge  ≧ \ge  ≠ \ne  ≈ \approx  ∪ \cup  ∩ \cap  ∈ \in  ∖ \setminus
⟨ \langle  ⟩ \rangle  ⌊ \lfloor  ⌋ \rfloor  ⌈ \lceil  ⌉ \rceil  ° ^\circ  ˚ ^\circ  º ^\circ
… \dots  ℝ \mathbb{R}  ½ \frac{1}{2}  ⅓ \frac{1}{3}  ⅔ \frac{2}{3}  ¼ \frac{1}{4}  ¾ \frac{3}{4}
⅕ \frac{1}{5}  ⅙ \frac{1}{6}  ⅚ \frac{5}{6}  ⅛ \frac{1}{8}  ⅜ \frac{3}{8}  ⅝ \frac{5}{8}
⅞ \frac{7}{8}
"""
_SIGNS = {
    "-": "−﹣‐‑",
    " ": "\u00a0\u2002\u2003\u2005\u2007\u2009\u200a\u202f\u205f\u3000\t\n\r",
    "": "\u200b\u2060\ufeff",
    "/": "⁄∕",
    "'": "′’ʹ",
    "''": "″",
    '"': "“”",
}
_PLAIN = (
    {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width
    | {sign: plain for plain, signs in _SIGNS.items() for sign in signs}
    | {
        sign: f"{command} "
        for sign, command in zip(_COMMANDS.split()[::2], _COMMANDS.split()[1::2], strict=True)
    }
    | {letter: f"\\{name} " for letter, name in zip("αβγδεζηθικλμνξοπρστυφχψω", GREEK, strict=True)}
)
_TRANSLATION = str.maketrans(_PLAIN)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


def normalize_spelling(text: str) -> str:
    r"""Replace Unicode by LaTeX, and drop **…**, \(…\) and a full stop.

    >>> normalize_spelling("½ m².")
    '\\frac{1}{2}  m^{2}'
    """
    text = re.sub(r"\b(?:US|CA|AU)(?=\\?\$)", "", text).replace("¢", r"\text{ cents}")
    text = re.sub(r"\bRs\.?\s*(?=[0-9])", "₹", text)
    text = re.sub(r"\\(?:text)?color\s*\{\w+\}|\\hspace\*?\{[^{}]*\}", " ", text)
    text = re.sub("(?<=[0-9])[–—](?=[0-9])", " to ", text).replace("–", "-")  # 3–5 is a range
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda found: f"^{{{found[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda found: f"_{{{found[0].translate(_LOWERED)}}}", text)
    text = re.sub(r"√\s*([0-9]+)", r"\\sqrt{\1}", text).translate(_TRANSLATION)
    text = re.sub(r"\{,\}|,\\!\s?", GROUPING, text).replace("\\!", "")
    text = re.sub(r"\\[()\[\]]", " ", text).strip()
    if len(text) > 4 and text[:2] == text[-2:] == "**" and "**" not in text[2:-2]:
        text = text[2:-2].strip()
    return text.removesuffix(".").removesuffix("\\\\").strip()
