"""Contexts and decorators around convs."""

CONTEXTS = {
    "no_grad": """
self.c@ = CONV
---
with torch.no_grad():
    y = self.c@(x)
x = x + y
""",
    "enable_grad": """
self.c@ = CONV
---
with torch.enable_grad():
    x = self.c@(x)
""",
    "set_grad_enabled": """
self.c@ = CONV
---
with torch.set_grad_enabled(not self.training):
    y = self.c@(x)
x = x + y
""",
    "detach": """
self.c@ = CONV
---
x = x + self.c@(x.detach())
""",
    "autocast island": """
self.c@ = CONV
self.register_buffer("w@", torch.linspace(0, 0.01, 144).view(-1, 1))
---
with torch.autocast("cpu", torch.bfloat16):
    y = torch.matmul(x.detach().float().flatten(1), self.w@.float())
x = self.c@(x) + y.to(x.dtype).view(-1, 1, 1, 1)
""",
    "checkpoint of a conv": """
self.c@ = CONV
---
x = x + checkpoint(self.c@, x, use_reentrant=False)
""",
    "checkpoint, reentrant": """
self.c@ = CONV
---
x = x + checkpoint(self.c@, x, use_reentrant=True)
""",
    "checkpoint of a function": """
self.c@ = CONV
self.d@ = CONV
---
def inner(y):
    return self.d@(self.c@(y).tanh())
x = checkpoint(inner, x, use_reentrant=False)
""",
    "checkpoint in training only": """
self.c@ = CONV
---
x = checkpoint(self.c@, x, use_reentrant=False) if self.training else self.c@(x)
""",
    "functional_call": """
self.c@ = CONV
---
x = torch.func.functional_call(self.c@, dict(self.c@.named_parameters()), (x,))
""",
    "vmap": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
---
x = torch.func.vmap(lambda each: self.c@(each.unsqueeze(0)).squeeze(0))(x)
""",
    "hook on a map": """
self.c@ = CONV
---
x = self.c@(x)
if x.requires_grad:
    x.register_hook(lambda gradient: gradient * 2)
""",
    "gradient in the forward": """
self.c@ = CONV
---
with torch.enable_grad():
    z = x.detach().requires_grad_()
    gradient, = torch.autograd.grad(self.c@(z).square().sum(), z)
x = self.c@(x) + gradient
""",
    "saved on the CPU": """
self.c@ = CONV
---
with torch.autograd.graph.save_on_cpu():
    x = self.c@(x).tanh()
""",
}
