"""The best checkpoint of a run, and the line that every epoch leaves in metrics.csv."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import astuple, fields, replace
from pathlib import Path

from serving.views import softmax
from training import checkpoint, data, evaluate, model, options, pixels, trainer
from training.checkpoint import BEST, CheckpointInfo

Say = Callable[[str], None]


class Best:
    """Keeps the best checkpoint by validation accuracy, the lower loss deciding between equals."""

    def __init__(
        self,
        folder: Path,
        recipe: options.Recipe,
        dataset: data.Dataset,
        classifier: model.Classifier,
        say: Say,
    ) -> None:
        self.folder, self.classifier, self.say = folder, classifier, say
        self.rank = (-1.0, 0.0)
        self.info = CheckpointInfo(
            name=recipe.name,
            arch=recipe.arch,
            classes=dataset.classes,
            preprocess=recipe.preprocess,
            arch_args=recipe.arch_args,
            head=recipe.head.model_dump(),
            seed=recipe.seed,
            data={
                "source": dataset.source,
                "root": str(dataset.root),
                "fingerprint": dataset.fingerprint,
                "train": len(dataset.train),
                "valid": len(dataset.valid),
            },
            versions=checkpoint.versions(),
        )
        with (folder / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerow([field.name for field in fields(trainer.Epoch)])

    def see(self, epoch: trainer.Epoch) -> None:
        """Write an epoch's line; keep its weights where they are the best so far."""
        with (self.folder / "metrics.csv").open("a", newline="") as file:
            csv.writer(file).writerow(astuple(epoch))
        rank = (epoch.accuracy, -epoch.valid_loss)
        mark = ""
        if rank > self.rank:
            self.rank, mark = rank, "  best"
            metrics = {
                "accuracy": epoch.accuracy,
                "loss": epoch.valid_loss,
                "stage": epoch.stage,
                "epoch": epoch.epoch,
            }
            self.info = replace(self.info, metrics=metrics)
            checkpoint.save(self.folder / BEST, self.classifier, self.info)
        self.say(
            f"{epoch.stage:>8} {epoch.epoch:>3}  lr {epoch.lr:.2e}  train {epoch.train_loss:.4f}  "
            f"valid {epoch.valid_loss:.4f}  accuracy {epoch.accuracy:.2%}  "
            f"{epoch.seconds:.1f} s{mark}"
        )

    def finish(self, valid: pixels.PixelSet) -> evaluate.Result:
        """Score the best checkpoint in float32, as `fledge evaluate` does, and write that down."""
        classifier, info = checkpoint.load(self.folder)
        logits = evaluate.logits_of(classifier, valid.pixels, info.preprocess)
        accuracy, loss = evaluate.score(softmax(logits.numpy()), valid.labels.numpy())
        metrics = {**info.metrics, "accuracy": accuracy, "loss": loss}
        checkpoint.save(self.folder / BEST, classifier, replace(info, metrics=metrics))
        return evaluate.Result(accuracy, loss, len(valid), 1)
