"""`dyconvert report` and `inspect`: what they write and print, and the page in a browser."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import Ran
from nets import listed
from PIL import Image

import dyconvert
from dyconvert import models
from dyconvert.analysis.study import Analysis

pytestmark = pytest.mark.usefixtures("no_downloads")

QUICK = ["--sizes", "8,16", "--seconds", "0.02"]


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with predictors as training leaves them: coefficients that vary."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_predictor." in name:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def saved(cli, tmp_path) -> str:
    """The digits model, converted and moved, in the folder that `cli` runs in."""
    model, source = models.create("digits-resnet8")
    dyconvert.save(moved(dyconvert.convert(model, g=3)), tmp_path / "dynamic", source=source)
    return "dynamic"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str]:
    """A report over 100 digits, which takes seconds to make, and what the command said. Not to be changed."""
    from dyconvert.cli import main

    folder = tmp_path_factory.mktemp("made")
    model, source = models.create("digits-resnet8")
    dyconvert.save(moved(dyconvert.convert(model, g=3)), folder / "dynamic", source=source)
    said = io.StringIO()
    arguments = ["report", "dynamic", "--data", "digits", "--limit", "100", "-o", "out", *QUICK]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["dyconvert", *arguments])
        with pytest.raises(SystemExit, match="0"):
            main()
    return folder / "out", said.getvalue()


def report_of(ran: Ran, folder: Path) -> Analysis:
    assert ran.code == 0, ran.said
    return Analysis.model_validate_json((folder / "report.json").read_text())


# ---- What is written ----


def test_a_report(made):
    folder, said = made
    result = Analysis.model_validate_json((folder / "report.json").read_text())
    assert listed(folder) == ["figures", "numbers", "report.html", "report.json"]
    assert (result.images, result.images_in_data, result.classes) == (100, 360, [*"0123456789"])
    assert "images: 100 of 360, evenly spread" in result.sampled
    # The original is had from where the saved model came from.
    assert result.original == "digits-resnet8"
    assert result.accuracy.original.percent > 95
    assert sum(each.model.images for each in result.accuracy.classes) == 100
    assert [each.size for each in result.resolution.sizes] == [8, 16]
    assert result.left_out.keys() == {"ablation", "static narrow"}
    names = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert names == {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"coefficients", "variation", "usage", "classes", "correlation", "experts", "latency", "cost_macs"} <= names
    with open(folder / "numbers" / "coefficients.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    convs = result.coefficients.convs
    assert [(r["name"], r["expert"]) for r in rows] == [(c.name, str(i)) for c in convs for i in (1, 2, 3)]
    assert float(rows[4]["mean"]) == convs[1].experts[1].mean
    page = (folder / "report.html").read_text()
    assert all(conv.name in page for conv in result.plan.convs)
    assert "the stem, which reads the image" in page
    assert page.count("<figure") == page.count("<svg") == len(names)
    # Images that drive an expert: six for each of three experts of three convs.
    assert page.count('<img src="data:image/png;base64,') == 6 * 3 * 3
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "out/report.html" in said


def test_a_report_replaces_a_report_only_with_force(made, cli, saved, tmp_path):
    shutil.copytree(made[0], tmp_path / "out")
    before = (tmp_path / "out" / "report.json").read_text()
    arguments = ["report", saved, "-o", "out", "--sizes", "none", "--seconds", 0]
    ran = cli(*arguments)
    assert ran.code == 2
    assert "--force" in ran.said
    assert (tmp_path / "out" / "report.json").read_text() == before
    result = report_of(cli(*arguments, "--force"), tmp_path / "out")
    assert result.images == 0
    # What the old one had, and the new one hasn't, is gone.
    assert not (tmp_path / "out" / "figures" / "coefficients.svg").exists()
    assert listed(tmp_path) == ["dynamic", "out"]


def test_without_images_half_of_it_is_there(cli, saved, tmp_path):
    ran = cli("report", saved, *QUICK)
    result = report_of(ran, tmp_path / "report")
    assert "no images were given" in result.left_out["coefficients"]
    assert "left out: coefficients: no images were given" in ran.said
    assert result.experts
    assert result.cost.before.parameters < result.cost.after.parameters


def test_a_static_model(cli, tmp_path):
    ran = cli("report", "digits-resnet8", "--data", "digits", *QUICK)
    result = report_of(ran, tmp_path / "report")
    assert not result.dynamic
    assert result.accuracy.model.percent > 95
    assert "no dynamic conv" in ran.said
    assert result.resolution.sizes[0].seconds.keys() == {"original"}


def test_against_narrow_layer_and_sweep(cli, saved, models_file, tmp_path):
    from test_analysis import SWEEP

    (tmp_path / "dynamic" / "sweep.csv").write_text(SWEEP)
    (tmp_path / "dynamic" / "metrics.csv").write_text("epoch,step,val_acc\n0,1,50.0\n1,3,60.0\n")
    (tmp_path / "dynamic" / "summary.json").write_text('{"finetuned": 60.0, "recipe": "mine"}')
    (tmp_path / "slim.py").write_text(
        "from dyconvert.builtin import DigitsResNet8\n\ndef slim():\n    model = DigitsResNet8()\n    return model\n"
    )
    options = ["--against", "digits-resnet8", "--narrow", "slim.py:slim", "--layer", "layer1.conv2", "--layer", "conv1"]
    ran = cli("report", saved, "--data", "digits", "--limit", 50, *options, *QUICK)
    result = report_of(ran, tmp_path / "report")
    assert [each.layer for each in result.correlations] == ["layer1.conv2", "conv1"]
    assert result.resolution.sizes[0].seconds.keys() == {"original", "dynamic", "narrow", "predicting", "mixing"}
    assert not result.left_out
    page = (tmp_path / "report" / "report.html").read_text()
    for said in ("dynet g=6", "90.50", "static, l1", "slim", "run_validation", "ablation_width"):
        assert said in page, said


def test_inspect(dyconvert_process, saved, cli):
    ran = dyconvert_process("inspect", "dynamic", "--data", "digits", "--limit", 60)
    assert ran.code == 0, ran.stderr
    for said in (
        "builtin:digits-resnet8",
        "method dynet, g = 3",
        "9 convs: 8 converted, 1 skipped",
        "layer1.conv1",
        "8 of 8 convs have a predictor that was trained",
    ):
        assert said in ran.said, said
    assert max(map(len, ran.stdout.splitlines())) <= 80
    found = json.loads(cli("inspect", "dynamic", "--json").stdout)
    assert [conv["predictor"] for conv in found["convs"]] == ["trained"] * 8
    assert found["cost"]["before"]["parameters"] < found["cost"]["after"]["parameters"]


def test_a_static_model_that_was_saved(cli, tmp_path):
    model, source = models.create("digits-resnet8")
    dyconvert.save(model, tmp_path / "control", source=source, static=True)
    assert "static: none of 9 convs is dynamic" in cli("inspect", "control").said
    result = report_of(cli("report", "control", *QUICK), tmp_path / "report")
    assert not result.dynamic
    assert result.resolution.sizes[0].seconds.keys() == {"original", "static"}


def test_images_are_not_made_larger(cli, models_file, tmp_path):
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "pictures" / "cat" / "0.png")
    # Converted without a size, so at one that was guessed.
    assert cli(f"{models_file}:net", "-o", "out").code == 0
    ran = cli("report", "out", "--trust-code", "--data", "pictures", *QUICK)
    assert report_of(ran, tmp_path / "report").shape == [3, 16, 16]


@pytest.mark.parametrize("command", ["report", "inspect"])
def test_help(command, cli):
    ran = cli(command, "--help")
    assert ran.code == 0
    assert "--data" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80


def test_inspect_tells_an_untrained_conversion(cli):
    cli("digits-resnet8", "--g", 2, "-o", "fresh")
    said = cli("inspect", "fresh").said
    assert "0 of 8 convs have a predictor that was trained" in said


# ---- Bad input ----


BAD = [
    (["report", "dynamic", "--data", "empty"], ["empty holds no images"]),
    (["report", "dynamic", "--data", "nowhere"], ["nowhere is no folder"]),
    (["report", "dynamic", "--data", "broken"], ["x.png can't be read as an image"]),
    (["report", "dynamic", "--data", "digits", "--input-size", "3,8,8"], ["rejects the example input"]),
    (["report", "colour.py:net", "--data", "digits", "--input-size", "8"], ["rejects the images"]),
    (["report", "dynamic", "--data", "pictures", "--mean", "0,0"], ["--mean and --std need a number for each"]),
    (["report", "dynamic", "--data", "digits", "--layer", "layer9"], ["'layer9' is no layer", "layer1"]),
    (["report", "dynamic", "--sizes", "big"], ["--sizes 'big'", "96,224,448"]),
    (["report", "dynamic", "--sweep", "none.csv"], ["none.csv can't be read", "--sweep"]),
    (["report", "dynamic", "--output", "broken"], ["broken holds other files", "--output"]),
    (["report", "dynamic", "--output", "colour.py"], ["is a file", "--output"]),
    (["report", "nan", "--data", "digits"], ["nan holds NaN", "layer1.conv1.weight", "before the training diverged"]),
    (["report", "empty"], ["empty has no dyconvert.json"]),
    (["report", "dynamic", "--against", "resnet5o"], ["There is no model 'resnet5o'"]),
    (["report", "mine.py:mlp"], ["no convs"]),
    (["inspect", "nan"], ["nan holds NaN", "layer1.conv1.weight"]),
    (["inspect", "empty"], ["empty has no dyconvert.json"]),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_input(arguments, says, cli, saved, models_file, tmp_path):
    for folder in ("empty", "broken", "pictures"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no picture")
    Image.new("L", (8, 8)).save(tmp_path / "pictures" / "x.png")
    (tmp_path / "colour.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))\n"
    )
    model = dyconvert.load("dynamic")
    with torch.no_grad():
        model.layer1.conv1.weight[0, 0, 0, 0] = float("nan")
    dyconvert.save(model, "nan")
    before = sorted(tmp_path.rglob("*"))
    ran = cli(*arguments, *(QUICK if arguments[0] == "report" and "--sizes" not in arguments else []))
    assert ran.code == 2, ran.said
    assert "Traceback" not in ran.stderr
    assert all(word in ran.said for word in says), ran.said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_extra_is_named_before_the_work_is_done(cli, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    ran = cli("report", saved)
    assert ran.code == 2
    assert re.search(r"pip install \S*\[report\]", ran.said)


def test_an_interrupt_leaves_nothing(cli, saved, monkeypatch, tmp_path):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dyconvert.report.page.render", interrupted)
    assert cli("report", saved, "--sizes", "none", "--seconds", 0).code == 130
    assert listed(tmp_path) == ["dynamic"]


# ---- In a browser ----


def chromium() -> str:
    """A Chromium to drive: DYCONVERT_CHROMIUM names it, or it is on the PATH."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = os.environ.get("DYCONVERT_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("no Chromium: install one, or name it in DYCONVERT_CHROMIUM")
    return found


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # Without its sandbox, for in a container the tests run as root; the page is our own.
        launched = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield launched
        launched.close()


def test_the_page_in_a_browser(browser, made, tmp_path):
    # Alone in a folder: it needs none of the files that stand beside it.
    page_file = tmp_path / "alone" / "report.html"
    page_file.parent.mkdir()
    shutil.copy(made[0] / "report.html", page_file)
    said, asked = [], []
    backgrounds = {}
    for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        backgrounds[width, scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert ink != backgrounds[width, scheme]
        # Nothing reaches beyond the screen, and every picture is there and of a size.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.evaluate(
            "[...document.querySelectorAll('figure svg')].map(s => [s.clientWidth, s.clientHeight,"
            " s.getAttribute('aria-label')])"
        )
        assert len(sizes) >= 12
        assert all(w > 200 and h > 100 and label for w, h, label in sizes), sizes
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.evaluate("document.images.length") > 10
        # No letter is smaller than 9 pixels on the screen, in a picture or out of it.
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => {"
            " const scale = t.ownerSVGElement.getScreenCTM().a;"
            " return parseFloat(getComputedStyle(t).fontSize) * scale}))"
        )
        assert smallest >= 9, (width, smallest)
        page.close()
    assert backgrounds[1280, "light"] != backgrounds[1280, "dark"]
    assert not said
    assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}


def test_the_page_prints(browser, made):
    page = browser.new_page(color_scheme="dark")
    page.goto((made[0] / "report.html").as_uri())
    page.emulate_media(media="print")
    # On white, whatever the screen's scheme.
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") != "rgb(230, 233, 239)"
    assert page.pdf()[:5] == b"%PDF-"
