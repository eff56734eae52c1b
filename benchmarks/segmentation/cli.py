"""Command line: ``run`` one method, ``sweep`` all that the paper compares, ``report`` on a run again."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path

import torch

import comfyui

from ...core.reading.maps import GROUNDINGS
from . import datasets
from .datasets import DataError, Dataset
from .methods import available
from .report import report, summary
from .run import run
from .store import Store
from .sweep import Group, explanations, full, only, single

SCENE_KINDS = {
    "scenes": "",
    "scenes-multi": "",
    "scenes-look-alike-multi": "look-alike",
    "scenes-crowd-multi": "crowd",
}
DATA = (*SCENE_KINDS, "imagenet", "voc", "voc-multi", "folder")
SCENES = 200
CHOICES = (
    "layers",
    "level",
    "samples",
    "guidance",
    "temperature",
    "softmax",
    "pooling",
    "attend_image",
    "attend_concepts",
    "captioned",
    "grounding",
    "bilinear",
    "refine",
    "explanation",
    "rules",
    "normalised",
)
"""Of a method, as the command line names them."""


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    try:
        args.command(args)
    except (DataError, FileNotFoundError, ValueError, comfyui.NoComfyUI) as error:
        sys.exit(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.segmentation",
        description="Zero-shot segmentation with concept maps, measured as in the ConceptAttention paper.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", choices=DATA, default="scenes", help="data set (%(default)s)")
    data.add_argument("--path", type=Path, help="its file or folder; scenes need none")
    data.add_argument("--names", type=Path, help="imagenet: JSON with a concept for each synset")
    data.add_argument("--words", type=Path, help="imagenet: names of the synsets, if --names goes by them")
    data.add_argument("--background", metavar="A,B,..", help="instead of the data set's background concepts")

    work = argparse.ArgumentParser(add_help=False, parents=[data])
    work.add_argument(
        "--out", type=Path, default=Path("out/segmentation"), help="folder of runs (%(default)s)"
    )
    work.add_argument("--limit", type=int, help=f"the first so many images (scenes: {SCENES}, else all)")
    work.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="this worker's part of the images"
    )
    work.add_argument(
        "--models",
        choices=("demo", "files", "clip", "vit"),
        default="demo",
        help="clip and vit are vision transformers, to be explained (%(default)s)",
    )
    work.add_argument("--unet", type=Path, help="files: the diffusion model's")
    work.add_argument("--clip", type=Path, nargs="+", help="files, clip: those of the text encoders")
    work.add_argument("--clip-vision", type=Path, help="clip: the vision tower's")
    work.add_argument("--vit", type=Path, help="vit: that of timm's classifier, DINO, DINOv2 or DINOv3")
    work.add_argument(
        "--clip-type", default="flux", help='files: as in CLIPLoader, "sd3" or "cogvideox" (%(default)s)'
    )
    work.add_argument("--vae", type=Path, help="files: the VAE's")
    work.add_argument(
        "--size", type=int, default=1024, help="files: side in pixels of what the model sees (%(default)s)"
    )

    one = commands.add_parser("run", parents=[work], help="run one method")
    one.add_argument(
        "--method", choices=available(), default="concept-attention", help="one for the models (%(default)s)"
    )
    # A method has defaults of its own.
    choice = partial(one.add_argument, default=argparse.SUPPRESS)
    choice("--layers", help='"default", "all", "last 10", or as in "0, 15-18"')
    choice("--level", type=float, help="noise level, 0 to 1 (0.5)")
    choice("--samples", type=int, help="of noise (1)")
    choice("--guidance", type=float, help="that the model is given (its own default)")
    choice("--temperature", type=float, help="of the softmax (1)")
    choice("--no-softmax", dest="softmax", action="store_false")
    choice(
        "--first-token",
        dest="pooling",
        action="store_const",
        const="first token",
        help="not the mean of a concept's tokens",
    )
    choice(
        "--no-cross", dest="attend_image", action="store_false", help="concepts do not attend to the image"
    )
    choice(
        "--no-self",
        dest="attend_concepts",
        action="store_false",
        help="concepts do not attend to each other",
    )
    choice("--no-caption", dest="captioned", action="store_false", help="the model sees an empty prompt")
    choice("--explanation", help='clip and vit: as in "transinterp" or "partial lrp"')
    choice("--rules", help='vit: "orig" or "ours", of relevance')
    choice(
        "--unnormalised",
        dest="normalised",
        action="store_false",
        help="vit and dino: pixels from 0 to 1, as in the paper's reference",
    )
    choice("--grounding", choices=GROUNDINGS, help=f"({GROUNDINGS[0]})")
    enlarging = one.add_mutually_exclusive_group()
    choice = partial(enlarging.add_argument, action="store_true", default=argparse.SUPPRESS)
    choice("--bilinear", help="enlarge maps smoothly")
    choice("--refine", help="refine maps by the picture's edges")
    one.set_defaults(command=_run)

    many = commands.add_parser(
        "sweep", parents=[work], help="run all that the paper's tables and figures compare"
    )
    many.add_argument(
        "--groups", nargs="+", metavar="NAME", help='only these tables, as in "refine grounding"'
    )
    many.set_defaults(command=_sweep)

    again = commands.add_parser("report", parents=[data], help="write the report of a run again")
    again.add_argument("run", type=Path, help="the run's folder")
    again.set_defaults(command=_report)
    return parser


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f'"{text}" is no part such as 1/2 or 2/2')
    return int(number), int(count)


def _run(args: argparse.Namespace) -> None:
    choices = {name: value for name, value in vars(args).items() if name in CHOICES}
    _work(args, lambda models, _: single(models, args.method, choices))


def _sweep(args: argparse.Namespace) -> None:
    def groups(models, dataset):
        every = full(models, dataset.background) if models.kind == "diffusion" else explanations(models)
        return every if args.groups is None else only(every, args.groups)

    _work(args, groups)


def _work(args: argparse.Namespace, groups) -> None:
    dataset = dataset_of(args)
    _start_comfyui()
    with torch.inference_mode():
        models = LOADED[args.models](args)
        chosen: list[Group] = groups(models, dataset)
        limit = args.limit or (SCENES if args.data.startswith("scenes") else None)
        about = {"torch": torch.__version__, "ComfyUI": _comfyui_version()}
        logging.disable(logging.INFO)
        store = run(dataset, chosen, models.settings, args.out, shard=args.shard, limit=limit, about=about)
    print(summary(store))
    if args.shard == (1, 1):
        print(f"Report: {report(store, dataset)}")
    else:
        command = f"python -m benchmarks.segmentation report {store.folder} --data {args.data}"
        print(f"Once all parts are done: {command}")


def _start_comfyui() -> None:
    """Make ComfyUI importable, on the GPU if PyTorch sees one."""
    path = comfyui.find()
    if path is None:
        raise comfyui.NoComfyUI(f"No ComfyUI was found. {comfyui.HELP}")
    # First, so that its module ``nodes`` is not hidden by this plugin's package of that name.
    sys.path.insert(0, str(path))
    arguments = [] if torch.cuda.is_available() or torch.backends.mps.is_available() else ["--cpu"]
    given, sys.argv = sys.argv, [sys.argv[0], *arguments]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = given


def _demo(args: argparse.Namespace):
    from .models import Models

    return Models.demo()


def _files(args: argparse.Namespace):
    from .models import Models

    _expect_files(args, "unet", "clip", "vae")
    return Models.files(args.unet, args.clip, args.clip_type, args.vae, args.size)


def _clip(args: argparse.Namespace):
    from .vision import Clip

    _expect_files(args, "clip-vision", "clip")
    return Clip.files(args.clip_vision, args.clip, args.clip_type)


def _vit(args: argparse.Namespace):
    from .vision import Transformer

    _expect_files(args, "vit")
    return Transformer.file(args.vit)


LOADED = {"demo": _demo, "files": _files, "clip": _clip, "vit": _vit}


def _expect_files(args: argparse.Namespace, *names: str) -> None:
    """
    Raises:
        ValueError: one is not given.
    """
    missing = [f"--{name}" for name in names if not getattr(args, name.replace("-", "_"))]
    if missing:
        raise ValueError(f"--models {args.models} needs the files of the models: {', '.join(missing)}.")


def _comfyui_version() -> str:
    try:
        from comfyui_version import __version__
    except ImportError:
        return "unknown"
    return __version__


def _report(args: argparse.Namespace) -> None:
    store = Store.open(args.run)
    dataset = dataset_of(args)
    if dataset.settings != store.settings["data"]:
        raise ValueError(
            f'"{args.run}" is a run over {store.settings["data"]["name"]}, with other images or background '
            f"concepts than --data {args.data}. Give --data, --path and --background as for the run."
        )
    print(summary(store))
    print(f"Report: {report(store, dataset)}")


def dataset_of(args: argparse.Namespace) -> Dataset:
    """The data set that the arguments name.

    Raises:
        DataError: it is missing or damaged.
        ValueError: its path was not given.
    """
    if args.data.startswith("scenes"):
        dataset = datasets.scenes(several="multi" in args.data, kind=SCENE_KINDS[args.data])
    elif args.path is None:
        raise ValueError(f"--data {args.data} needs --path.")
    elif args.data == "imagenet":
        if args.names is None:
            raise ValueError(f"--data imagenet needs --names. {datasets.NAMES_EXPECTED}")
        dataset = datasets.imagenet(args.path, args.names, args.words)
    elif args.data == "folder":
        dataset = datasets.folder(args.path)
    else:
        dataset = datasets.pascal_voc(args.path, several=args.data == "voc-multi")
    if args.background is not None:
        dataset = dataset.with_background(args.background)
    return dataset
