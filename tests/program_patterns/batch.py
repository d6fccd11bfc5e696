"""Batches that are folded, split, cut or empty."""

BATCH = {
    "groups folded": """
self.c@ = nn.Conv2d(2, 2, 3, padding=1)
---
n, c, h, w = x.size()
x = self.c@(x.reshape(n * 2, -1, h, w)).reshape(n, c, h, w)
""",
    "windows": """
self.c@ = CONV
---
n = x.shape[0]
y = x.reshape(n, 4, 2, 3, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 3, 3)
x = self.c@(y).reshape(n, 2, 2, 4, 3, 3).permute(0, 3, 1, 4, 2, 5).reshape(n, 4, 6, 6)
""",
    "time folded": """
self.c@ = CONV
---
n = x.shape[0]
y = x.unflatten(3, (2, 3)).permute(0, 3, 1, 2, 4).flatten(0, 1)
x = self.c@(y).unflatten(0, (n, 2)).permute(0, 2, 3, 1, 4).flatten(3)
""",
    "channels folded": """
self.c@ = nn.Conv2d(1, 1, 3, padding=1)
---
x = self.c@(x.flatten(0, 1).unsqueeze(1)).squeeze(1).view_as(x)
""",
    "pairs": """
self.c@ = CONV
---
y = self.c@(torch.cat([x, x.tanh()]))
x = y[: x.shape[0]] * y[x.shape[0] :]
""",
    "repeated": """
self.c@ = CONV
---
x = self.c@(x.repeat_interleave(2, 0))[::2]
""",
    "halves": """
self.c@ = CONV
self.d@ = CONV
---
half = x.shape[0] // 2
x = torch.cat([self.c@(x[:half]), self.d@(x[half:])])
""",
    "chunk": """
self.c@ = CONV
---
x = torch.cat([self.c@(each) for each in x.chunk(2)])
""",
    "reversed": """
self.c@ = CONV
---
x = self.c@(x.flip(0)).flip(0)
""",
    "rolled": """
self.c@ = CONV
---
x = self.c@(x.roll(1, 0)).roll(-1, 0)
""",
    "mixed": """
self.c@ = CONV
---
x = x + self.c@(x.flip(0))
""",
    "shuffled": """
self.c@ = CONV
---
order = torch.randperm(x.shape[0])
x = self.c@(x[order])[order.argsort()]
""",
    "shuffled in training": """
self.c@ = CONV
---
order = torch.randperm(x.shape[0]) if self.training else torch.arange(x.shape[0])
x = self.c@(x[order])[order.argsort()]
""",
    "sorted": """
self.c@ = CONV
---
order = x.mean((1, 2, 3)).argsort()
x = self.c@(x[order])[order.argsort()]
""",
    "chosen": """
self.c@ = CONV
---
chosen = x.mean((1, 2, 3)) > 0
y = x * 1.0
y[chosen] = self.c@(x[chosen])
x = y
""",
    "chosen by numbers": """
self.c@ = CONV
---
rows = torch.where(x.mean((1, 2, 3)) > -0.2)[0]
x = x.index_copy(0, rows, self.c@(x[rows]))
""",
    "reversed for some values": """
self.c@ = CONV
---
x = self.c@(x.flip(0)).flip(0) if x.abs().max() > 3 else self.c@(x)
""",
    "reversed for some values, by numpy": """
self.c@ = CONV
---
x = self.c@(x.flip(0)).flip(0) if x.detach().numpy().max() > 3 else self.c@(x)
""",
    "two reversed": """
self.c@ = CONV
---
x = self.c@(x.flip(0)).flip(0) if x.shape[0] == 2 else self.c@(x)
""",
    "first alone": """
self.c@ = CONV
---
x = torch.cat([self.c@(x[:1]), x[1:]])
""",
    "first for all": """
self.c@ = CONV
---
x = x + self.c@(x[:1].expand_as(x))
""",
    "mean image": """
self.c@ = CONV
---
x = x + self.c@(x.mean(0, keepdim=True))
""",
    "one by one": """
self.c@ = CONV
---
x = torch.cat([self.c@(x[i : i + 1]) for i in range(x.shape[0])])
""",
    "without a batch": """
self.c@ = CONV
---
x = torch.stack([self.c@(each) for each in x])
""",
    "empty batch": """
self.c@ = CONV
---
x = x + self.c@(x[:0]).sum()
""",
}
