"""Saved models on the Hugging Face Hub, played by a small local server: the same rules as for local files."""

import json
import os
import pickle

import pytest
import torch
from hub_server import Hub, serving
from nets import ResidualNet, image, listed, same, seeded, trained

import dyconvert
from dyconvert import CheckpointError, models
from dyconvert.checkpoint.card import is_own

constants = pytest.importorskip("huggingface_hub.constants")
REPO, ADDRESS = "user/name", "hf://user/name"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as made:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        # The library reads the variables when it is imported.
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        yield made


@pytest.fixture
def digits():
    static, source = models.create("builtin:digits-resnet8", "none", {"width": 2})
    return dyconvert.convert(static, g=2, example=torch.zeros(1, 1, 8, 8)), source


def newest(hub: Hub) -> dict[str, bytes]:
    return hub.repos[REPO][-1][1]


def test_there_and_back(hub, digits, tmp_path):
    model, source = digits
    dyconvert.save(model, tmp_path / "saved", source=source, push_to=REPO)
    assert sorted(newest(hub)) == ["README.md", "dyconvert.json", "model.safetensors"]
    loaded = dyconvert.load(ADDRESS)
    assert same(loaded, model)
    # Large files don't go through the commit itself.
    assert hub.uploaded
    card = newest(hub)["README.md"].decode()
    assert f'dyconvert.load("{ADDRESS}")' in card
    assert is_own(card)


def test_a_revision_is_pinned(hub, digits, tmp_path):
    model, source = digits
    dyconvert.save(model, tmp_path / "saved", source=source)
    first = dyconvert.push(tmp_path / "saved", REPO)
    other = dyconvert.convert(models.create("builtin:digits-resnet8", "none", {"width": 2})[0], g=3)
    dyconvert.save(other, tmp_path / "other", source=source, push_to=REPO)
    assert first == f"{ADDRESS}@{hub.repos[REPO][0][0]}"
    assert same(dyconvert.load(first), model)
    assert same(dyconvert.load(ADDRESS), other)
    hub.tags[REPO] = {"v1": hub.repos[REPO][0][0]}
    assert same(dyconvert.load(f"{ADDRESS}@v1"), model)
    # A commit that was fetched is asked for no more.
    hub.asked.clear()
    assert same(dyconvert.load(first), model)
    assert hub.asked == []
    with pytest.raises(CheckpointError, match="no revision v2"):
        dyconvert.load(f"{ADDRESS}@v2")


@pytest.mark.parametrize("how", ["offline", "no connection"])
def test_without_the_network(how, hub, digits, tmp_path, monkeypatch):
    model, source = digits
    dyconvert.save(model, tmp_path / "saved", source=source, push_to=REPO)
    dyconvert.load(ADDRESS)
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert same(dyconvert.load(ADDRESS), model)
    with pytest.raises(CheckpointError, match=r"user/other on the Hub can't be read: .*fetched before"):
        dyconvert.load("hf://user/other")


def test_only_the_two_files_are_fetched(hub, digits, tmp_path):
    model, source = digits
    dyconvert.save(model, tmp_path / "saved", source=source, push_to=REPO)
    hub.commit(REPO, {"pytorch_model.bin": b"x", "model.py": b"raise SystemExit", "config.json": b"{}"})
    hub.asked.clear()
    dyconvert.load(ADDRESS)
    names = {each.rpartition("/")[2] for each in hub.asked if "/resolve/" in each}
    assert names == {"dyconvert.json", "model.safetensors"}


class Payload:
    def __reduce__(self):
        return os.mkdir, ("RAN",)


def forged(hub: Hub, **source: object) -> None:
    files = dict(newest(hub))
    content = json.loads(files["dyconvert.json"])
    content["source"] |= source
    hub.commit(REPO, {"dyconvert.json": json.dumps(content).encode()})


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"specifier": "os:mkdir", "arguments": {"path": "RAN"}}, "which is code that loading would run"),
        ({"specifier": "model.py:net"}, "which is code that loading would run"),
        ({"specifier": "timm:resnet10t", "arguments": {"checkpoint_path": "w.bin"}}, "checkpoint_path"),
        ({"arguments": {"width": 10**9}}, "width"),
        ({"specifier": "timm:coatnet_0_rw_224", "arguments": {"img_size": 4096}}, "makes a tensor of"),
        ({"specifier": "timm:hf-hub:user/name"}, ""),
    ],
    ids=["a function", "a file", "a pickle", "a size", "a table", "another repository"],
)
def test_nothing_of_a_stranger_runs(source, says, hub, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dyconvert.save(digits[0], tmp_path / "saved", source=digits[1], push_to=REPO)
    forged(hub, **source)
    hub.commit(REPO, {"w.bin": pickle.dumps(Payload()), "model.py": b"import os; os.mkdir('RAN')"})
    with pytest.raises(dyconvert.DyconvertError, match=says):
        dyconvert.load(ADDRESS)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("name", ["dyconvert.json", "model.safetensors"])
def test_what_is_too_large_is_not_fetched(name, hub, digits, tmp_path):
    dyconvert.save(digits[0], tmp_path / "saved", source=digits[1], push_to=REPO)
    hub.claims[name] = 2**40
    hub.asked.clear()
    with pytest.raises(CheckpointError, match=r"1,099,511,627,776 bytes, and at most"):
        dyconvert.load(ADDRESS)
    assert not [each for each in hub.asked if each.startswith("GET") and each.endswith(name)]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("hf://user/nothing", "There is no model user/nothing on the Hub"),
        ("hf://some/gated", "its owner admits"),
        ("hf://user/empty", "has no dyconvert.json"),
        ("hf://user", "no address of a model"),
        ("hf://", "no address of a model"),
        ("hf://a/b/c", "no address of a model"),
        ("hf://../../etc", "no address of a model"),
        ("hf://user/na me", "no address of a model"),
        ("hf://user/name@a@b", "no address of a model"),
        ("hf://user/name\x00", "no address of a model"),
    ],
)
def test_addresses(address, says, hub):
    hub.commit("user/empty", {"README.md": b"nothing"})
    with pytest.raises(CheckpointError, match=says):
        dyconvert.load(address)


@pytest.mark.parametrize("repo", ["name", "", "a/b/c", "../x", "user/na me", 5, None, "hf://user/name"])
def test_names_to_push_to(repo, hub, digits, tmp_path):
    dyconvert.save(digits[0], tmp_path / "saved", source=digits[1])
    with pytest.raises(CheckpointError, match="no name of a repository"):
        dyconvert.push(tmp_path / "saved", repo)
    if repo is not None:
        with pytest.raises(CheckpointError, match="no name of a repository"):
            dyconvert.save(digits[0], tmp_path / "new", source=digits[1], push_to=repo)
        assert "new" not in listed(tmp_path)
    assert hub.asked == []


def test_what_can_not_be_pushed(hub, tmp_path, digits, monkeypatch):
    with pytest.raises(CheckpointError, match="no model was saved"):
        dyconvert.push(tmp_path, REPO)
    dyconvert.save(digits[0], tmp_path / "saved", source=digits[1])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="can't be written to"):
        dyconvert.push(tmp_path / "saved", REPO)


def test_paths_of_this_machine_stay_here(hub, tmp_path):
    (tmp_path / "mine.py").write_text("from nets import ResidualNet as net\n")
    static, source = models.create(f"{tmp_path}/mine.py:net")
    dyconvert.save(dyconvert.convert(static, g=2, example=image()), tmp_path / "saved", source=source, push_to=REPO)
    for name in ("README.md", "dyconvert.json"):
        assert str(tmp_path).encode() not in newest(hub)[name]
        assert b"mine.py:net" in newest(hub)[name]


def test_a_card_that_was_edited_there_stays(hub, digits, tmp_path):
    model, source = digits
    dyconvert.save(model, tmp_path / "saved", source=source, push_to=REPO)
    hub.commit(REPO, {"README.md": b"# Mine\n"})
    dyconvert.push(tmp_path / "saved", REPO)
    assert newest(hub)["README.md"] == b"# Mine\n"
    (tmp_path / "saved" / "README.md").write_text("# Edited here\n")
    dyconvert.push(tmp_path / "saved", REPO)
    assert newest(hub)["README.md"] == b"# Edited here\n"


def test_a_model_that_needs_its_code(hub, tmp_path):
    net = seeded(ResidualNet)
    model = trained(net, g=2)
    dyconvert.save(model, tmp_path / "saved", push_to=REPO)
    assert same(dyconvert.load(ADDRESS, net), model)
    with pytest.raises(CheckpointError, match="model="):
        dyconvert.load(ADDRESS)


def test_the_command_line(hub, digits, tmp_path, cli):
    model, source = digits
    dyconvert.save(model, tmp_path / "saved", source=source, push_to=REPO)
    assert cli("inspect", ADDRESS).code == 0
    ran = cli("collapse", ADDRESS, "-o", "static.pth")
    assert ran.code == 0, ran.said
    assert cli("inspect", "hf://user/nothing").code == 2
    assert "There is no model user/nothing" in cli("predict", "hf://user/nothing", "x.png").said


def test_push_as_a_command(hub, digits, tmp_path, cli):
    model, source = digits
    dyconvert.save(model, tmp_path / "saved", source=source)
    said = cli("push", "saved", REPO).stdout
    assert said.split() == ["pushed", "to", f"{ADDRESS}@{hub.repos[REPO][-1][0]}"]
    assert same(dyconvert.load(ADDRESS), model)
    assert json.loads(cli("push", "saved", REPO, "--json").stdout)["address"].startswith(f"{ADDRESS}@")
    assert not cli("push", "saved", REPO, "-q").stdout
    for arguments, says in (
        (("nothing", REPO), "no model was saved"),
        (("saved", "name"), "Write user/name"),
        (("saved", ADDRESS), "Write user/name"),
        (("saved",), "USER/NAME"),
    ):
        ran = cli("push", *arguments)
        assert ran.code == 2
        assert says in ran.said, ran.said


@pytest.mark.parametrize("how", ["python", "command", "the hub is away"])
def test_a_run_is_pushed_at_its_end(how, hub, tmp_path, cli, monkeypatch):
    pytest.importorskip("lightning")
    (tmp_path / "r.yaml").write_text(
        "model: {specifier: digits-resnet8, weights: none, arguments: {width: 2}}\nconvert: {g: 2}\n"
        "data: {dataset: fake, size: 8, channels: 1, mean: [0], std: [1], images: 40, workers: 0, num_classes: 10}\n"
        "train: {batch: 8, epochs: 1, max_steps: 1, accelerator: cpu}\noutput: {directory: run}\n"
    )
    with pytest.raises(CheckpointError, match="Write user/name"):
        dyconvert.finetune("r.yaml", push_to="name")
    assert "Write user/name" in cli("finetune", "./r.yaml", "--push-to", "name").said
    assert "run" not in listed(tmp_path)
    if how == "python":
        dyconvert.finetune("./r.yaml", push_to=REPO, progress=False)
    elif how == "command":
        assert f"pushed to {ADDRESS}@" in cli("finetune", "./r.yaml", "--push-to", REPO).said
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        ran = cli("finetune", "./r.yaml", "--push-to", REPO)
        assert ran.code == 2
        assert "fine-tuned" in ran.stdout
        assert "The run is finished" in ran.said
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        # As the message advises, or so.
        assert cli("finetune", "./r.yaml", "--resume", "--push-to", REPO).code == 0
    assert same(dyconvert.load(ADDRESS), dyconvert.load(tmp_path / "run"))
    card = newest(hub)["README.md"].decode()
    assert str(tmp_path) not in card
    assert str(tmp_path).encode() not in newest(hub)["dyconvert.json"]
