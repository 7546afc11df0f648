"""From a recipe and photos to a run: all that can be wrong is found before the work begins."""

from __future__ import annotations

from pathlib import Path

from serving.errors import DataError
from training import cache, checkpoint, data, pixels, plan, run_folder, state
from training.activations import Activations
from training.clock import Clock
from training.console import Say
from training.console import say as say_aloud
from training.options import Recipe
from training.precision import choose_precision
from training.run import Run, go
from training.state import Position


def run(
    recipe: Recipe,
    source: str,
    *,
    split: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    cache_gb: float | None = None,
    say: Say = say_aloud,
) -> Path:
    """Fine-tune by `recipe` on the photos of `source`; returns the run's folder.

    Args:
        recipe: What to do.
        source: As `data.load`.
        split: As `data.load`.
        out: The run's folder, new or empty; `runs/NAME` with a number where that is taken.
        device: "auto", "cpu" or "cuda".
        cache_gb: Budget of what is kept between runs, in GB; as `cache.wanted`.
        say: Takes lines for a person.

    Raises:
        FledgeError: Anything wrong with the request, before anything is written; a NaN loss.
    """
    clock = Clock()
    run_folder.check_free(out)
    precision = choose_precision(device, recipe.precision)
    dataset = data.load(source, split=split, config=recipe.data, seed=recipe.seed)
    classifier, pretrained = plan.build_classifier(recipe, len(dataset.classes), say)
    stages = plan.stages_of(recipe, pretrained)
    plan.check(classifier, recipe, stages)
    photos = pixels.Photos(dataset, recipe.data.presize, say, cache_gb)
    with clock("decoding"):
        photos.at(recipe.preprocess_of(stages[0]))
    dataset = photos.dataset
    if dataset.unlabelled:
        say(f"{len(dataset.unlabelled)} unlabelled photos: score them with fledge score")
    if not pretrained and stages != plan.stages_of(recipe, True):
        say("no trained weights: every stage trains the whole network, at one rate")
    folder = run_folder.claim(out, recipe.name)
    begun = run_folder.Begun(
        source=dataset.source,
        root=str(dataset.root),
        fingerprint=dataset.fingerprint,
        classes=dataset.classes,
        pretrained=pretrained,
        device=device,
        versions=checkpoint.versions(),
    )
    run_folder.begin(folder, recipe, dataset, begun)
    info = plan.info(recipe, dataset)
    activations = Activations(photos, recipe, precision, cache.room(cache_gb), say, clock)
    return go(Run(recipe, stages, classifier, activations, folder, info, say))


def resume(
    folder: Path,
    *,
    device: str | None = None,
    root: Path | None = None,
    cache_gb: float | None = None,
    say: Say = say_aloud,
) -> Path:
    """Go on with a run that was killed or interrupted, from its last finished epoch.

    On the same machine with as many threads it ends with the same weights, bit for bit, as a run
    that was never interrupted.

    Args:
        folder: The run's folder.
        device: Another one than the run began with.
        root: Where the photos are now, if they have moved.
        cache_gb: As `run`.
        say: Takes lines for a person.

    Raises:
        DataError: No run there that got going, or its photos are no longer what they were.
    """
    clock = Clock()
    recipe, begun = run_folder.read(folder)
    if not (folder / run_folder.LAST).exists():
        say(f"{folder} is finished already; next: fledge export {folder} --out bundle")
        return folder
    precision = choose_precision(device or begun.device, recipe.precision)
    where = (root or Path(begun.root)).resolve()
    dataset = data.from_split_file(folder / data.SPLIT, where, begun.classes, begun.source)
    begin_again = not (folder / run_folder.LAST / state.STATE).exists()
    weights = {"auto": "imagenet" if begun.pretrained else "none"}.get(
        recipe.weights, recipe.weights
    )
    built = recipe.model_copy(update={"weights": weights if begin_again else "none"})
    classifier, _ = plan.build_classifier(built, len(begun.classes), say)
    stages = plan.stages_of(recipe, begun.pretrained)
    found = state.load(folder / run_folder.LAST, precision.device)
    position, tensors = found or (Position(), {})
    photos = pixels.Photos(dataset, recipe.data.presize, say, cache_gb)
    with clock("decoding"):
        photos.at(recipe.preprocess_of(stages[min(position.stage, len(stages) - 1)]))
    if photos.dataset.fingerprint != begun.fingerprint:
        raise DataError(
            f"--resume {folder}: the photos in {where} are no longer those that the run began "
            "with; put them back, or start anew"
        )
    if found:
        classifier.load_state_dict(tensors.pop("model"))
        say(f"{folder}: going on after {len(position.history)} finished epochs")
    activations = Activations(photos, recipe, precision, cache.room(cache_gb), say, clock)
    info = plan.info(recipe, dataset)
    return go(Run(recipe, stages, classifier, activations, folder, info, say, position, tensors))
