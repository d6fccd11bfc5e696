"""Weights that others read, tie or compute."""

WEIGHTS = {
    "equalised": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
---
x = F.conv2d(x, self.c@.weight * 0.3, self.c@.bias, padding=1)
""",
    "equalised in a module": """
self.e@ = Equalised(nn.Conv2d(4, 4, 3))
---
x = self.e@(x)
""",
    "central difference": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1, bias=False)
---
x = self.c@(x) - 0.7 * F.conv2d(x, self.c@.weight.sum((2, 3), keepdim=True))
""",
    "tied decoder": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
---
x = F.conv_transpose2d(self.c@(x).relu(), self.c@.weight, padding=1)
""",
    "shape": """
self.c@ = CONV
---
x = self.c@(x) / self.c@.weight.shape[0]
""",
    "penalty": """
self.c@ = CONV
---
x = self.c@(x) + self.c@.weight.square().mean()
""",
    "norm of its data": """
self.c@ = CONV
---
x = self.c@(x) / self.c@.weight.data.norm()
""",
    "bias": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
---
x = self.c@(x) - self.c@.bias.view(1, -1, 1, 1)
""",
    "parameters counted": """
self.c@ = CONV
---
x = self.c@(x) / sum(p.numel() for p in self.c@.parameters())
""",
    "size of a parameter": """
self.c@ = CONV
---
x = self.c@(x) / self.c@.weight.size(0) / len(self.c@.weight)
""",
    "tied weights": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
self.d@ = nn.Conv2d(4, 4, 3, padding=1)
self.d@.weight = self.c@.weight
---
x = self.d@(self.c@(x).tanh())
""",
    "tied biases": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
self.d@ = nn.Conv2d(4, 4, 1)
self.d@.bias = self.c@.bias
---
x = self.d@(self.c@(x).tanh())
""",
    "weight of a linear": """
self.c@ = nn.Conv2d(4, 4, 1)
self.l@ = nn.Linear(4, 4)
self.l@.bias = self.c@.bias
---
x = self.c@(x) + self.l@(x.mean((2, 3)))[:, :, None, None]
""",
    "hook on the weight": """
self.c@ = CONV
self.c@.weight.register_hook(torch.Tensor.neg)
---
x = self.c@(x).tanh()
""",
    "frozen": """
self.c@ = CONV
self.c@.requires_grad_(False)
---
x = self.c@(x).tanh()
""",
    "pruned by torch": """
self.c@ = CONV
prune.l1_unstructured(self.c@, "weight", 0.5)
---
x = self.c@(x)
""",
    "pruned by hand": """
self.c@ = nn.Conv2d(4, 8, 3, padding=1)
self.c@.weight = nn.Parameter(self.c@.weight[:4].detach().clone())
self.c@.bias = nn.Parameter(self.c@.bias[:4].detach().clone())
---
x = self.c@(x)
""",
    "weight_norm": """
self.c@ = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
---
x = self.c@(x)
""",
}
