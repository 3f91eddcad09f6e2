r"""A grammar of expressions, in LaTeX or as one types them, read into plain tuples: no `eval`, no sympify, no name that
does anything.

Numbers (decimals are exact fractions), letters with an index, pi, e, i, Greek letters; + - * / ^ ** ! | |, \frac,
\binom, \sqrt[n], \cdot, \times, \div; the functions of `FUNCTIONS` (log is the natural one), also as \sin^2 x and
\log_b x. A product may be written without a sign, and a letter is one variable: xy is x times y. Of `f(x) = ...` or `y
= ...` the right side counts. Anything else is Unreadable. The caps on length, depth, number of parts and of digits are
checked while reading, so reading is linear.

A node is ("number", Fraction), ("name", str), or (operator, node, ...), which is add, multiply, divide, power,
negative, factorial, binomial, root, logarithm, or a function.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

Node = tuple[Any, ...]
# characters, brackets in brackets, parts, digits of a number
MAX_CHARS = 1000
MAX_DEPTH = 60
MAX_NODES = 500
MAX_DIGITS = 100

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp sqrt abs floor ceil".split()
)
ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lfloor": "floor", "lceil": "ceil"}
GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi "
    "varphi chi psi "
    "omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell".split()
)
CLOSING = {"(": ")", "[": "]", "{": "}", "lfloor": "rfloor", "lceil": "rceil"}
IGNORED = re.compile(r"(?:\s|\\[,;:! ]|\\q?quad(?![a-zA-Z])|\\(?:left|right|displaystyle)(?![a-zA-Z])|~)+")
TOKEN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|\\(?P<command>[a-zA-Z]+)|(?P<sign>\*\*|[-+*/^!_|()\[\]{}=])|(?P<word>[a-zA-Z]+)"
)
LEFT_SIDE = re.compile(r"^\s*[a-zA-Z]\w?(?:_\{?\w{1,3}\}?)?\s*(?:\([^()=]{1,20}\))?\s*=(?!=)")
REPLACEMENTS = (
    ("\u2212", "-"),
    ("\u00d7", "*"),
    ("\u00b7", "*"),
    ("\u22c5", "*"),
    ("\u00f7", "/"),
    ("\u03c0", r"\pi "),
    ("\u00b2", "^2"),
    ("\u00b3", "^3"),
    ("\u221a", r"\sqrt "),
    ("\\{", "{"),
    ("\\}", "}"),
    ("$", ""),
)


class ExpressionParseError(Exception):
    """Why a text is no expression of this grammar, or more than is computed."""


def parse_expression(text: str) -> Node:
    """The tree of an expression. Raises ExpressionParseError."""
    if len(text) > MAX_CHARS:
        raise ExpressionParseError(f"is longer than {MAX_CHARS} characters")
    for sign, plain in REPLACEMENTS:
        text = text.replace(sign, plain)
    text = LEFT_SIDE.sub("", text.strip()).rstrip(" .,;")
    parser = Parser(tokenize(text))
    tree = parser.sum()
    if parser.kind() != "end":
        raise ExpressionParseError(f"is not read beyond {parser.token[1]!r}")
    return tree


def tokenize(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token; words are cut into known functions and single letters."""
    result: list[tuple[str, str]] = []
    position = 0
    while position < len(text):
        if skipped := IGNORED.match(text, position):
            position = skipped.end()
            continue
        match = TOKEN.match(text, position)
        if match is None:
            raise ExpressionParseError(f"holds {text[position : position + 1]!r}, which no expression does")
        position = match.end()
        kind = str(match.lastgroup)
        if kind == "number" and len(match[0]) > MAX_DIGITS:
            raise ExpressionParseError(f"has a number of more than {MAX_DIGITS} digits")
        if kind == "word":
            result += _word_tokens(match["word"])
        elif kind == "command":
            result.append(_command_token(match["command"]))
        else:
            result.append((kind, "^" if match[0] == "**" else match[0]))
    return [*result, ("end", "its end")]


def _word_tokens(word: str) -> list[tuple[str, str]]:
    name = ALIASES.get(word, word)
    if name in FUNCTIONS:
        return [("function", name)]
    if name == "pi" or name in GREEK:
        return [("name", name)]
    if len(word) > 3:
        raise ExpressionParseError(f"holds the word {word[:20]!r}")
    return [("name", letter) for letter in word]


def _command_token(command: str) -> tuple[str, str]:
    name = ALIASES.get(command, command)
    if name in ("dfrac", "tfrac", "cfrac"):
        name = "frac"
    if name in ("cdot", "times", "ast"):
        return "sign", "*"
    if name == "div":
        return "sign", "/"
    if name in ("vert", "lvert", "rvert", "mid"):
        return "sign", "|"
    if name == "pi" or name in GREEK:
        return "name", name
    if command in CLOSING or command in CLOSING.values():
        return "sign", command
    if name in FUNCTIONS or name in ("frac", "binom"):
        return "function", name
    raise ExpressionParseError(f"holds \\{command[:20]}, which is none of the grammar")


class Parser:
    """Recursive descent; each method reads what its name says and leaves `position` behind it."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.num_nodes = 0
        self.open_bars = 0

    @property
    def token(self) -> tuple[str, str]:
        return self.tokens[self.position]

    def kind(self) -> str:
        return self.token[0]

    def accept(self, sign: str) -> bool:
        """Whether the next token is that sign; then it is read."""
        if self.token == ("sign", sign):
            self.position += 1
            return True
        return False

    def expect(self, sign: str) -> None:
        if not self.accept(sign):
            raise ExpressionParseError(f"has {self.token[1]!r} where {sign!r} should be")

    def node(self, *parts: Any) -> Node:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise ExpressionParseError(f"has more than {MAX_NODES} parts")
        return parts

    def sum(self) -> Node:
        tree = self.signed()
        while self.token in (("sign", "+"), ("sign", "-")):
            tree = self.node("add", tree, self.signed())
        return tree

    def signed(self) -> Node:
        negative = False
        while self.token in (("sign", "+"), ("sign", "-")):
            negative ^= self.token[1] == "-"
            self.position += 1
        tree = self.product()
        return self.node("negative", tree) if negative else tree

    def product(self) -> Node:
        tree = self.parse_factor()
        while True:
            if self.accept("*"):
                tree = self.node("multiply", tree, self.operand())
            elif self.accept("/"):
                tree = self.node("divide", tree, self.operand())
            elif self.starts_factor():
                if self.kind() == "number" and self.tokens[self.position - 1][0] == "number":
                    raise ExpressionParseError("has two numbers side by side")
                tree = self.node("multiply", tree, self.parse_factor())
            else:
                return tree

    def operand(self) -> Node:
        """What follows * or /: it may have a sign of its own."""
        if self.accept("-"):
            return self.node("negative", self.parse_factor())
        self.accept("+")
        return self.parse_factor()

    def starts_factor(self) -> bool:
        """Whether a factor begins here, so that a product is meant."""
        kind, text = self.token
        if kind == "sign":
            return text in CLOSING or (text == "|" and not self.open_bars)
        return kind != "end"

    def parse_factor(self) -> Node:
        tree = self.atom()
        if self.accept("!"):
            if self.accept("!"):
                raise ExpressionParseError("has a double factorial")
            tree = self.node("factorial", tree)
        if self.accept("^"):
            return self.node("power", tree, self.exponent())
        return tree

    def exponent(self) -> Node:
        """A group, or one signed factor: 2^-1, 2^3^2 = 2^(3^2). In LaTeX x^10 is x^1 0; as people write it, it is
        x^10."""
        self.enter()
        negative = self.accept("-")
        tree = self.parse_factor()
        self.depth -= 1
        return self.node("negative", tree) if negative else tree

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionParseError(f"is nested more than {MAX_DEPTH} deep")

    def atom(self) -> Node:
        self.enter()
        tree = self._atom()
        self.depth -= 1
        return tree

    def _atom(self) -> Node:
        kind, text = self.token
        self.position += 1
        if kind == "number":
            return self.node("number", Fraction(text))
        if kind == "name":
            return self.node("name", text + self.index())
        if kind == "function":
            return self.function(text)
        if kind == "sign" and text == "|":
            self.open_bars += 1
            inner = self.sum()
            self.open_bars -= 1
            self.expect("|")
            return self.node("abs", inner)
        if kind == "sign" and text in CLOSING:
            outer_bars = self.open_bars
            self.open_bars = 0
            inner = self.sum()
            self.open_bars = outer_bars
            self.expect(CLOSING[text])
            if text in ("lfloor", "lceil"):
                return self.node({"lfloor": "floor", "lceil": "ceil"}[text], inner)
            return inner
        raise ExpressionParseError(f"has {text!r} where a number, a letter or a bracket should be")

    def index(self) -> str:
        """The index of a letter: x_1, x_{12}, x_n."""
        if not self.accept("_"):
            return ""
        braced = self.accept("{")
        kind, text = self.token
        if kind not in ("number", "name"):
            raise ExpressionParseError(f"has the index {text!r}")
        self.position += 1
        if braced:
            self.expect("}")
        return f"_{text}"

    def function(self, name: str) -> Node:
        if name in ("frac", "binom"):
            return self.node({"frac": "divide", "binom": "binomial"}[name], self.argument(), self.argument())
        if name == "sqrt":
            if self.accept("["):
                degree = self.sum()
                self.expect("]")
                return self.node("root", self.argument(), degree)
            return self.node("sqrt", self.argument())
        base = self.argument() if name == "log" and self.accept("_") else None
        power = self.exponent() if self.accept("^") else None
        if power is not None and power[0] == "negative":
            raise ExpressionParseError(f"has {name} to a negative power, which some read as its inverse")
        inner = self.operands()
        if base is not None:
            tree = self.node("logarithm", inner, base)
        else:
            tree = self.node(name, inner)
        if power is None:
            return tree
        return self.node("power", tree, power)

    def argument(self) -> Node:
        r"""What \frac, \sqrt and an index take: a group or one token; of several digits the first, as in \frac12."""
        kind, text = self.token
        if (
            kind == "number"
            and len(text) > 1
            and text.isdigit()
            and self.tokens[self.position - 1][1] in ("frac", "binom")
        ):
            self.tokens[self.position : self.position + 1] = [("number", text[0]), ("number", text[1:])]
        return self.atom()

    def operands(self) -> Node:
        """What a function without brackets takes: the factors up to the next sign or function, as in sin 2x cos x."""
        tree = self.parse_factor()
        if self.tokens[self.position - 1][1] in (")", "]", "}"):
            return tree
        while self.starts_factor() and self.kind() in ("number", "name"):
            tree = self.node("multiply", tree, self.parse_factor())
        return tree


def free_variables(tree: Node) -> set[str]:
    """The variables of a tree; pi, e and i are none."""
    if tree[0] == "name":
        return {tree[1]} - {"pi", "e", "i"}
    return set().union(*(free_variables(part) for part in tree[1:] if isinstance(part, tuple)))
