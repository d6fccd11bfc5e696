"""Convs whose class, forward or call was replaced."""

PATCHED = {
    "_conv_forward": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
self.c@._conv_forward = tiled.__get__(self.c@)
---
x = self.c@(x)
""",
    "forward": """
self.c@ = CONV
self.c@._old_forward = self.c@.forward
self.c@.forward = functools.partial(around, self.c@)
---
x = self.c@(x)
""",
    "a class with a forward": """
self.c@ = Scaled(4, 4, 3, padding=1)
---
x = self.c@(x)
""",
    "a class without": """
self.c@ = Named(4, 4, 3, padding=1)
---
x = self.c@(x) * (2 if isinstance(self.c@, Named) else 1)
""",
    "forward hook": """
self.c@ = CONV
self.c@.register_forward_hook(lambda module, args, output: output * 2)
---
x = self.c@(x)
""",
    "forward pre-hook": """
self.c@ = CONV
self.c@.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
---
x = self.c@(x)
""",
    "backward hook": """
self.c@ = CONV
self.c@.register_full_backward_hook(lambda module, to, of: (to[0] * 2,))
---
x = self.c@(x)
""",
    "in a plain list": """
self.c@ = CONV
self.d@ = CONV
self.plain@ = [self.c@, self.d@]
---
for conv in self.plain@:
    x = conv(x).tanh()
""",
    "in a plain dict": """
self.c@ = CONV
self.plain@ = {"conv": self.c@}
---
x = self.plain@["conv"](x)
""",
    "in a tuple of tuples": """
self.c@ = CONV
self.plain@ = ((3, self.c@),)
---
x = self.plain@[0][1](x) * self.plain@[0][0]
""",
    "a hidden attribute": """
self.c@ = CONV
self.__dict__["plain@"] = self.c@
---
x = self.plain@(x)
""",
    "a partial": """
self.c@ = CONV
self.p@ = functools.partial(self.c@)
---
x = self.p@(x)
""",
    "a bound forward": """
self.c@ = CONV
self.f@ = self.c@.forward
---
x = self.f@(x)
""",
    "its forward called": """
self.c@ = CONV
---
x = self.c@.forward(x)
""",
    "called by keyword": """
self.c@ = CONV
---
x = self.c@(input=x)
""",
    "called twice": """
self.c@ = CONV
---
x = self.c@(self.c@(x).tanh())
""",
    "two names": """
self.c@ = CONV
self.e@ = self.c@
---
x = self.e@(self.c@(x).tanh())
""",
    "two lists": """
self.c@ = CONV
self.d@ = CONV
self.all@ = nn.ModuleList([self.c@, self.d@])
---
x = self.all@[1](self.c@(x).tanh())
""",
    "children": """
self.s@ = nn.Sequential(CONV, nn.Tanh(), CONV)
---
for child in self.s@.children():
    x = child(x)
x = x * len(self.s@)
""",
    "last of a sequence": """
self.s@ = nn.Sequential(CONV, nn.Tanh(), CONV)
---
x = self.s@[:-1](x)
x = x + self.s@[-1](x)
""",
}
