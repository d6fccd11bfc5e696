"""Plain control: loops, comprehensions, calls."""

PLAIN = {
    "conv": """
self.c@ = CONV
---
x = self.c@(x).tanh()
""",
    "conv, norm, activation": """
self.c@ = CONV
self.n@ = nn.BatchNorm2d(4)
---
x = self.n@(self.c@(x)).relu()
""",
    "residual": """
self.c@ = CONV
self.d@ = CONV
---
x = x + self.d@(self.c@(x).sigmoid())
""",
    "branches": """
self.c@ = CONV
self.d@ = CONV
---
x = torch.cat([self.c@(x), self.d@(x)], 1)[:, ::2]
""",
    "squeeze and excite": """
self.c@ = CONV
self.e@ = nn.Conv2d(4, 4, 1)
---
y = self.c@(x)
x = y * self.e@(y.mean((2, 3), keepdim=True)).sigmoid()
""",
    "transposed": """
self.c@ = nn.ConvTranspose2d(4, 4, 3, padding=1)
---
x = self.c@(x, output_size=x.shape[-2:])
""",
    "one dimension": """
self.c@ = nn.Conv1d(4, 4, 3, padding=1)
---
x = self.c@(x.flatten(2)).view_as(x).tanh()
""",
    "three dimensions": """
self.c@ = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))
---
x = self.c@(x.unsqueeze(2)).squeeze(2)
""",
    "inner block": """
self.b@ = Inner()
---
x = self.b@(x)
""",
}
