"""Right answers, and what counts for each of them and what does not."""

# Gold answer, replies that are right, replies that are wrong.
NUMBERS: list[tuple[str, list[str], list[str]]] = [
    # thousands
    (
        "58210",
        ["58,210", r"58{,}210", r"58,\!210", r"58\,210", "58 210", "58210.0", r"\$58,210", "５８２１０", "58\u202f210"],
        ["58.210", "58,21", "58, 210", "582,10", "5 8210", "58 21 0", "[58,210]", r"\{58,210\}", "58 210 000"],
    ),
    ("2500000", ["2,500,000", r"2\,500\,000", "2.5e6", r"2.5\times 10^6", r"2.5 \cdot 10^{6}", "2.5E+6"], ["2.5", "2.5 million", r"2.5\text{ million}", r"2.5 \times 10^5", "2.5e-6", "2.5M", "2.5 mn"]),
    ("1.234", ["1.234", "1.2340", r"\frac{617}{500}"], ["1,234", "1234", "1.234.000", "1.23"]),
    # decimals and fractions
    ("3/8", [".375", "0.375", r"\frac38", r"\dfrac{3}{8}", "6/16", r"37.5\%", r"\tfrac{3}{8}", "⅜", "3⁄8", r"3\div 8", "3:8 "][:-1], ["3:8", "8/3", r"\frac{8}{3}", "38", "0.37", "0.38", "3/8/1/2", "3 8", "3.8"]),
    ("-7/4", ["-1.75", r"-\frac{7}{4}", r"\frac{-7}{4}", r"\frac{7}{-4}", "-1 3/4", r"-1\frac34", "−1.75", "-(7/4)"], ["7/4", "1.75", r"1\frac{3}{4}", "-7", "- -7/4", "4/7", "-7:4"]),
    ("11/2", ["5.5", "5 1/2", r"5\frac{1}{2}", r"5\tfrac12", "5½", r"5\ \frac{1}{2}", "10/2 + 1/2"], [r"5\cdot\frac12", "5/2", "51/2", "5 and 1/2 or 6", "5 - 1/2", r"5\frac{2}{1}", "5 1", "5, 1/2"]),
    ("0.125", ["1/8", r"12.5\%", "0.1250", "125e-3"], ["0.12", "0.13", "1.25", "0,125", "1/7"]),
    ("1/7", ["0.142857", "0.14285714", r"0.\overline{142857}", r"\frac{1}{7}"], ["0.142", "0.143", "0.142858", "0.1428", "0.1428571428571430"]),
    ("5/6", [r"0.8\overline{3}", r"0.8\bar{3}", "0.833333", "0.8333333333"], ["0.83", "0.8333", "0.833334", "0.8333330", r"0.\overline{83}"]),
    ("0.05", ["5%", "5e-2", r"\frac{1}{20}", "1/20"], ["0.5", "0.005%", "0.0500001"]),
    ("2.718281828", ["2.718281828"], ["e", "2.71828", "2.7182818", "3"][1:]),
    # exactness
    ("1/3125", ["5^{-5}", r"\frac{1}{5^5}", "0.00032"], ["0", "0.0", "0.0003", "1/3126", "5^{-6}", "-5^{5}"]),
    ("2^{64}", ["18446744073709551616", "4^{32}", "2^64", "18,446,744,073,709,551,616"], ["18446744073709551615", "1.8446744073709552e19", r"1.84467 \times 10^{19}", "2^{63}", "64^2"]),
    (r"\frac{1}{12!}", [r"\frac{1}{479001600}", "1/12!"], ["0", "0.0", "0.000000002", r"\frac{1}{11!}", "1/13!"]),
    ("1000000000000000000003", [r"10^{21}+3"], ["10^{21}", "1e21", "1000000000000000000003.1", "1000000000000000000002"]),
    ("7!", ["5040", r"7\cdot 6!", "7!"], ["5041", "7", "720", "7!!"]),
    (r"\binom{6}{2}", ["15", r"\binom{6}{4}"], [r"\frac{6}{2}", "3", "30"]),
    # percent
    ("35\\%", ["35%", "0.35", "35", r"35 \%", "35 percent", "35 per cent", r"\frac{7}{20}", "35％"], ["0.0035", "3.5", "350%", "65%", "35 apples"]),
    ("64", ["64%", "6400%", "64 percent"], ["0.64%", "640%", "0.64"]),
    # units and things
    (
        "23",
        [
            "23 apples", "23 red apples", r"23\text{ km}", r"23\,\text{dollars}", r"23 \mathrm{~cm}^2", "23 m/s", r"23\ \text{m/s}^2",
            "23 miles per hour", "23 kg", r"23^\circ", "23°", "23°C", r"23^{\circ}\text{F}", "$23", r"\$23.00", "23 $", "€23", "£23", "23 €",
            r"\$23\text{ per day}", "$23/hour", "23 cups of flour", "23 students in total", "23 square meters", r"23 \text{ cubic inches}",
            r"23\text{ (boxes)}", "23 dogs and cats", "23 m", "23m^3", r"23 \text{ N}\cdot\text{m}", "x = 23", r"x=23\text{ cm}", "n = 23", r"\text{Total} = 23",
            "f(4) = 23", "AB = 23", r"m\angle ABC = 23^\circ", r"\theta = 23^\circ", "23.", "**23**", r"\(23\)", "$23$", r"\text{23}", r"\textbf{23}", r"\mathbf{23}", "(23)", r"\left(23\right)", "{23}", r"\,23\,",
            "+23", r"\displaystyle 23", "46/2", r"\frac{46}{2}", r"\sqrt{529}", "23 = 23", "P = 23", r"a_5 = 23", "23 words per minute", "23 o'clocks"][:-1],
        [
            "23 million", "23 thousand", "23 hundred", "23 dozen", "23 and a half", "23 and three quarters", "23 or four", "23 or so", "23 or 24", "23 half", "23 halves", "23 tenths",
            "about 23", "approximately 23", r"\approx 23", "≈23", "~23", r"\sim 23", "around 23", "nearly 23", "roughly 23 apples", "23 roughly", "23 probably", "maybe 23", "23?", "23, probably", "23 I think", "perhaps 23", "23 (estimated)", "23-ish", "23ish", "23 give or take",
            "not 23", "It is not 23", "23 is wrong", "23 is not the answer", r"x \ne 23", r"\neq 23", "23 is incorrect", "never 23", r"\text{not } 23", "23 isn't right", "anything but 23",
            "23, 24", "23; 24", "23 24", r"23 \\ 24", "23 and 24", r"23 \text{ or } 24", r"\{23\}", "[23]", r"\{23, 24\}", "22, 23, 24", "23 apples and 4 pears", "(23, 24)", "22-24", "22–24", "23 to 25", r"23 \to 24",
            r"\le 23", r"x \le 23", "x > 23", "at least 23", "at most 23", "23 or more", "23+", "more than 23", "less than 23", "under 23", r"23 \le x \le 24", "22 < 23", "23 > 22", "24 = 23", "23 = 24", r"23 \approx 24", "x = 22 = 23", "2x = 23", "x + 1 = 23", "-x = 23", "x^2 = 23", r"23 \equiv 1", "23 mod 24", r"23 \pmod{24}",
            "24, no, 23", "23, no, 24", "23 no wait 24", "24 -> 23", "23 (not 24)", "first 24, then 23", r"\cancel{24} 23",
            "23x", "x", "23i", r"23\pi", "23!", "23^2", r"23^\circ 15'", "-23", "2 3", "230", "23.5", "23.0001", "23_5", "10111_2", "0x17", "23:00", "23:1", "23e1", "23 squared", "23 times 2", "23 plus 1", "23 minus two", "twenty-three", "XXIII", "23 pi", "23 percent less",
            "", "?", "n", "the answer", "23 June", "June 23", "23/06/2024", "23 BC", "23%%", "--23", "23-", "*23", "23\\frac{1}{2}", "23 1/2", "$23 million", "$23k", "23k", "23K", "23 k", r"\{23 : 23\}", r"\{n : n\}", "23 \\text{ and a half}", "log 23", "|-24|", r"\sqrt{23}", "23...", r"23\ldots", "1..23", "23 dozen eggs",
        ],
    ),
    ("7", ["7 days", "7 hours", "seven"][:-1], ["7 twos", "7 thirds", "7 hundredths", "7 couple", "7 a", "7 of 9", "7 out of 8", "7 over 2", "7 divided by 2", "7 base 8", "7 each or 8", "7 less 1", "7 not 8", "7 but not 8", "7 = seven million", "7 sixths"]),
    (r"12\text{ cm}", ["12", "12 cm", "12 centimeters", r"12\,\mathrm{cm}", "0.12e2 cm"], ["12 m", "12 km", "12 cm^2", "120", "12 dollars", r"12\text{ kg}", "1.2", "12%"]),
    (r"40\text{ miles per hour}", ["40 mph", "40", r"40\text{ mi/h}", "40 miles an hour"], ["40 km/h", "40 miles", "40 mph or so", "4"]),
    (r"\$7.50", ["7.50", "7.5", "$7.50", r"\$7.5", "7.50 dollars", r"\frac{15}{2}", "$7 1/2"], ["750", "7.50 cents", "€7.50", "7", "8", r"\$7.51"]),
    (r"45^\circ", ["45", "45°", "45 degrees", r"45^{\circ}", r"45\text{ degrees}", r"\angle A = 45^\circ"], [r"\frac{\pi}{4}", "45 radians", "-45", r"135^\circ", r"45^\circ 30'"]),
    ("30.5^\\circ", [r"30^\circ 30'", "30.5", r"\frac{61}{2}^\circ"], ["30", r"30^\circ 5'", r"30^\circ 50'"]),
    ("0", ["0", "0.00", "-0", r"\frac{0}{5}", "5-5", "0 apples", r"0^\circ", "x = 0"], ["o", "none", "zero"][:2] + [r"\emptyset", r"\{\}", "0.0001", r"1/10^{30}", "5", "10^{-40}", "no solution", r"\infty", "()"]),
    ("-8", ["-8", "−8", "- 8", "(-8)", r"\left(-8\right)", "-8.0", r"-\frac{16}{2}", r"-\$8", r"\$-8", "x=-8", r"-2^3", r"\sqrt[3]{-512}"], ["8", "--8", "8-", "-8 or 8", r"\pm 8", "-(-8)", "+8", "~-8", "-0.8"]),
    ("1e-5", ["0.00001", "10^{-5}", r"1\times 10^{-5}", r"\frac{1}{100000}"], ["0", "1e5", "1e-6", "-1e5"]),
]

MATHEMATICS: list[tuple[str, list[str], list[str]]] = [
    # irrational numbers
    (r"\sqrt{5}", ["5^{1/2}", r"5^{\frac12}", r"\frac{5}{\sqrt{5}}", "2.23607", "2.2360680", r"\sqrt 5", "√5", "sqrt(5)", r"\sqrt{5}\text{ cm}"], ["2.236", "2.23606", "5", r"\sqrt{6}", r"-\sqrt{5}", r"\pm\sqrt{5}", r"\sqrt[3]{5}", "2.24", r"\sqrt{5}+10^{-30}", "2.236067", r"\sqrt{5} \approx 2.236"]),
    (r"\frac{\pi}{6}", [r"\pi/6", r"\frac16\pi", "0.523599", r"\frac{2\pi}{12}", "π/6"], ["0.5236", "0.523598", "30", r"30^\circ", r"\frac{\pi}{3}", "3.14159/6", "p/6", r"\frac{22}{42}"]),
    (r"4\sqrt{2}", [r"\sqrt{32}", r"2\sqrt{8}", r"\sqrt{2}\cdot 4", r"\frac{8}{\sqrt{2}}", r"4\times\sqrt{2}"], [r"4\sqrt{3}", r"\sqrt{2}", "4", r"4 + \sqrt{2}", "5.66", r"2\sqrt{4}", "42"]),
    (r"1+\sqrt{3}", [r"\sqrt{3}+1", r"\frac{2}{\sqrt{3}-1}", "2.73205"], [r"1-\sqrt{3}", r"1\pm\sqrt{3}", "2.732", r"\sqrt{4}", r"1+\sqrt{3}, 1-\sqrt{3}"]),
    ("e^3", [r"e^{3}", r"\exp(3)", r"\mathrm{e}^3", r"e\cdot e^2", "20.0855"], ["20.1", "3e", "e", "20.0856", "e^{3.0000001}"]),
    (r"\ln 3", [r"\ln(3)", r"\log 3", r"\frac{\ln 9}{2}", "1.09861"], [r"\ln 4", "1.1", r"3\ln", r"\log_{10} 3", "0.477121"]),
    (r"\log_2 5", [r"\log_{2}(5)", r"\frac{\ln 5}{\ln 2}", r"\frac{\log 5}{\log 2}", "2.32193"], [r"\log_5 2", r"\log 5", "2.5", "2.32"]),
    ("3", [r"\log_2 8", r"\sqrt{9}", r"\sqrt[3]{27}", r"6\sin 30^\circ", r"\frac{6}{2}", r"|{-3}|", "3^1", r"\lfloor 3.7 \rfloor", r"\sum_{k=1}^{2} k"], [r"\log_2 9", r"\sqrt{8}", r"\pi", r"\sin 3", r"\lfloor 3.7", r"\sum_{k=1}^{3} k"]),
    (r"\frac{\sqrt{3}}{2}", [r"\sin 60^\circ", r"\cos\frac{\pi}{6}", "0.866025", r"\sin(\pi/3)"], ["0.866", r"\sin 60", r"\cos 60^\circ", r"\frac{\sqrt{2}}{3}"]),
    (r"-\frac{1}{\sqrt{2}}", [r"-\frac{\sqrt{2}}{2}", r"-\sqrt{\frac12}", r"-2^{-1/2}", "-0.707107"], ["-0.7071", r"\frac{1}{\sqrt{2}}", "0.707107"]),
    # complex numbers
    ("2-3i", ["2 - 3i", "-3i+2", r"2-3\mathrm{i}", r"2 - 3\cdot i"], ["2+3i", "3i", "2", "-1", "(2,-3)", "2-3", "2-3j"]),
    ("i", [r"\sqrt{-1}", "1i"], ["-i", "1", r"\pm i", "I"][:3]),
    # expressions
    ("3x^2-2x", ["x(3x-2)", "-2x+3x^{2}", "3x^2 - 2x", "3*x**2 - 2*x", "3x²-2x"], ["3x^2+2x", "3x-2", "x(3x+2)", "3y^2-2y", "3x^2-2x=0", "0, 2/3", "x", "3x^2-2x+0.0001", "3x^2-2x or 0"]),
    ("(a+b)^2", ["a^2+2ab+b^2", "(b+a)(a+b)", "a^2+b^2+2ba"], ["a^2+b^2", "(a-b)^2", "(A+B)^2", "2(a+b)"]),
    (r"\frac{x+1}{x}", [r"1+\frac{1}{x}", "1+x^{-1}", "(x+1)/x"], [r"x+1/x", r"\frac{x}{x+1}", "2", "1+x"]),
    (r"\frac{1}{n(n+1)}", [r"\frac{1}{n}-\frac{1}{n+1}", r"\frac{1}{n^2+n}"], [r"\frac{1}{n}", r"\frac{1}{n^2}-n"]),
    (r"\sin^2 x", [r"(\sin x)^2", r"1-\cos^2 x", r"\sin^{2}(x)"], [r"\sin x^2", r"\sin 2x", r"\cos^2 x"]),
    ("n!", ["n!", r"n\cdot (n-1)!"], ["n", "(n-1)!", "n^n"]),
    ("2^n", ["2^{n}", r"2\cdot 2^{n-1}"], ["n^2", "2n", "2^{n-1}"]),
    (r"\sqrt{x^2}", ["|x|"], ["x", "-x", "x^2"]),
    ("x_1 + x_2", ["x_2+x_1", "x_{1}+x_{2}"], ["x_1+x_1", "2x", "x_1-x_2"]),
    (r"\frac{n(n+1)}{2}", [r"\sum_{k=1}^{n} k", r"\frac{n^2+n}{2}", r"\binom{n+1}{2}"][:2], [r"\sum_{k=1}^{n} k^2", "n(n+1)"]),
    # equations
    ("y=2x-5", ["y = -5+2x", "2x-y=5", "y-2x+5=0", "2x - 5", "2y = 4x - 10", "x = (y+5)/2"], ["y=2x+5", "y=x-5", "2x-y=-5", "2x-5=0", "y>2x-5", "z=2x-5"]),
    ("x^2+y^2=9", ["y^2+x^2=9", "9 = x^2+y^2", "x^2+y^2-9=0", "2x^2+2y^2=18"], ["x^2-y^2=9", "x^2+y^2=3", r"x^2+y^2 \le 9", "x^2+y^2", "9", "x+y=3"]),
    ("x=7", ["7", "x=7", "x = 7.0", "7 = x", "2x=14"], ["x=8", "y=7", "x>7", "x=7,8", r"x \ne 7", "x=-7", "x", r"x \approx 7"]),
    # sets and lists
    ("2,5", ["5, 2", r"\{2,5\}", "x=2, x=5", "x=2 or x=5", r"x = 5 \text{ or } x = 2", "2 and 5", "x_1=2, x_2=5", r"x \in \{2,5\}", "x = 2, 5", "2; 5", r"2,\ 5", "2, and 5"], ["2", "5", "2,6", "25", "(2,5)", "[2,5]", "2,5,5", "2,5,7", "2 < 5", "2,-5", "2.5", "not 2, 5", r"x \ne 2, x \ne 5"]),
    (r"\{4,6,9\}", ["4,6,9", "9, 6, 4", r"\{9,4,6\}", r"4, 6, \text{ and } 9", "{4,6,9}", r"\left\{4,6,9\right\}", r"\lbrace 4,6,9\rbrace", r"\{4\}\cup\{6,9\}"], ["(4,6,9)", "[4,6,9]", "4,6", "469", r"\{4,6,9,10\}", r"\{4,6\},\{9\}", "4,6,8", "19"]),
    (r"\pm 3", ["3, -3", r"\{-3,3\}", r"x=\pm 3", "-3 and 3", "±3", r"\pm\sqrt{9}", "+/-3"], ["3", "-3", "6", r"\pm 4", r"3\pm 3", "(3,-3)"]),
    (r"2\pm\sqrt{3}", [r"2+\sqrt{3}, 2-\sqrt{3}", r"x = 2 \pm \sqrt{3}", r"\{2-\sqrt3,2+\sqrt3\}"], [r"2+\sqrt{3}", r"2\pm\sqrt{2}", r"\pm(2+\sqrt{3})"]),
    (r"\emptyset", [r"\varnothing", r"\{\}", "∅", r"\{ \}"], ["0", r"\{0\}", r"\{\emptyset\}", "x"]),
    ("x=1, y=4", ["y=4, x=1", "(1,4)", "x = 1 and y = 4"][::2], ["x=4, y=1", "1", "x=1", "(4,1)"]),
    # tuples
    ("(2,-5)", [r"\left(2,-5\right)", r"(2, -\frac{10}{2})", "(2; -5)", "x=2, y=-5", r"\langle 2,-5 \rangle"], ["(-5,2)", "(2,5)", "(2,-5,0)", "2,-5", r"\{2,-5\}", "[2,-5]", "2", "-3", "(2)(-5)", "(2,-5),(1,1)", "(2,-5) or (1,1)", r"\begin{pmatrix}2\\-5\end{pmatrix}"]),
    ("(1,2),(3,4)", ["(3,4),(1,2)", r"\{(1,2),(3,4)\}", "(1,2) and (3,4)"], ["(1,2)", "(1,2,3,4)", "(1,2),(4,3)", "1,2,3,4"]),
    (r"\left(\frac{1}{3},\pi\right)", [r"(1/3,\pi)", "(0.333333, 3.14159)"], ["(0.33, 3.14)", r"(\pi,1/3)"]),
    ("[1,2,3]", ["[1, 2, 3]"], ["(1,2,3)", "[3,2,1]", "1,2,3", r"\{1,2,3\}"]),
    # intervals
    ("[2,7)", ["[2, 7)", r"\left[2,7\right)", r"2 \le x < 7", r"x \in [2,7)", r"7 > x \ge 2", r"x \ge 2 \text{ and } x < 7", r"2\leq t<7", r"\{x \mid 2 \le x < 7\}"], ["(2,7)", "[2,7]", "(2,7]", "2 < x < 7", r"2 \le x \le 7", "[7,2)", "2", "[2,8)", "2,7", r"x \ge 2", r"x \ge 2 \text{ or } x < 7"]),
    ("(4,9)", ["4<x<9", r"x\in(4,9)"], [r"4\le x\le 9", "[4,9]", "9<x<4", "x>4"]),
    (r"(-\infty,6)", ["x<6", r"6>x", r"x \in (-\infty, 6)", "(-inf, 6)", "(-∞,6)"], [r"x\le 6", r"(-\infty,6]", "x>6", r"(6,\infty)", "6", r"(-\infty,\infty)"]),
    (r"x \ge -1", [r"[-1,\infty)", r"-1 \le x", "x>=-1", "x ≥ −1", r"x \geqslant -1", r"x \ge -\frac{2}{2}"], ["x>-1", r"(-1,\infty)", r"x\le -1", "-1", "x=-1", r"y \ge -1", r"[-1,\infty]"][:6]),
    (r"(-\infty,0)\cup(5,\infty)", [r"(5,\infty)\cup(-\infty,0)", "x<0 or x>5", r"x<0 \text{ or } x>5", "(-inf,0)U(5,inf)"], [r"(-\infty,0]\cup[5,\infty)", "(0,5)", "x<0 and x>5", "x<0", r"(-\infty,\infty)", r"(-\infty,0)\cap(5,\infty)"]),
    (r"[0,2]\cup[2,4]", ["[0,4]", r"0\le x\le 4"], ["[0,4)", "[0,2]", r"[0,2)\cup(2,4]"]),
    (r"x \ne 2", [r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R}\setminus\{2\}", "x != 2", r"x \neq 2"], ["x=2", "2", r"\mathbb{R}", r"x\ne 3", r"(-\infty,2)"]),
    (r"\mathbb{R}", [r"(-\infty,\infty)", "ℝ", r"x \in \mathbb{R}", r"\mathbb R"], [r"[0,\infty)", "0", r"\mathbb{Z}", r"\mathbb{C}", "R"]),
    (r"2x+y \le 4", [r"y \le 4-2x", r"4 \ge 2x+y", r"4x+2y\leq 8"], [r"2x+y<4", r"2x+y\ge 4", "2x+y=4", r"y\ge 4-2x", "4"]),
    (r"\{1\}\cup[3,4)", [r"[3,4)\cup\{1\}"], [r"[1,4)", r"\{1,3\}", r"(1,3]"]),
    # matrices
    (r"\begin{pmatrix} 2 & 0 \\ -1 & 3 \end{pmatrix}", [r"\begin{bmatrix}2&0\\-1&3\end{bmatrix}", r"\begin{pmatrix}\frac42&0\\-1&\sqrt9\\ \end{pmatrix}", r"\left(\begin{array}{cc}2&0\\-1&3\end{array}\right)"], [r"\begin{pmatrix}2&-1\\0&3\end{pmatrix}", "6", "(2,0,-1,3)", r"\begin{pmatrix}2&0\end{pmatrix}", r"\begin{vmatrix}2&0\\-1&3\end{vmatrix}", r"\begin{pmatrix}2&0\\-1&4\end{pmatrix}", "[[2,0],[-1,3]]"]),
    (r"\begin{pmatrix} 5 \\ 6 \end{pmatrix}", [r"\begin{bmatrix} 5 \\ 6 \end{bmatrix}"], [r"\begin{pmatrix} 5 & 6 \end{pmatrix}", r"\begin{pmatrix} 6 \\ 5 \end{pmatrix}", "(5,6)", "5,6"]),
    # ratios, times, dates, bases
    ("2:5", ["2:5", "2 : 5", "1:2.5"], ["5:2", "2/5", "0.4", "2,5", "2:5:1", "2", "25"]),
    ("1:2:3", ["2:4:6"], ["1:2", "3:2:1", "6"]),
    ("9:45", ["9:45", "09:45"], ["9", "45", "0.2", "1:5", "9:54", "9:45 pm", "945"]),
    (r"3:15\text{ PM}", ["3:15 pm", "3:15 p.m.", r"3{:}15\text{ PM}"][:2], ["3:15 am", "15:15", "3:15", "3"]),
    ("2021-03-14", ["2021-03-14"], ["2004", "2021-03-15", "2021"]),
    ("110_2", ["110_{2}", r"110_{\text{two}}", "0110_2"], ["6", "110", "110_3", "101_2", "110_{10}", "110^2"]),
    ("2A_{16}", [r"2A_{16}", "0x2A", r"\text{2A}_{16}"], ["42", "2A", "2A_{15}", "A2_{16}", "2B_{16}"]),
    ("42_{10}", ["42", "42_{10}"], ["42_8", "42_{11}"]),
    # infinity
    (r"\infty", [r"+\infty", "infinity", "∞"], [r"-\infty", "10^{1000}", "1/0", "0", "n"]),
    (r"-\infty", [r"-\infty", "−∞"], [r"\infty", "-10^{99}"]),
    # texts
    (r"\text{(D)}", ["D", "(D)", r"\text{D}", r"\textbf{(D)}", r"\mathrm{(D)}", "d", r"\textbf{(D) }"], ["(E)", "C, D", "D or E", "not D", "A,B,C,D,E", "DD", "4", "(D) or (E)"]),
    ("B", ["B", "(B)", r"\text{B}", "b", r"\textbf{(B)}"], ["C", "A, B", "B, C", "not B", "8", "AB"]),
    (r"\text{Wednesday}", ["Wednesday", "wednesday", r"\text{wednesday}", "Wednesday."], ["Thursday", "Wed", "Wednesday or Thursday", "not Wednesday", "Wednesday, Friday", "3"]),
    (r"\text{odd}", ["odd", "Odd", r"\textbf{odd}"], ["even", "odd or even", "odd, even", "not odd", "oddly", "1"]),
    (r"\text{No}", ["no", "No", "NO."], ["yes", "no or yes", "on", "no, yes", "n"]),
    ("True", ["true", r"\text{True}"], ["false", "not true", "true or false", "1"]),
    (r"\text{no real solutions}", ["no real solutions", "No real solutions"], ["real solutions", "no solutions", "0", r"\emptyset", "one"]),
    ("Marie Curie", ["Marie Curie", "marie curie", r"\text{Marie Curie}"], ["Marie", "Pierre Curie", "Marie Curie and Pierre Curie"]),
    (r"\text{May 14}", ["May 14", r"\text{May 14}"], ["14", "May", "May 15", "14 May or so"]),
    (r"2\pi r^2", [r"2\pi r^{2}", r"\pi\cdot 2r^2"], [r"\pi r^2", "2r^2", r"2\pi R^2", "6.28r^2"]),
    (r"3x \equiv 2 \pmod{5}", [r"3x\equiv 2\pmod{5}"], [r"3x \equiv 3 \pmod{5}", "2", "4"]),
]
MATHEMATICS += [
    (r"(-2,3]", ["-5 < 2x-1 \\le 5", r"x > -2, x \le 3"], ["-5 < 2x-1 < 5", r"-5 < x \le 5"]),
    ("(-1,7)", ["|x-3|<4", "|3-x| < 4", "4 > |x-3|"], [r"|x-3|\le 4", "|x-3|>4", "|x+3|<4", "|x|<7"]),
    (r"(-\infty,-5]\cup[5,\infty)", [r"|x|\ge 5", r"x \le -5 \text{ or } x \ge 5", r"|2x| \geq 10"], ["|x|>5", r"|x|\le 5", r"x\ge 5"]),
    (r"x>4", ["2x>8", "3x-2>10", "-x<-4", r"8<2x", r"(4,\infty)"], ["2x>4", "-x>-4", "x^2>16", r"2x\ge 8"]),
]
