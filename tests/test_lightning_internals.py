"""Each use of Lightning's insides, in the version that is installed."""

import csv
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

from lightning import pytorch as pl
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import CSVLogger

from dyconvert.finetuning.training import lightning_internals as internals

PACKAGE = Path(internals.__file__).parents[2]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(Callback):
    def __init__(self, file: Path) -> None:
        self.file = file
        self.batches: list[tuple[int, bool]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        self.batches.append((internals.batches_done(trainer), internals.is_last_batch(trainer)))
        if self.file.suffix == ".ckpt" and len(self.batches) == 2:
            trainer.save_checkpoint(self.file)
        self.state = internals.gathered_state(trainer)


def train(seen: Seen, *callbacks: Callback, resume: Path | None = None) -> Module:
    module = Module()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen, *callbacks],
    )
    trainer.fit(module, DataLoader(torch.ones(3, 1)), ckpt_path=resume)
    return module


@pytest.mark.filterwarnings("ignore")
def test_a_run(tmp_path):
    average = WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.5))
    seen = Seen(tmp_path / "run.ckpt")
    module = train(seen, average)
    assert seen.batches == [(1, False), (2, False), (3, True)]
    assert list(seen.state) == ["layer.weight", "layer.bias"]
    assert list(internals.averaged_module(average).state_dict()) == list(module.state_dict())
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert internals.position_in(checkpoint) == (0, 2, 2)
    # Where batches before the checkpoint count, as `batches_done` says.
    again = Seen(tmp_path / "none")
    train(again, WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.5)), resume=tmp_path / "run.ckpt")
    assert again.batches[0][0] == 3


def test_rows_of_an_earlier_run(tmp_path):
    logger = CSVLogger(str(tmp_path), name="", version="")
    internals.add_rows(logger, [{"step": "1", "loss": "2.5"}])
    logger.log_metrics({"loss": 1.5}, step=2)
    logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        assert [(row["step"], row["loss"]) for row in csv.DictReader(file)] == [("1", "2.5"), ("2", "1.5")]


def test_its_version_is_bounded():
    assert re.search(r'"lightning>=[\d.]+,<[\d.]+"', (Path(__file__).parents[1] / "pyproject.toml").read_text())


def test_no_other_file_uses_them():
    names = re.compile(
        r"fit_loop|epoch_loop|batch_progress|_average_model|lightning_module_state_dict|experiment\.metrics"
    )
    users = [file.name for file in PACKAGE.rglob("*.py") if names.search(file.read_text(encoding="utf-8"))]
    assert users == ["lightning_internals.py"]
