"""Branches, and what Python asks."""

BRANCHES = {
    "isinstance": """
self.c@ = CONV
---
x = self.c@(x)
x = F.relu(x) if isinstance(x, Tensor) else x.neg()
""",
    "hasattr": """
self.c@ = CONV
---
x = self.c@(x.tensors if hasattr(x, "tensors") else x.tanh())
""",
    "type(x) is": """
self.c@ = CONV
---
x = self.c@(x)
x = x.abs() if type(x) is Tensor else x
""",
    "dict by shape": """
self.c@ = CONV
---
x = self.c@(x) * {6: 3.0, 7: 2.0}.get(x.shape[-1], 1.0)
""",
    "shape in a set": """
self.c@ = CONV
---
x = self.c@(x) if x.shape[1] in {4, 8} else x
""",
    "match": """
self.c@ = CONV
---
match x.dim():
    case 4:
        x = self.c@(x).sin()
    case _:
        x = self.c@(x)
""",
    "try": """
self.c@ = CONV
---
try:
    x = self.c@(x.tensors)
except AttributeError:
    x = self.c@(x).sin()
""",
    "a part's own mode": """
self.c@ = CONV
self.d@ = nn.Dropout(0.3)
---
x = self.d@(self.c@(x)) * (1 if self.d@.training else 2)
""",
    "own mode": """
self.c@ = CONV
---
x = self.c@(x) * (2 if self.training else 1)
""",
    "is_grad_enabled": """
self.c@ = CONV
---
x = self.c@(x) * (0.5 if torch.is_grad_enabled() else 1.0)
""",
    "requires_grad": """
self.c@ = CONV
---
y = self.c@(x)
x = y * 1.5 if y.requires_grad else y
""",
    "length of the batch": """
self.c@ = CONV
---
x = self.c@(x)
x = x.sin() if len(x) > 1 else x
""",
    "a tensor's value": """
self.c@ = CONV
---
x = self.c@(x)
x = x if x.sum() > 0 else -x
""",
    "cache by shape": """
self.c@ = CONV
self.cache@ = {}
---
if x.shape[-1] not in self.cache@:
    self.cache@[x.shape[-1]] = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
x = self.c@(x) + self.cache@[x.shape[-1]]
""",
    "isinstance of layers": """
self.layers@ = nn.ModuleList([CONV, nn.Tanh(), CONV])
---
for layer in self.layers@:
    x = layer(x) * 2 if isinstance(layer, nn.Conv2d) else layer(x)
""",
    "type of layers": """
self.layers@ = nn.ModuleList([CONV, nn.Tanh(), CONV])
---
for layer in self.layers@:
    x = layer(x) * 2 if type(layer) is nn.Conv2d else layer(x)
""",
    "name of layers' class": """
self.layers@ = nn.ModuleList([CONV, nn.Tanh(), CONV])
---
for layer in self.layers@:
    x = layer(x) * 2 if layer.__class__.__name__ == "Conv2d" else layer(x)
""",
    "conv's attributes": """
self.c@ = CONV
---
x = self.c@(x) / (self.c@.out_channels + self.c@.kernel_size[0])
""",
    "NumPy scalar": """
self.c@ = CONV
---
x = (x + self.c@(x)) / np.sqrt(2.0)
""",
    "keys that are no names": """
self.m@ = nn.ModuleDict({"in": CONV, "it's": CONV})
---
x = self.m@["it's"](self.m@["in"](x).tanh())
""",
}
