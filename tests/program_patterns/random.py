"""Random draws."""

RANDOM = {
    "functional dropout": """
self.c@ = CONV
---
x = F.dropout(self.c@(x), 0.3, self.training)
""",
    "torch's in eval too": """
self.c@ = CONV
---
x = self.c@(x) * torch.rand_like(x)
""",
    "NumPy's": """
self.c@ = CONV
---
x = x if self.training and np.random.rand() < 0.5 else x + self.c@(x)
""",
    "Python's": """
self.c@ = CONV
---
x = self.c@(x) * random.random()
""",
    "torch generator of its own": """
self.c@ = CONV
self.g@ = torch.Generator().manual_seed(3)
---
x = self.c@(x) * torch.rand(x.shape, generator=self.g@, dtype=x.dtype)
""",
    "Python generator of its own": """
self.c@ = CONV
self.g@ = random.Random(3)
---
x = self.c@(x) * self.g@.random()
""",
    "NumPy generator of its own": """
self.c@ = CONV
self.g@ = np.random.default_rng(3)
---
x = self.c@(x) * float(self.g@.random())
""",
    "layers dropped": """
self.layers@ = nn.ModuleList([CONV, CONV])
---
for layer in self.layers@:
    if self.training and torch.rand(()) < 0.5:
        continue
    x = layer(x).tanh()
""",
    "layers shuffled": """
self.c@ = CONV
self.d@ = CONV
---
convs = [self.c@, self.d@]
random.shuffle(convs)
x = convs[1](convs[0](x).tanh())
""",
    "crop in training": """
self.c@ = CONV
---
shift = int(torch.randint(0, 3, ())) if self.training else 0
x = self.c@(x.roll(shift, 3))
""",
}
