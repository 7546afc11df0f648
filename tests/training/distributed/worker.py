"""`fledge` with a fault: a process is killed or fails; results of each process are written down.

python -m tests.training.distributed.worker FAULT FOLDER COMMAND ..., under torchrun
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import fledge
from serving.errors import WorkError
from training.engine import epoch as trainer


def main(fault: str, folder: str, *words: str) -> int:
    """Run a command.

    Args:
        fault: "kill": all processes are killed after a step; "fail": process 1 raises an error;
            "none".
        folder: Folder of the files RANK.jsonl, which list the results of validations, with a hash
            of the weights, and of range tests.
        words: The command line.
    """
    rank = os.environ["RANK"]
    train_epoch, validate, find_lr = trainer.train_epoch, trainer.validate, trainer.find_lr

    def note(what):
        with Path(folder, f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps(what) + "\n")

    def epoch_with_fault(classifier, stage, recipe, optimizer, loader, number, *rest):
        if stage.name == "all" and number == 1 and fault == "fail" and rank == "1":
            raise WorkError("rose.jpg can't be read any more: mend it")
        if stage.name == "all" and number == 1 and fault == "kill":
            step = trainer.optimizer_step
            trainer.optimizer_step = lambda *args: (
                step(*args),
                os.kill(os.getpid(), signal.SIGKILL),
            )
        return train_epoch(classifier, stage, recipe, optimizer, loader, number, *rest)

    def noted_validate(classifier, *rest):
        known = hashlib.sha256()
        for value in classifier.state_dict().values():
            known.update(value.contiguous().numpy().tobytes())
        found = validate(classifier, *rest)
        note([known.hexdigest(), *found])
        return found

    def noted_find_lr(*args):
        curve = find_lr(*args)
        note([curve.rates, curve.losses, curve.valley])
        return curve

    trainer.train_epoch = epoch_with_fault
    trainer.validate, trainer.find_lr = noted_validate, noted_find_lr
    return fledge.main(list(words))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
