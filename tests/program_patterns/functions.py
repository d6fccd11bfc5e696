"""Autograd functions of the user's own."""

FUNCTIONS = {
    "straight-through": """
self.c@ = CONV
---
x = Sign.apply(self.c@(x)) + x
""",
    "gradient reversal": """
self.c@ = CONV
---
x = self.c@(Reverse.apply(x, 0.7)).tanh()
""",
}
