"""Score samples against a reference with ADM's metrics, or in the feature space of a network of your own.

    python tools/eval_fid.py --ref REF --samples SAMPLES [--inception auto|FILE] [--out metrics.json]
    python tools/eval_fid.py --ref REF --samples SAMPLES --features FILE --features-name "digit features"

REF and SAMPLES are .npz files in ADM's format (arr_0: uint8, NHWC, 3 channels; arr_1: labels, optional) or folders of
PNG and JPEG images of one size. REF may hold mu, sigma, mu_s, sigma_s, which then stand for its own FID and sFID
statistics, beside arr_0 or without it (then there is no precision and recall).

With the Inception network of 2015 the keys of metrics.json are fid, sfid, inception_score, precision, recall. With
--features they are frechet_distance, feature_space, precision, recall, class_score (as the Inception Score, of that
network's classes) and, when SAMPLES has labels, label_accuracy: such numbers are not FID and compare with no paper.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import write_json
from switchdit.progress import progress

if TYPE_CHECKING:
    import numpy as np

    from tools.adm_metrics import FeatureStatistics
    from tools.feature_network import FeatureNetwork
    from tools.image_sets import ImageSet

# N = images, F = features, G = spatial features, K = classes

NEIGHBOURS = 3


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ref", type=Path, required=True, help="reference: .npz or folder of images")
    parser.add_argument("--samples", type=Path, required=True, help="what is scored: .npz or folder of images")
    parser.add_argument("--inception", help="weight file, or auto: look in the cache directory (default)")
    parser.add_argument("--features", type=Path, help="another network: a file of tools/train_feature_network.py")
    parser.add_argument("--features-name", help='what to call its feature space, e.g. "digit features"')
    parser.add_argument("--out", type=Path, help="write the numbers, and all that is needed to repeat them, as JSON")
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass; no number depends on it")
    parser.add_argument(
        "--distances",
        default="float16",
        choices=("float16", "float32", "float64"),
        help="of precision and recall: float16 is ADM's, the others are the truth",
    )
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    check_options(args)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr, flush=True)
        run(args)


def run(args: argparse.Namespace) -> None:
    from tools.image_sets import open_images

    reference, samples = open_images(args.ref, "--ref"), open_images(args.samples, "--samples")
    check_image_sets(args, reference, samples)
    network = load_network(args)
    check_network(network, reference, samples)

    scores = score(network, reference, samples, args)
    if args.out:
        print("checksums ...", file=sys.stderr, flush=True)
        write_json(args.out, {**scores, **provenance(args, network, reference, samples)})
    print_table(scores, args, reference, samples)


def check_options(args: argparse.Namespace) -> None:
    """Raise `UserError` for options that contradict each other or cannot work."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1")
    if args.features and args.inception:
        raise UserError("--inception and --features are two networks; give one of them")
    if args.features_name is not None and not args.features:
        raise UserError("--features-name names the feature space of --features, which is missing")
    if args.features_name is not None and not args.features_name.strip():
        raise UserError("--features-name is empty")
    if args.out and args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; give a file such as {args.out / 'metrics.json'}")
    if args.out:
        ancestor = next(parent for parent in args.out.absolute().parents if parent.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
            raise UserError(f"--out {args.out} cannot be written: {ancestor} is no folder that you may write to")


def check_image_sets(args: argparse.Namespace, reference: ImageSet, samples: ImageSet) -> None:
    """Raise `UserError` where a set does not hold what the metrics need."""
    if not samples.count:
        raise UserError(f"--samples {samples.path} holds statistics but no array arr_0 (images, uint8, NHWC)")
    if args.features and not reference.count:
        raise UserError(
            f"--ref {reference.path} holds Inception statistics but no images (arr_0), which --features needs"
        )
    if not reference.count and not {"mu", "sigma"} <= set(reference.statistics):
        raise UserError(f"--ref {reference.path} has neither images (arr_0) nor both of mu and sigma")
    for images in (reference, samples):
        if 0 < images.count <= NEIGHBOURS:
            raise UserError(
                f"{images.option} {images.path} holds {images.count} images; the {NEIGHBOURS} nearest neighbours "
                f"of precision and recall need at least {NEIGHBOURS + 1}"
            )


def load_network(args: argparse.Namespace) -> FeatureNetwork:
    if args.features:
        from tools.feature_network import load_feature_network

        return load_feature_network(args.features)
    from tools.inception_weights import find_weights

    weights = find_weights(args.inception or "auto")
    if not weights.published:
        warnings.warn(
            f"{weights.path} is not the published graph file (SHA-256 {weights.sha256}): "
            "its numbers compare with no paper's",
            stacklevel=1,
        )
    from tools.inception import load_inception

    return load_inception(weights)


def check_network(network: FeatureNetwork, reference: ImageSet, samples: ImageSet) -> None:
    """Raise `UserError` for images or statistics of another size than the network's, and for unknown labels."""
    size = network.image_size
    for name, dimension in network.statistics_sizes.items():
        if name in reference.statistics and len(reference.statistics[name]) != dimension:
            raise UserError(
                f"--ref {reference.path}: {name} is of {len(reference.statistics[name])} features; "
                f"the Inception network has {dimension}"
            )
    for images in (reference, samples):
        if size is not None and images.count and images.shape != (size, size):
            raise UserError(
                f"{images.option} {images.path} holds images of {images.shape[1]} x {images.shape[0]}; "
                f"the network {network.description['file']} takes {size} x {size}"
            )
    if size is not None and samples.labels is not None:
        unknown = samples.labels[(samples.labels < 0) | (samples.labels >= network.num_classes)]
        if len(unknown):
            raise UserError(
                f"--samples {samples.path}: arr_1 holds the label {unknown[0]}; "
                f"the network {network.description['file']} knows classes 0 to {network.num_classes - 1}"
            )


@dataclass
class Evaluated:
    """What is kept of a set: pooled features (N, F), statistics, probabilities (N, K) if they were asked for."""

    pooled: np.ndarray | None = None
    pooled_statistics: FeatureStatistics | None = None
    spatial_statistics: FeatureStatistics | None = None
    probabilities: np.ndarray | None = None


def evaluate(network: FeatureNetwork, images: ImageSet, batch_size: int, keep_probabilities: bool) -> Evaluated:
    """Pass all images through the network, a batch at a time. `UserError` for features that are not finite."""
    import numpy as np

    from tools.adm_metrics import FeatureStatistics

    pooled, probabilities, statistics, seen = None, None, [], 0
    with progress(desc=f"features of {images.path.name}", total=images.count, unit="image") as bar:
        for batch in images.batches(batch_size):
            features = network(batch)
            if pooled is None:  # the first batch shows how many features there are
                pooled = np.empty((images.count, features.pooled.shape[1]), np.float32)
                if keep_probabilities and features.probabilities is not None:
                    probabilities = np.empty((images.count, features.probabilities.shape[1]), np.float32)
                statistics = [
                    FeatureStatistics(a.shape[1]) for a in (features.pooled, features.spatial) if a is not None
                ]
            here = slice(seen, seen + len(batch))
            for array, total in zip((features.pooled, features.spatial), statistics, strict=False):
                if not np.isfinite(array).all():
                    raise UserError(
                        f"the network {network.description['file']} makes features that are not finite of "
                        f"images {here.start} to {here.stop - 1} of {images.option} {images.path}"
                    )
                total.update(array)
            pooled[here] = features.pooled
            if probabilities is not None:
                probabilities[here] = features.probabilities
            seen += len(batch)
            bar.update(len(batch))
    return Evaluated(pooled, statistics[0], statistics[1] if len(statistics) > 1 else None, probabilities)


def score(network: FeatureNetwork, reference: ImageSet, samples: ImageSet, args: argparse.Namespace) -> dict[str, Any]:
    """All metrics, in the order in which they are printed; None for one that REF does not allow."""
    from tools.adm_metrics import inception_score, precision_recall

    with_inception = not args.features
    stored = reference.statistics if with_inception else {}
    of_reference = evaluate(network, reference, args.batch_size, False) if reference.count else None
    of_samples = evaluate(network, samples, args.batch_size, True)
    computed = of_reference or Evaluated()
    frechet = distance("", stored, computed.pooled_statistics, of_samples.pooled_statistics)
    precision, recall = None, None
    if of_reference is not None:
        print("precision and recall ...", file=sys.stderr, flush=True)
        precision, recall = precision_recall(of_reference.pooled, of_samples.pooled, NEIGHBOURS, args.distances)
    if with_inception:
        spatial = distance("_s", stored, computed.spatial_statistics, of_samples.spatial_statistics)
        return {
            "fid": frechet,
            "sfid": spatial,
            "inception_score": inception_score(of_samples.probabilities),
            "precision": precision,
            "recall": recall,
        }
    scores = {"frechet_distance": frechet, "feature_space": feature_space(args)}
    scores |= {"precision": precision, "recall": recall}
    if of_samples.probabilities is not None:
        scores["class_score"] = inception_score(of_samples.probabilities)
        if samples.labels is not None:
            scores["label_accuracy"] = float((of_samples.probabilities.argmax(axis=1) == samples.labels).mean())
    return scores


def distance(
    suffix: str,
    stored: dict[str, np.ndarray],
    computed: FeatureStatistics | None,
    of_samples: FeatureStatistics,
) -> float | None:
    """Fréchet distance to the reference's stored statistics, else to the computed ones, else None."""
    from tools.adm_metrics import frechet_distance

    mu, sigma = stored.get(f"mu{suffix}"), stored.get(f"sigma{suffix}")
    if mu is None or sigma is None:
        if computed is None:
            return None
        mu, sigma = computed.mean(), computed.covariance()
    return frechet_distance(of_samples.mean(), of_samples.covariance(), mu, sigma)


def feature_space(args: argparse.Namespace) -> str:
    return args.features_name or f"features of {args.features.name}"


def provenance(
    args: argparse.Namespace, network: FeatureNetwork, reference: ImageSet, samples: ImageSet
) -> dict[str, Any]:
    """What is needed to repeat the numbers."""
    import numpy
    import PIL
    import torch

    import switchdit
    from tools.image_sets import describe

    uses_stored = not args.features and bool(reference.statistics)
    return {
        "reference": {**describe(reference), "statistics": "stored" if uses_stored else "computed"},
        "samples": describe(samples),
        "network": network.description,
        "options": {"distances": args.distances, "nearest_neighbours": NEIGHBOURS, "batch_size": args.batch_size},
        "versions": {
            "switchdit": switchdit.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
        },
    }


def print_table(scores: dict[str, Any], args: argparse.Namespace, reference: ImageSet, samples: ImageSet) -> None:
    names = {
        "fid": "FID",
        "sfid": "sFID",
        "inception_score": "Inception Score",
        "frechet_distance": f"Fréchet distance ({scores.get('feature_space')})",
        "precision": "precision",
        "recall": "recall",
        "class_score": "class score",
        "label_accuracy": "label accuracy",
    }
    print(f"{samples.count} samples of {samples.path}, reference {reference.path} ({reference.count} images)")
    width = max(len(names[key]) for key in scores if key in names)
    for key, name in names.items():
        if key in scores:
            value = scores[key]
            shown = "not available" if value is None else f"{value:.4f}" if math.isfinite(value) else str(value)
            print(f"  {name:<{width}}  {shown:>10}")
    if args.out:
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
