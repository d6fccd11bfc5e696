"""How a block's class is written, and how it is called.

`BODY` is what the pieces' forwards make, `INIT` their __init__; CALL is how the net calls the block on its x.
"""

STYLES: dict[str, str] = {
    "module": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "no_grad decorator": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    @torch.no_grad()
    def forward(self, x):
        BODY
        return x
CALL x = x + block(x)
""",
    "decorator": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    @logged
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "instance forward": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
        self.forward = self.fast
    def fast(self, x):
        BODY
        return x * 0.5
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "argument that is None": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x, skip):
        BODY
        return x if skip is None else x + skip
CALL x = block(x, None)
""",
    "optional argument": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x, scale=1.0, mask=None):
        BODY
        x = x * scale
        return x if mask is None else x * mask
CALL x = block(x, mask=torch.ones_like(x[:1]) * 2) if self.training else block(x, scale=0.5)
""",
    "called by keyword": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, *, x):
        BODY
        return x
CALL x = block(x=x)
""",
    "any arguments": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, *args, **kwargs):
        x = args[0] + kwargs.get("more", 0)
        BODY
        return x
CALL x = block(x, more=1.0)
""",
    "list of maps": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, maps):
        x = maps[0] + maps[-1].tanh()
        BODY
        return [maps[0], x]
CALL x = block([x, x.sin()])[1]
""",
    "dict of maps": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, maps):
        x = maps["low"]
        BODY
        return {**maps, "out": x}
CALL x = block({"low": x, "high": x.sin()})["out"]
""",
    "two maps": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, a, b):
        x = a
        BODY
        y, x = x, b
        BODY2
        return x + y
CALL x = block(x, x.sin())
""",
    "sequence": """
class BLOCK(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Identity(), nn.Conv2d(4, 4, 1))
        INIT
    def forward(self, x):
        BODY
        return self[1](x) * len(self) + self[0](x)
CALL x = block(x)
""",
    "children counted": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x / len(list(self.children())) + 0.1 * len(list(self.modules()))
CALL x = block(x)
""",
    "children called": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x):
        for child in self.children():
            x = child(x).tanh()
        return x
CALL x = block(x)
""",
    "modes that return nothing": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def train(self, mode=True):
        super().train(mode)
    def eval(self):
        self.train(False)
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "class registry": """
class REGISTRY(nn.Module):
    names = set()
    def __init_subclass__(cls, **options):
        if cls.__name__ in REGISTRY.names:
            raise KeyError(f"{cls.__name__} is registered already")
        REGISTRY.names.add(cls.__name__)
        super().__init_subclass__(**options)
class BLOCK(REGISTRY):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "attribute called coefficient_predictor": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        self.coefficient_predictor = nn.Conv2d(4, 4, 1)
        INIT
    def forward(self, x):
        BODY
        return x + self.coefficient_predictor(x)
CALL x = block(x)
""",
    "pre-hook": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
        self.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "hook": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
        self.register_forward_hook(lambda module, args, output: output * 2 + args[0])
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "input written to": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        x *= 0.5
        BODY
        return x
CALL x = x * 1.0; y = block(x); x = x + y
""",
    "forward called directly": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block.forward(x)
""",
    "forward called in training only": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block.forward(x) if self.training else block(x)
""",
    "a method called": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def features(self, x):
        BODY
        return x
    def forward(self, x):
        return self.features(x) * 2
CALL x = block.features(x) + block(x)
""",
    "parts in training only": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        self.extra = nn.Conv2d(4, 4, 1)
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block(x) + (block.extra(x) if self.training else 0)
""",
    "called twice": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block(block(x).tanh())
""",
    "checkpointed": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = checkpoint(block, x, use_reentrant=False)
""",
    "generator": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        yield x
        yield x.sin()
CALL x = sum(block(x))
""",
    "call of its own": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def __call__(self, x):
        return super().__call__(x) * 2
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "folded by its caller": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block(torch.cat([x, x.tanh()]))[: x.shape[0]]
""",
}
