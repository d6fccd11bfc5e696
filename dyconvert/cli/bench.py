"""dyconvert bench layers, dyconvert bench model"""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dyconvert.cli import completing
from dyconvert.cli.common import parse_device, with_common
from dyconvert.cli.options import METHOD, Compress, Json, check_compress, whole_numbers
from dyconvert.cli.progress import progress
from dyconvert.console import out, write_json
from dyconvert.errors import ModelError
from dyconvert.limits import BATCH, INPUT_SIDE, PROCESSES, REPEATS

if TYPE_CHECKING:
    import torch

    from dyconvert.analysis.bench_layer import Layer
    from dyconvert.analysis.timing import Timing

app = typer.Typer(help="Time dynamic convs and whole models against what they replace.", no_args_is_help=True)

Batches = Annotated[str, typer.Option("--batch", help="Batch sizes, such as 1,8,32.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default torch's own number.")]
Training = Annotated[bool, typer.Option("--train/--inference", help="Time a forward and a backward, or a forward.")]
Repeats = Annotated[int, typer.Option(min=1, max=REPEATS, help="Rounds of all that is compared.")]
Cpu = Annotated[
    bool, typer.Option("--cpu-time", help="Count CPU time: on a busy machine, with --threads 1, the fairer clock.")
]


def layers(
    batch: Batches = "1,8,32",
    method: Annotated[str, typer.Option("--method", "-m", help=METHOD, autocompletion=completing.methods)] = "condconv",
    g: Annotated[int, typer.Option("--g", help="Experts, the same for all.")] = 6,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of the list: channels in and out, kernel, size, as 64,128,3,56; stride, groups. Repeatable."
        ),
    ] = None,
    threads: Threads = None,
    train: Training = False,
    features: Annotated[bool, typer.Option(help="Time mixing feature maps too, which takes the longest.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in a process for each figure.")] = False,
    repeats: Repeats = 15,
    cpu_time: Cpu = False,
    as_json: Json = False,
    device: str | None = None,
) -> None:
    """Single convs: time over the static conv's, beside timm's CondConv2d and mixing feature maps."""
    sizes = _batches(batch)

    from dyconvert.analysis import bench_layer, timing

    shapes = [_layer(text) for text in layer] if layer else list(bench_layer.LAYERS)
    place = _place(device, cpu_time)
    if memory and place.type != "cpu":
        raise ModelError("--memory measures the memory of processes on a CPU. Leave --device out, or --memory.")
    _set_threads(threads)
    cases = [(size, shape) for size in sizes for shape in shapes]
    results = []
    with progress("measuring the memory's speed") as tell:
        read = timing.bandwidth(cpu_time, place)
        for done, (size, shape) in enumerate(cases):
            tell(f"batch {size}: {shape.label}", done, len(cases))
            results.append(
                bench_layer.bench_layer(
                    shape,
                    size,
                    method,
                    g,
                    training=train,
                    repeats=repeats,
                    cpu=cpu_time,
                    read=read,
                    features=features,
                    memory=memory,
                    device=place,
                )
            )
    if as_json:
        _print_json(results, train, read, cpu_time, place)
        return
    columns = ["layer", "batch", "static ms", method, "+-", "timm", "features", "limit"]
    table = _table(*columns)
    for r in results:
        base = r.static.median
        cells = [r.layer, str(r.batch), f"{base * 1e3:.2f}", *_ratio(r.dynamic, base)]
        cells += [_ratio(other, base)[0] for other in (r.timm, r.features)] + [f"{r.limit / base:.2f}"]
        table.add_row(*cells)
    out.print(table)
    out.print(f"Times over the static conv's; {_conditions(train, read, cpu_time, place)}")
    for kernel in sorted({r.kernel for r in results if r.kernel}):
        layers = dict.fromkeys(r.layer for r in results if r.kernel == kernel)
        out.print(f"{kernel}: {'; '.join(layers)}")
    if memory:
        peaks = _table("peak memory, MB", "batch", method, "timm", "features")
        for r in results:
            megabytes = [f"{r.memory[n] / 1e6:.0f}" if n in r.memory else "-" for n in ("dynamic", "timm", "features")]
            peaks.add_row(r.layer, str(r.batch), *megabytes)
        out.print(peaks)
    for name in ("timm", "features"):
        against = [getattr(r, name).median / r.dynamic.median for r in results if getattr(r, name) is not None]
        if against:
            mean = timing.geometric_mean(against)
            out.print(f"{name} / {method}: {mean:.2f} in the geometric mean, {min(against):.2f} at least")
        elif name == "timm":
            out.print("timm: left out; it isn't installed, or has no conv like this method's")


def model(
    model: Annotated[str, typer.Argument(help="As `dyconvert convert` takes it.", autocompletion=completing.models)],
    batch: Batches = "1,32",
    method: Annotated[str, typer.Option("--method", "-m", help=METHOD, autocompletion=completing.methods)] = "dynet",
    g: Annotated[int | None, typer.Option("--g", help="Experts; by default the method's own number.")] = None,
    input_size: Annotated[
        int | None, typer.Option("--input-size", min=1, max=INPUT_SIDE, help="Height and width of the images.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="What one predictor serves: block or layer.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Convert only convs whose names match. Repeatable.")] = None,
    against: Annotated[str | None, typer.Option(help="Compare with this model too, timm:NAME say.")] = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Fold batch norms into the convs first, the original's as well.")
    ] = False,
    bank_dtype: Annotated[
        str | None, typer.Option(help="float16 or bfloat16: keep the experts in half precision. Fuses as well.")
    ] = None,
    compress: Compress = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile all that is compared: about a minute each.")
    ] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Weights and images in that format.")] = False,
    threads: Threads = None,
    train: Training = False,
    repeats: Repeats = 15,
    cpu_time: Cpu = False,
    as_json: Json = False,
    device: str | None = None,
) -> None:
    """A converted model: time over the original's. Weights are random, which changes no time."""
    from dyconvert import models

    sizes = _batches(batch)
    models.check(model)
    check_compress(compress)
    if (fuse or bank_dtype or compress) and train:
        raise ModelError(
            "--train with --fuse, --bank-dtype or --compress: such a model isn't trained. Leave one of them out."
        )
    if bank_dtype and compress:
        raise ModelError("--bank-dtype with --compress: the experts are kept in one way. Leave one of them out.")

    from dyconvert.analysis import bench_model, timing
    from dyconvert.cli.opening import example_of
    from dyconvert.surgery.compress import compress as compress_model
    from dyconvert.surgery.convert import convert
    from dyconvert.surgery.example import example_for
    from dyconvert.surgery.fuse import fuse as fuse_model
    from dyconvert.torch_internals.compiling import compile_error

    half = _half(bank_dtype)
    fuse = fuse or half is not None
    place = _place(device, cpu_time)
    _set_threads(threads)
    static, source = models.create(model, "none", {})
    static.to(place)
    dynamic = convert(static, method=method, g=g, scope=scope, include=include or ())
    size = (input_size, input_size) if input_size else source.input_size
    examples = [example_of(static, source, size, sizes[0])]
    examples += [example_for(static, batch=count, size=size) for count in sizes[1:]]
    if fuse:
        dynamic = fuse_model(dynamic.eval(), examples[0], bank_dtype=half)
        static = fuse_model(static.eval(), examples[0])
    if compress is not None:
        dynamic = compress_model(dynamic.eval(), compress, check=False)  # of random weights it says nothing
    other = models.create(against, "none", {})[0].to(place) if against else None
    networks = [network for network in (static, dynamic, other) if network is not None]
    examples = bench_model.prepare(networks, examples, channels_last=channels_last, compiled=compiled)
    read = timing.bandwidth(cpu_time, place)
    try:
        results = [
            bench_model.bench_model(
                static,
                dynamic,
                example,
                other=other,
                training=train,
                repeats=repeats,
                cpu=cpu_time,
                read=read,
            )
            for example in examples
        ]
    except compile_error() as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ModelError(
            f"torch.compile failed: {reason}\nOn a CPU it needs a C++ compiler, g++ or clang++. Leave out --compile."
        ) from None
    if as_json:
        _print_json(results, train, read, cpu_time, place)
        return
    table = _table("batch", "static ms", method, "+-", "limit", *([against] if against else []))
    for r in results:
        base = r.static.median
        cells = [str(r.batch), f"{base * 1e3:.1f}", *_ratio(r.dynamic, base), f"{r.limit / base:.2f}"]
        table.add_row(*cells, *([f"{r.other.median / base:.2f}"] if r.other else []))
    out.print(table)
    out.print(f"Times over the static model's; {_conditions(train, read, cpu_time, place)}")


app.command()(with_common(layers, device=True))
app.command()(with_common(model, device=True))


def _place(device: str | None, cpu_time: bool) -> "torch.device":
    place = parse_device(device)
    if cpu_time and place.type != "cpu":
        raise ModelError(f"--cpu-time with --device {device}: what a GPU takes is no CPU time. Leave one of them out.")
    return place


def _batches(text: str) -> list[int]:
    sizes = whole_numbers(text)
    if not sizes or min(sizes) < 1 or max(sizes) > BATCH:
        raise ModelError(f"--batch {text!r} is no list of batch sizes. Write 1,8,32; {BATCH:,} are the most.")
    return sizes


def _half(name: str | None) -> "torch.dtype | None":
    if name not in (None, "float16", "bfloat16"):
        raise ModelError(f"--bank-dtype {name!r} is no half precision. Write float16 or bfloat16.")
    import torch

    return getattr(torch, name) if name else None


def _layer(text: str) -> "Layer":
    from dyconvert.analysis.bench_layer import Layer

    numbers = whole_numbers(text)
    if not 4 <= len(numbers) <= 6 or min(numbers) < 1:
        raise ModelError(f"--layer {text!r} is no conv. Write C_IN,C_OUT,KERNEL,SIZE, as 64,128,3,56.")
    layer = Layer(*numbers)
    if layer.c_in % layer.groups or layer.c_out % layer.groups:
        raise ModelError(f"--layer {text!r}: {layer.groups} groups don't divide its channels.")
    return layer


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if not 1 <= threads <= PROCESSES:
            raise ModelError(f"--threads {threads}: there must be at least one, and at most {PROCESSES:,}.")
        import torch

        torch.set_num_threads(threads)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _ratio(timing: "Timing | None", base: float) -> tuple[str, str]:
    if timing is None:
        return "-", "-"
    return f"{timing.median / base:.2f}", f"{(timing.high - timing.low) / 2 / base:.2f}"


def _conditions(train: bool, read: float, cpu: bool, place: "torch.device") -> str:
    import torch

    from dyconvert.analysis.machine import computer

    mode = "a forward and a backward" if train else "inference"
    threads = f", {torch.get_num_threads()} threads" if place.type == "cpu" else ""
    return (
        f"{mode}{threads}, {'CPU' if cpu else 'wall'} time, medians in turns.\n"
        f"+-: half the distance of the quartiles. limit: static, and the bank at {read / 1e9:.1f} GB/s.\n"
        f"On {computer(place)}."
    )


def _print_json(results: list[Any], train: bool, read: float, cpu: bool, place: "torch.device") -> None:
    import torch

    from dyconvert.analysis.machine import computer, processor
    from dyconvert.nn import native_library

    def plain(value: Any) -> Any:
        return {k: plain(v) for k, v in value._asdict().items()} if hasattr(value, "_asdict") else value

    figures = {
        "processor": processor(),
        "device": str(place),
        "computer": computer(place),
        "kernels": native_library.target(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "training": train,
        "clock": "cpu" if cpu else "wall",
        "bandwidth": read,
        "results": [plain(result) for result in results],
    }
    write_json(figures)
