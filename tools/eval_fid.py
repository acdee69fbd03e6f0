"""Score samples against a reference with ADM's metrics, or in the feature space of a network of your own.

    python tools/eval_fid.py --ref REF --samples SAMPLES [--inception auto|FILE] [--out metrics.json]
    python tools/eval_fid.py --ref REF --samples SAMPLES --features NET.pt2 --features-name "DINOv2 features"
    NPROC=4 launchers/single_node.sh tools/eval_fid.py --ref REF --samples SAMPLES

REF and SAMPLES are .npz files in ADM's format (arr_0: uint8, NHWC, 3 channels; arr_1: labels, optional), .safetensors
files with the same arrays (or one uint8 NHWC array of any name), or folders of PNG and JPEG images of one size. REF
may hold mu, sigma, mu_s, sigma_s, which then stand for its own FID and sFID statistics, beside arr_0 or without it
(then there is no precision and recall).

With the Inception network of 2015 the keys of metrics.json are fid, sfid, inception_score, precision, recall, and kid,
which is not ADM's. With --features they are frechet_distance, feature_space, precision, recall, class_score (as the
Inception Score, of that network's classes), kernel_distance and, when SAMPLES has labels, label_accuracy: such numbers
are not FID and compare with no paper.

Weights are looked for in $SWITCHDIT_CACHE, or ~/.cache/switchdit. The features of REF are kept in features/ there, so
that the next evaluation against it passes only SAMPLES through the network; they may be deleted at any time.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import from the repository root

# OpenMP's threads otherwise spin while they wait, which costs a factor of ten where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from switchdit.errors import UserError, exit_on_user_error
from switchdit.files import check_writable, write_json
from tools.command_line import told_by_rank_0

if TYPE_CHECKING:
    import numpy as np

    from tools.feature_extraction import Moments, SetFeatures
    from tools.feature_network import FeatureNetwork
    from tools.image_sets import ImageSet
    from tools.processes import Processes

NEIGHBOURS = 3
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE, KERNEL_SEED = 100, 1000, 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ref", type=Path, required=True, help="reference: .npz, .safetensors or folder of images")
    parser.add_argument("--samples", type=Path, required=True, help="what is scored: the same kinds")
    parser.add_argument("--inception", help="weight file, or auto: look in the cache directory (default)")
    parser.add_argument("--download", action="store_true", help="let auto download the published weights if need be")
    parser.add_argument(
        "--features", type=Path, help="another network: exported (.pt2), or of tools/train_feature_network.py"
    )
    parser.add_argument("--features-name", help='what to call its feature space, e.g. "digit features"')
    parser.add_argument("--out", type=Path, help="write the numbers, and all that is needed to repeat them, as JSON")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD", help="an earlier metrics.json to show beside the numbers"
    )
    parser.add_argument("--markdown", action="store_true", help="print a row of a Markdown table, too")
    parser.add_argument("--name", help="of the row (default: the name of SAMPLES)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass; no number depends on it")
    parser.add_argument(
        "--distances",
        default="float16",
        choices=("float16", "float32", "float64"),
        help="of precision and recall: float16 is ADM's, the others are the truth",
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where features are kept, instead of features/ there")
    parser.add_argument("--no-cache", action="store_true", help="neither look for kept features nor keep them")
    parser.add_argument("--cache-samples", action="store_true", help="keep the features of SAMPLES, too")
    args = told_by_rank_0(parser).parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["tools/eval_fid.py", *(part for part in given if not part.startswith("--local_rank"))])
    return args


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    args = arguments(argv)
    check_options(args)
    from tools.processes import joined

    with warnings.catch_warnings(), joined(args.local_rank) as processes:
        warnings.simplefilter("ignore" if processes.rank else "always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: processes.note(f"warning: {message}")
        run(args, processes, started)


def run(args: argparse.Namespace, processes: Processes, started: float) -> None:
    from tools.feature_cache import features_of, radii_of
    from tools.image_sets import open_images
    from tools.metrics_report import print_report, provenance, read_results

    old = read_results(args.compare) if args.compare else None
    reference, samples = open_images(args.ref, "--ref"), open_images(args.samples, "--samples")
    check_image_sets(args, reference, samples)
    network = load_network(args, processes)
    check_network(args, network, reference, samples)

    folder = cache_folder(args)
    folders = {"--ref": folder, "--samples": folder if args.cache_samples else None}
    of_reference, of_samples = (
        features_of(images, network, args.batch_size, folders[images.option], processes) if images.count else None
        for images in (reference, samples)
    )
    if processes.rank:
        return
    processes.use_all_cores()
    radii = {
        f"{name}_radii": radii_of(features, images, network, NEIGHBOURS, args.distances, folders[images.option])
        for name, images, features in (("reference", reference, of_reference), ("sample", samples, of_samples))
        if reference.count
    }
    results = score(reference, samples, of_reference, of_samples, radii, args)
    results["options"] = options(args, processes, reference, samples)
    if args.out or old:
        results |= provenance(args.command, network, reference, samples, uses_stored(args, reference))
        results["seconds"] = round(time.monotonic() - started, 3)
    print_report(results, old, args, reference, samples)
    if args.out:
        write_json(args.out, results)
        print(f"wrote {args.out}")


def check_options(args: argparse.Namespace) -> None:
    """Raise `UserError` for options that contradict each other or cannot work."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1")
    if args.features and args.inception:
        raise UserError("--inception and --features are two networks; give one of them")
    if args.download and (args.features or args.inception not in (None, "auto")):
        raise UserError("--download fetches the weights of --inception auto; another network is named")
    if args.features_name is not None and not args.features:
        raise UserError("--features-name names the feature space of --features, which is missing")
    if args.features_name is not None and not args.features_name.strip():
        raise UserError("--features-name is empty")
    if args.no_cache and (args.cache or args.cache_samples):
        raise UserError(f"--no-cache and {'--cache' if args.cache else '--cache-samples'} contradict each other")
    if args.name is not None and not args.markdown:
        raise UserError("--name names the row of --markdown, which is missing")
    if args.out and args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; give a file such as {args.out / 'metrics.json'}")
    if args.out:
        check_writable(args.out, "--out")


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


def load_network(args: argparse.Namespace, processes: Processes) -> FeatureNetwork:
    if args.features:
        from tools.feature_network import load_feature_network

        return load_feature_network(args.features)
    from tools.inception_weights import find_weights

    if processes.rank == 0:
        weights = find_weights(args.inception or "auto", args.download)
    processes.agree(0)  # by now rank 0 has downloaded what the others are going to read
    if processes.rank:
        weights = find_weights(args.inception or "auto")
    if not weights.published:
        warnings.warn(
            f"{weights.path} is not the published graph file (SHA-256 {weights.sha256}): "
            "its numbers compare with no paper's",
            stacklevel=1,
        )
    from tools.inception import load_inception

    return load_inception(weights)


def check_network(args: argparse.Namespace, network: FeatureNetwork, reference: ImageSet, samples: ImageSet) -> None:
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
    if args.features and network.num_classes and samples.labels is not None:
        unknown = samples.labels[(samples.labels < 0) | (samples.labels >= network.num_classes)]
        if len(unknown):
            raise UserError(
                f"--samples {samples.path}: arr_1 holds the label {unknown[0]}; "
                f"the network {network.description['file']} knows classes 0 to {network.num_classes - 1}"
            )


def score(
    reference: ImageSet,
    samples: ImageSet,
    of_reference: SetFeatures | None,
    of_samples: SetFeatures,
    radii: dict[str, np.ndarray],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All metrics, in the order in which they are printed; None for one that REF does not allow."""
    from tools.adm_metrics import inception_score, kernel_distance, precision_recall
    from tools.feature_extraction import on_device

    with_inception = not args.features
    stored = reference.statistics if with_inception else {}
    computed = of_reference.pooled_moments if of_reference else None
    frechet = distance("", stored, computed, of_samples.pooled_moments)
    precision, recall, kernel = None, None, None
    if of_reference is not None:
        print("precision, recall and kernel distance ...", file=sys.stderr, flush=True)
        both = on_device(of_reference.pooled), on_device(of_samples.pooled)
        precision, recall = precision_recall(*both, NEIGHBOURS, args.distances, **radii)
        kernel = kernel_distance(of_reference.pooled, of_samples.pooled, **kernel_protocol(reference, samples))
    if with_inception:
        computed = of_reference.spatial_moments if of_reference else None
        return {
            "fid": frechet,
            "sfid": distance("_s", stored, computed, of_samples.spatial_moments),
            "inception_score": inception_score(of_samples.probabilities),
            "precision": precision,
            "recall": recall,
            "kid": kernel,
        }
    scores = {"frechet_distance": frechet, "feature_space": feature_space(args)}
    scores |= {"precision": precision, "recall": recall}
    if of_samples.probabilities is not None:
        scores["class_score"] = inception_score(of_samples.probabilities)
        if samples.labels is not None:
            scores["label_accuracy"] = float((of_samples.probabilities.argmax(axis=1) == samples.labels).mean())
    return {**scores, "kernel_distance": kernel}


def distance(suffix: str, stored: dict[str, np.ndarray], computed: Moments | None, of_samples: Moments) -> float | None:
    """Fréchet distance to the reference's stored statistics, else to the computed ones, else None."""
    from tools.adm_metrics import frechet_distance

    mu, sigma = stored.get(f"mu{suffix}"), stored.get(f"sigma{suffix}")
    if mu is None or sigma is None:
        if computed is None:
            return None
        mu, sigma = computed.mean, computed.covariance
    return frechet_distance(of_samples.mean, of_samples.covariance, mu, sigma)


def kernel_protocol(reference: ImageSet, samples: ImageSet) -> dict[str, int]:
    size = min(KERNEL_SUBSET_SIZE, reference.count, samples.count)
    return {"subsets": KERNEL_SUBSETS, "subset_size": size, "seed": KERNEL_SEED}


def feature_space(args: argparse.Namespace) -> str:
    return args.features_name or f"features of {args.features.name}"


def options(args: argparse.Namespace, processes: Processes, reference: ImageSet, samples: ImageSet) -> dict[str, Any]:
    return {
        "distances": args.distances,
        "nearest_neighbours": NEIGHBOURS,
        "kid": kernel_protocol(reference, samples) if reference.count else None,
        "batch_size": args.batch_size,
        "processes": processes.world_size,
    }


def uses_stored(args: argparse.Namespace, reference: ImageSet) -> bool:
    return not args.features and {"mu", "sigma"} <= set(reference.statistics)


def cache_folder(args: argparse.Namespace) -> Path | None:
    from tools.inception_weights import cache_directory

    return None if args.no_cache else args.cache or cache_directory() / "features"


if __name__ == "__main__":
    main()
