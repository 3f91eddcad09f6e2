r"""A parser of expressions, in LaTeX or as they are typed, into plain tuples, for `symbolic`: no `eval`, no sympify,
and no name that can run anything. Runs in the main process, which checks the texts, and in the worker process.

The grammar: numbers (decimals are exact fractions), letters with an index, pi, e, i, Greek letters; + - * / ^ ** ! | |,
\frac, \binom, \sqrt[n], \cdot, \times, \div; the functions of `FUNCTIONS` (log is the natural logarithm), also as
\sin^2 x and \log_b x. The sign of a product may be left out, and a letter is one variable: xy is x times y. Of `f(x) =
...` or `y = ...` the right side counts. Anything else raises ExpressionParseError. The limits on length, depth, number
of parts and number of digits are checked while reading, so the time is linear in the text.

A node is ("number", Fraction), ("name", str), or (operator, node, ...); the operator is add, multiply, divide, power,
negative, factorial, binomial, root, logarithm, or a function.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

Node = tuple[Any, ...]
Token = tuple[str, str]
"""(kind, text); the kinds are number, name, function, sign and end."""
# characters of a text, nested brackets, nodes of a tree, digits of a number
MAX_CHARS = 1000
MAX_DEPTH = 60
MAX_NODES = 500
MAX_DIGITS = 100
MAX_WORD_CHARS = 3  # letters of a product that is written as one word

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp sqrt abs floor ceil".split()
)
ALIASES = {
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "lfloor": "floor",
    "lceil": "ceil",
}
GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi "
    "varphi chi psi "
    "omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell".split()
)
CONSTANTS = frozenset({"pi", "e", "i"})
CLOSING = {
    "(": ")",
    "[": "]",
    "{": "}",
    "lfloor": "rfloor",
    "lceil": "rceil",
}
SIGN_COMMANDS = {
    "cdot": "*",
    "times": "*",
    "ast": "*",
    "div": "/",
    "vert": "|",
    "lvert": "|",
    "rvert": "|",
    "mid": "|",
}
FRACTION_COMMANDS = {
    "frac": "divide",
    "dfrac": "divide",
    "tfrac": "divide",
    "cfrac": "divide",
    "binom": "binomial",
}
IGNORED = re.compile(r"(?:\s|\\[,;:! ]|\\q?quad(?![a-zA-Z])|\\(?:left|right|displaystyle)(?![a-zA-Z])|~)+")
TOKEN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|\\(?P<command>[a-zA-Z]+)|(?P<sign>\*\*|[-+*/^!_|()\[\]{}=])"
    r"|(?P<word>[a-zA-Z]+)"
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
PLUS = ("sign", "+")
MINUS = ("sign", "-")


class ExpressionParseError(Exception):
    """Why a text is not an expression of this grammar, or is too large; the message is a predicate."""


def parse_expression(text: str) -> Node:
    """Returns the tree of an expression. Raises ExpressionParseError."""
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


def tokenize(text: str) -> list[Token]:
    """Returns the tokens of a text; words are split into known functions and single letters."""
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        skipped = IGNORED.match(text, position)
        if skipped:
            position = skipped.end()
            continue
        match = TOKEN.match(text, position)
        if match is None:
            raise ExpressionParseError(f"contains {text[position : position + 1]!r}, which is not in an expression")
        position = match.end()
        tokens += _tokens_of(str(match.lastgroup), match[0].lstrip("\\"))
    return [*tokens, ("end", "its end")]


def _tokens_of(kind: str, text: str) -> list[Token]:
    if kind == "word":
        return _word_tokens(text)
    if kind == "command":
        return [_command_token(text)]
    if kind == "number" and len(text) > MAX_DIGITS:
        raise ExpressionParseError(f"has a number of more than {MAX_DIGITS} digits")
    return [(kind, "^" if text == "**" else text)]


def _word_tokens(word: str) -> list[Token]:
    name = ALIASES.get(word, word)
    if name in FUNCTIONS:
        return [("function", name)]
    if name == "pi" or name in GREEK:
        return [("name", name)]
    if len(word) > MAX_WORD_CHARS:
        raise ExpressionParseError(f"contains the word {word[:20]!r}")
    return [("name", letter) for letter in word]


def _command_token(command: str) -> Token:
    if command in SIGN_COMMANDS:
        return "sign", SIGN_COMMANDS[command]
    name = ALIASES.get(command, command)
    if name == "pi" or name in GREEK:
        return "name", name
    if command in CLOSING or command in CLOSING.values():
        return "sign", command
    if name in FUNCTIONS or name in FRACTION_COMMANDS:
        return "function", name
    raise ExpressionParseError(f"contains \\{command[:20]}, which is not in the grammar")


class Parser:
    """A recursive-descent parser: each method reads the tokens of the part that it is named after, from `position` on,
    and returns the tree of that part."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.num_nodes = 0
        self.open_bars = 0

    @property
    def token(self) -> Token:
        return self.tokens[self.position]

    @property
    def last_token(self) -> Token:
        return self.tokens[self.position - 1]

    def kind(self) -> str:
        return self.token[0]

    def accept(self, sign: str) -> bool:
        """Reads the next token if it is that sign, and returns whether it is."""
        if self.token == ("sign", sign):
            self.position += 1
            return True
        return False

    def expect(self, sign: str) -> None:
        """Reads a sign. Raises ExpressionParseError if the next token is not that sign."""
        if not self.accept(sign):
            raise ExpressionParseError(f"has {self.token[1]!r} where {sign!r} should be")

    def node(self, *parts: Any) -> Node:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise ExpressionParseError(f"has more than {MAX_NODES} parts")
        return parts

    def sum(self) -> Node:
        tree = self.signed()
        while self.token in (PLUS, MINUS):
            tree = self.node("add", tree, self.signed())
        return tree

    def signed(self) -> Node:
        negative = False
        while self.token in (PLUS, MINUS):
            if self.token == MINUS:
                negative = not negative
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
                if self.kind() == "number" and self.last_token[0] == "number":
                    raise ExpressionParseError("has two numbers side by side")
                tree = self.node("multiply", tree, self.parse_factor())
            else:
                return tree

    def operand(self) -> Node:
        """The factor after * or /, which may have a sign."""
        if self.accept("-"):
            return self.node("negative", self.parse_factor())
        self.accept("+")
        return self.parse_factor()

    def starts_factor(self) -> bool:
        """Returns whether the next token begins a factor, so that the sign of a product was left out."""
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
        """A group, or one signed factor: 2^-1, 2^3^2 = 2^(3^2). x^10 is read as it is usually meant, although it is x^1
        0 in LaTeX."""
        self.enter()
        negative = self.accept("-")
        tree = self.parse_factor()
        self.depth -= 1
        return self.node("negative", tree) if negative else tree

    def enter(self) -> None:
        """Counts a level. Raises ExpressionParseError if there are too many."""
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
            return self._absolute_value()
        if kind == "sign" and text in CLOSING:
            return self._group(text)
        raise ExpressionParseError(f"has {text!r} where a number, a letter or a bracket should be")

    def _absolute_value(self) -> Node:
        self.open_bars += 1
        inner = self.sum()
        self.open_bars -= 1
        self.expect("|")
        return self.node("abs", inner)

    def _group(self, opening: str) -> Node:
        # within brackets a bar opens a new absolute value
        outer_bars = self.open_bars
        self.open_bars = 0
        inner = self.sum()
        self.open_bars = outer_bars
        self.expect(CLOSING[opening])
        return self.node(ALIASES[opening], inner) if opening in ALIASES else inner

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
        if name in FRACTION_COMMANDS:
            return self.node(FRACTION_COMMANDS[name], self.argument(), self.argument())
        if name == "sqrt":
            return self._root()
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

    def _root(self) -> Node:
        if not self.accept("["):
            return self.node("sqrt", self.argument())
        degree = self.sum()
        self.expect("]")
        return self.node("root", self.argument(), degree)

    def argument(self) -> Node:
        r"""The argument of \frac, \sqrt and an index: a group or one token; of a number after \frac only the first
        digit, as in \frac12."""
        kind, text = self.token
        is_long_number = kind == "number" and len(text) > 1 and text.isdigit()
        if is_long_number and self.last_token[1] in FRACTION_COMMANDS:
            self.tokens[self.position : self.position + 1] = [("number", text[0]), ("number", text[1:])]
        return self.atom()

    def operands(self) -> Node:
        """The argument of a function without brackets: the factors up to the next sign or function, as in
        sin 2x cos x."""
        tree = self.parse_factor()
        if self.last_token[1] in (")", "]", "}"):
            return tree
        while self.starts_factor() and self.kind() in ("number", "name"):
            tree = self.node("multiply", tree, self.parse_factor())
        return tree


def children(tree: Node) -> list[Node]:
    """Returns the nodes that a node contains."""
    return [part for part in tree[1:] if isinstance(part, tuple)]


def free_variables(tree: Node) -> set[str]:
    """Returns the variables of a tree, without pi, e and i."""
    if tree[0] == "name":
        return {tree[1]} - CONSTANTS
    return set().union(*map(free_variables, children(tree)))
