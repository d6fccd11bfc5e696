"""Modules that keep state."""

STATE = {
    "counter": """
self.c@ = CONV
self.register_buffer("n@", torch.zeros(()))
---
if self.training:
    self.n@ += 1
x = self.c@(x) * (1 + 0.1 * self.n@.clone())
""",
    "running average": """
self.c@ = CONV
self.register_buffer("avg@", torch.ones(()))
---
if self.training:
    self.avg@.mul_(0.9).add_(x.detach().mean() * 0.1)
x = self.c@(x) * self.avg@.clone()
""",
    "buffer set anew": """
self.c@ = CONV
self.register_buffer("avg@", torch.ones(()))
---
x = self.c@(x) * self.avg@
self.avg@ = 0.9 * self.avg@ + 0.1 * x.detach().mean()
""",
    "Python counter": """
self.c@ = CONV
self.k@ = 0
---
self.k@ += 1
x = self.c@(x) * (1 + 0.1 * (self.k@ % 3))
""",
    "list that grows": """
self.c@ = CONV
self.seen@ = []
---
x = self.c@(x)
self.seen@.append(x.detach().mean())
x = x + 0.1 * len(self.seen@)
""",
    "last map": """
self.c@ = CONV
self.last@ = None
---
y = self.c@(x)
x = y if self.last@ is None or self.last@.shape != y.shape else y + 0.1 * self.last@
self.last@ = y.detach()
""",
    "teacher that follows": """
self.c@ = CONV
self.t@ = CONV
self.t@.requires_grad_(False)
---
if self.training:
    with torch.no_grad():
        self.t@.weight.mul_(0.9).add_(0.1 * self.c@.weight)
x = self.c@(x) + self.t@(x.detach())
""",
}
