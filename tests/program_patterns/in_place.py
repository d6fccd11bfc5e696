"""Writing in place."""

IN_PLACE = {
    "alias": """
self.c@ = CONV
self.d@ = CONV
---
y = self.c@(x)
first = y
y += self.d@(x)
x = torch.cat([first, y], 1)[:, ::2]
""",
    "relu_": """
self.c@ = CONV
---
x = self.c@(x)
x.relu_()
""",
    "written to its input": """
self.c@ = CONV
---
x = x * 1.0
first = x
x += x.detach().tanh()
x = self.c@(x) + first
""",
    "assigned channels": """
self.c@ = CONV
---
y = x * 1.0
y[:, :2] = self.c@(x)[:, 2:]
x = y
""",
    "filled": """
self.c@ = CONV
---
y = torch.zeros_like(x)
y[:, :, 1:-1, 1:-1] = self.c@(x)[:, :, 1:-1, 1:-1]
x = x + y
""",
    "list changed": """
self.c@ = CONV
self.d@ = CONV
---
maps = [conv(x) for conv in (self.c@, self.d@)]
maps[0] += 1
maps.append(maps.pop(0))
x = maps[0] - maps[1]
""",
}
